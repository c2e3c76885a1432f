"""`mbc inspect` and `mbc export`: what a bank holds, and its rows decoded for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from mbc_core.cli.options import bank_option, json_option
from mbc_core.cli.output import bytes_for_people, note, only_json, out, print_json, table

Form = Literal["parquet", "jsonl"]


@click.command()
@bank_option
@click.option("--verify", is_flag=True, help="Read every file and check digests and counts; exit code 1 on a problem.")
@json_option
def inspect(bank: str, verify: bool, as_json: bool) -> int:
    """Show what a bank holds and what a passage costs.

    Example: mbc inspect --bank demo-bank --verify
    """
    from mbc_core.bank import Bank

    with only_json(as_json) as stream:
        found = Bank.open(bank).inspect(verify=verify)
        if as_json:
            print_json(found, stream)
    if not as_json:
        _show(bank, found)
    return 0 if found.get("ok", True) else 1


@click.command()
@bank_option
@click.option(
    "--out",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write (default: standard output).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["parquet", "jsonl"]),
    help="Taken from the file's ending when not given; JSON Lines on standard output.",
)
@json_option
def export(bank: str, target: Path | None, form: str | None, as_json: bool) -> None:
    """Write the decoded rows: document, title, passage, words as text, codes as a list, window, time.

    Example: mbc export --bank demo-bank --out decoded.parquet
    """
    from mbc_core import defaults
    from mbc_core.bank import Bank

    if target is None and form == "parquet":
        raise click.UsageError("Parquet does not go to standard output; name a file with --out.")
    if target is None and as_json:
        raise click.UsageError("With --json the rows go to a file; name it with --out.")
    chosen: Form = (
        "parquet" if form == "parquet" or (form is None and target and target.suffix == ".parquet") else "jsonl"
    )
    with only_json(as_json) as stream:
        opened = Bank.open(bank)
        rows = opened.export(target or stream.buffer, chosen, defaults.lexicon_for(opened.manifest))
        stream.flush()  # before the rows are said to be there
        if as_json:
            print_json({"rows": rows, "out": str(target), "format": chosen}, stream)
    note(f"{rows:,} rows{f' in {target}' if target else ''}")


def _show(uri: str, found: Mapping[str, Any]) -> None:
    """The same figures for people."""
    console = out()
    counts = [[name, found[name]] for name in ("documents", "passages", "windows")]
    dead = found["dead_letters"]
    counts.append(["dead letters", sum(dead.values()) if isinstance(dead, Mapping) else dead])
    book = found["codebook"]
    counts += [[f"codebook {name}", book[name]] for name in ("version", "K", "T", "used", "perplexity", "resets")]
    counts.append(["adapter", found["adapter"]])
    console.print(table(f"Bank {uri}", ["", ""], counts))
    console.print(
        table("Bytes", ["part", "size"], [[name, bytes_for_people(size)] for name, size in found["bytes"].items()])
    )
    per = found["bytes_per_passage"]
    console.print(
        table("Bytes a passage", ["part", "bytes"], [[name.replace("_", " "), size] for name, size in per.items()])
    )
    if "ok" in found:
        for problem in found["problems"]:
            console.print(f"problem: {problem}", markup=False)
        for line in found["information"]:
            console.print(f"note: {line}", markup=False)
        console.print("verified: every file matches its digest and the counts add up" if found["ok"] else "NOT ok")
