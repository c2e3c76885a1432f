"""`mbc adapters`: list, show, promote and roll back the language model's KV-LoRA adapters of a bank."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from mbc_core.cli.adapters_add import add_adapter, canary
from mbc_core.cli.options import bank_option, json_option
from mbc_core.cli.output import note, only_json, out, print_json, table
from mbc_core.errors import UsageError
from mbc_core.lineage import Lineage

if TYPE_CHECKING:
    from mbc_core.adapters import AdapterInfo, AdapterRegistry

_SHOWN = {field.name for field in fields(Lineage)} - {"replay"} | {"started_from", "decision"}
"""Entries of the card that the lineage tells already."""


@click.group()
def adapters() -> None:
    """Look at a bank's adapters, promote a candidate, roll back."""


@adapters.command("list")
@bank_option
@json_option
def list_adapters(bank: str, as_json: bool) -> None:
    """List all adapter versions: which is live, what each descends from, what the gate said, F1 before and after.

    Example: mbc adapters list --bank demo-bank
    """
    with only_json(as_json) as stream:
        found = _registry(bank).list()
        if as_json:
            print_json({"adapters": [_plain(info) for info in found]}, stream)
            return
    several = len({info.base_digest for info in found}) > 1
    heads = ["version", "", "made", "from", "decision", "F1 new", "F1 old", *(["base model"] if several else [])]
    shown = table(None, heads, [_row(info)[: len(heads)] for info in found])
    shown.columns[0].no_wrap = True  # to be copied into `show` and `promote`
    out().print(shown)
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
        registry = _registry(bank)
        info, parents = registry.info(version), registry.ancestors(version)
        if as_json:
            print_json(_plain(info) | {"ancestors": parents}, stream)
            return
    told = info.lineage.to_json() | {"descends from": " ← ".join(parents) or "fresh weights"}
    out().print(table(f"Adapter {version} ({info.state})", ["lineage", ""], _pairs(told)))
    rest = {name: value for name, value in info.card.items() if name not in _SHOWN}
    out().print(table(None, ["card", ""], _pairs(rest)))


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
        began = _begin()
        _registry(bank).promote(version, reason)
        seconds = round(time.perf_counter() - began, 3)
        if as_json:
            print_json({"live": version, "reason": reason, "seconds": seconds}, stream)
            return
    note(f"adapter {version} is live ({seconds:.2f} s)")


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
        began = _begin()
        registry = _registry(bank)
        live = registry.rollback(_base_digest(registry, base), reason)
        seconds = round(time.perf_counter() - began, 3)
        if as_json:
            print_json({"live": live, "reason": reason, "seconds": seconds}, stream)
            return
    told = f"adapter {live} is live again" if live else "the adapter that comes with the release is used again"
    note(f"{told} ({seconds:.2f} s)")


def _base_digest(registry: AdapterRegistry, start: str | None) -> str:
    """The one base model that is meant."""
    known = registry.promoted_bases()
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
    told = {"version": info.version, "base_digest": info.base_digest, "live": info.live, "state": info.state}
    return told | {"lineage": info.lineage.to_json(), "card": info.card}


def _row(info: AdapterInfo) -> list[str]:
    """One line of the list; – where the card does not tell."""
    from_card = info.lineage
    made, parent = str(info.card.get("created_at") or "–")[:10], from_card.parent or "–"
    state = "" if info.state == "candidate" else info.state
    decision = from_card.reason or from_card.sentence or "–"
    if from_card.promote and info.state == "candidate":
        decision = "passed, not promoted"
    scores = [f"{_f1(from_card.before[name])} → {_f1(from_card.after[name])}" for name in ("new_f1", "old_f1")]
    return [info.version, state, made, parent.split("-")[0], decision, *scores, info.base_digest[:12]]


def _f1(score: float | None) -> str:
    return "–" if score is None else f"{score:.1f}"


def _pairs(told: Mapping[str, Any]) -> list[list[str]]:
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in told.items()]


def _begin() -> float:
    """The moment a change begins: after the program is loaded, before the bank is looked at."""
    import mbc_core.adapters
    import mbc_core.bank  # noqa: F401

    return time.perf_counter()


def _registry(bank: str) -> AdapterRegistry:
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.bank import Bank

    return AdapterRegistry(Bank.open(bank))


adapters.add_command(add_adapter)
adapters.add_command(canary)
