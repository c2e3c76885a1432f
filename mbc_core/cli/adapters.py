"""`mbc adapters`: list, show, promote and roll back the language model's KV-LoRA adapters of a bank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mbc_core.cli.adapters_add import add_adapter, canary
from mbc_core.cli.options import bank_option, json_option
from mbc_core.cli.output import note, only_json, out, print_json, table
from mbc_core.errors import UsageError

if TYPE_CHECKING:
    from mbc_core.adapters import AdapterInfo, AdapterRegistry

_FIGURES = ("before", "after")


@click.group()
def adapters() -> None:
    """Look at a bank's adapters, promote a candidate, roll back."""


@adapters.command("list")
@bank_option
@json_option
def list_adapters(bank: str, as_json: bool) -> None:
    """List all adapter versions and mark the live ones.

    Example: mbc adapters list --bank demo-bank
    """
    with only_json(as_json) as stream:
        found = _registry(bank).list()
        if as_json:
            print_json({"adapters": [_plain(info) for info in found]}, stream)
            return
    rows = [[info.version, "live" if info.live else "", info.base_digest[:12], *_scores(info.card)] for info in found]
    out().print(table(None, ["version", "", "base model", "F1 before (new, old)", "F1 after (new, old)"], rows))
    if not any(info.live for info in found):
        note("No adapter of this bank is live: the one that comes with the release is used.")


@adapters.command("show")
@click.argument("version")
@bank_option
@json_option
def show_adapter(version: str, bank: str, as_json: bool) -> None:
    """Show an adapter's card: how it was made, and its figures before and after.

    Example: mbc adapters show 0001-0123456789abcdef --bank demo-bank
    """
    with only_json(as_json) as stream:
        info = _registry(bank).info(version)
        if as_json:
            print_json(_plain(info), stream)
            return
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in info.card.items()]
    out().print(table(f"Adapter {version}{' (live)' if info.live else ''}", ["", ""], rows))


@adapters.command("promote")
@click.argument("version")
@click.option("--reason", default="promoted by hand", show_default=True, help="Kept with the decision.")
@bank_option
@json_option
def promote_adapter(version: str, reason: str, bank: str, as_json: bool) -> None:
    """Make an adapter version the live one of its base model.

    Example: mbc adapters promote 0001-0123456789abcdef --bank demo-bank --reason "better on our questions"
    """
    with only_json(as_json) as stream:
        _registry(bank).promote(version, reason)
        if as_json:
            print_json({"live": version, "reason": reason}, stream)
            return
    note(f"adapter {version} is live")


@adapters.command("rollback")
@click.option("--base", metavar="DIGEST", help="Start of the base model's digest; needed when a bank knows several.")
@click.option("--reason", default="rolled back by hand", show_default=True, help="Kept with the decision.")
@bank_option
@json_option
def rollback_adapter(base: str | None, reason: str, bank: str, as_json: bool) -> None:
    """Go back to the adapter that was live before the present one.

    Example: mbc adapters rollback --bank demo-bank
    """
    with only_json(as_json) as stream:
        registry = _registry(bank)
        live = registry.rollback(_base_digest(registry, base), reason)
        if as_json:
            print_json({"live": live, "reason": reason}, stream)
            return
    note(f"adapter {live} is live again" if live else "the adapter that comes with the release is used again")


def _base_digest(registry: AdapterRegistry, start: str | None) -> str:
    """The one base model that is meant."""
    known = sorted({info.base_digest for info in registry.list()})
    meant = [digest for digest in known if digest.startswith(start or "")]
    if len(meant) != 1:
        raise UsageError(
            "which base model is meant is not clear" if meant else "the bank has no adapter for such a base model",
            value=[digest[:12] for digest in (meant or known)],
            cause="the bank has adapters of several" if meant else "none was trained yet, or the digest is misspelt",
            fix="name one with --base" if meant else "see `mbc adapters list`",
        )
    return meant[0]


def _plain(info: AdapterInfo) -> dict[str, Any]:
    return {"version": info.version, "base_digest": info.base_digest, "live": info.live, "card": info.card}


def _scores(card: dict[str, Any]) -> list[str]:
    """Before and after as short texts; – where the card has none."""
    texts = []
    for name in _FIGURES:
        found = card.get(name)
        known = found if isinstance(found, dict) else {}
        texts.append(", ".join("–" if known.get(one) is None else f"{known[one]:.1f}" for one in ("new_f1", "old_f1")))
    return texts


def _registry(bank: str) -> AdapterRegistry:
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.bank import Bank

    return AdapterRegistry(Bank.open(bank))


adapters.add_command(add_adapter)
adapters.add_command(canary)
