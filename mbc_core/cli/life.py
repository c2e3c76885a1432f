"""`mbc forget` and `mbc compact`: what a bank no longer holds, and how it is kept small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mbc_core.cli.options import Duration, bank_option, json_option
from mbc_core.cli.output import bytes_for_people, note, only_json, out, print_json, table
from mbc_core.errors import UsageError
from schemas.results import CompactResult, ForgetResult


class Age(Duration):
    """A duration, or 0."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or fail as wrong use."""
        return 0 if str(value).strip() == "0" else super().convert(value, param, ctx)


@click.command()
@click.argument("doc_ids", nargs=-1, metavar="DOC_ID...")
@bank_option
@click.option(
    "--ids-file",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="A file of ids, one a line, or JSON Lines with `id`; - for standard input.",
)
@json_option
def forget(doc_ids: tuple[str, ...], bank: str, ids_file: Path | None, as_json: bool) -> None:
    """Remove documents for good: from every table, log, dead letter and index, and from what waits to be learnt.

    Their ids are refused from now on; a receipt names the codebooks and adapters made while they were there. Killed
    on the way, the same command finishes it.

    Example: mbc forget article-17 article-18 --bank my-bank
    """
    from mbc_core.bank import Bank

    ids = [*doc_ids, *([] if ids_file is None else _ids_of(ids_file))]
    if not ids:
        raise click.UsageError("Give ids of documents, or --ids-file FILE.")
    with only_json(as_json) as stream:
        found = Bank.open(bank).forget(ids, None if as_json else note)
        if as_json:
            print_json(found, stream)
            return
    _show_forgotten(found)


@click.command()
@bank_option
@click.option(
    "--history",
    type=Age(),
    default="30d",
    show_default=True,
    help="How long superseded revisions are kept for --as-of.",
)
@click.option(
    "--safe-age",
    type=Age(),
    default="1d",
    show_default=True,
    help="How old a file that nothing refers to must be before it is deleted. Less only while nothing else writes.",
)
@json_option
def compact(bank: str, history: int, safe_age: int, as_json: bool) -> None:
    """Merge small files, drop revisions that were superseded before the history, delete what nothing refers to.

    Safe beside a running ingest, ask or adapt; what was interrupted is finished by the next run.

    Example: mbc compact --bank my-bank --history 30d
    """
    from mbc_core.bank import Bank
    from mbc_core.bank.compact import compact as run

    with only_json(as_json) as stream:
        found = run(Bank.open(bank), history=history, safe_age=safe_age, say=None if as_json else note)
        if as_json:
            print_json(found, stream)
            return
    _show_compacted(found)


def _ids_of(file: Path) -> list[str]:
    try:
        text = (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the ids cannot be read", value=str(file), cause=str(error), fix="name a text file in UTF-8, one id a line"
        ) from error
    # Not splitlines: ids and JSON may hold other characters that it takes for the end of a line.
    return [_id_of(line.strip()) for line in text.split("\n") if line.strip()]


def _id_of(line: str) -> str:
    """A line as it is, or the field `id` (`doc_id`) of a JSON object."""
    if not line.startswith("{"):
        return line
    try:
        fields = json.loads(line)
        found = fields.get("id", fields.get("doc_id"))
    except ValueError:
        return line  # an id may begin with a brace
    if found is None:
        raise UsageError("a line of the ids has no `id`", value=line, cause="it is an object without", fix="add it")
    return str(found)


def _show_forgotten(found: ForgetResult) -> None:
    console = out()
    console.print(f"{found['forgotten']:,} documents forgotten, {found['not_found']:,} not found")
    if found["not_found"]:
        note("ids that were not found are refused from now on, too")
    console.print(f"receipt {found['receipt']}", markup=False)


def _show_compacted(found: CompactResult) -> None:
    before, after = found["before"], found["after"]
    rows = [["files", f"{before['files']:,}", f"{after['files']:,}"]]
    for part, size in before["parts"].items():
        now = after["parts"][part]  # type: ignore[literal-required]
        rows.append([part, bytes_for_people(float(str(size))), bytes_for_people(float(str(now)))])
    console = out()
    console.print(table(None, ["", "before", "after"], rows))
    dropped = sum(found["dropped"].values())
    console.print(
        f"{found['merged']:,} files merged into {found['shards']:,}; {dropped:,} superseded rows dropped;"
        f" {found['swept']:,} leftover files deleted; {found['seconds']:.1f} s"
    )
