"""`mbc migrate`: a bank made anew with this release's encoder, another profile, or a fresh codebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from mbc_core.cli.options import bank_option, device_option, json_option, profile_option
from mbc_core.cli.output import note, only_json, out, print_json


@click.command()
@bank_option
@click.option("--to", required=True, metavar="URI", help="Where the new bank goes; nothing may be there yet.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="File, folder or glob with the documents' texts; may be given several times. Not needed for documents whose"
    " text the bank holds (`mbc ingest --keep-text`).",
)
@profile_option
@click.option("--keep-text", is_flag=True, help="Store the texts in the new bank too; as the old bank does by default.")
@device_option
@json_option
def migrate(
    bank: str, to: str, sources: tuple[str, ...], profile: str | None, keep_text: bool, device: str, as_json: bool
) -> None:
    """Make a bank anew: every document's newest revision, encoded again.

    For another encoder, profile or codebook, and for a bank whose 64 codebook versions are used up. Documents keep
    their keys and event times; what was forgotten stays forgotten. The old bank is only read. Interrupted, the same
    command goes on from where it stopped.

    Example: mbc migrate --bank my-bank --to my-bank-2 --source documents.jsonl
    """
    with only_json(as_json) as stream:
        from pipelines.migrate import run_migrate
        from pipelines.options import IngestSettings

        settings = IngestSettings(profile=profile, keep_text=keep_text, device=device)
        result = run_migrate(bank, to, sources, settings)
        if as_json:
            print_json(result, stream)
            return
    _show(result, to)


def _show(result: Mapping[str, Any], to: str) -> None:
    """Counts that add up."""
    out().print(
        f"{result['documents']:,} documents = {result['from_sources']:,} from their sources + {result['changed']:,}"
        f" whose source has changed + {result['from_text']:,} from the bank's own texts"
    )
    out().print(
        f"{result['passages']:,} passages in {to}; {result['dead_letters']:,} dead letters; {result['tombstones']:,}"
        f" tombstones carried over; {result['seconds']:.1f} s"
    )
    if result["not_in_bank"]:
        note(
            f"{result['not_in_bank']:,} other records of the sources were left alone; ingest the sources to add them:"
            f" mbc ingest SOURCE --bank {to}"
        )
