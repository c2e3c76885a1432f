"""`mbc ingest`: the same job as ``python -m pipelines.ingest``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console

from mbc_core.cli.options import bank_option, device_option, json_option, profile_option, window_option
from mbc_core.cli.output import note, only_json, out, print_json, table

INGEST_HELP = """Read documents into a bank: encode, quantize, update the codebook, write.

SOURCE is a file (.jsonl, .parquet or .csv; .gz and .zst too), a folder or glob of .txt and .md, an s3:// or gs://
address, or - for JSON Lines on standard input. The same sources again go on where an interrupted run stopped; a
document that is there already is counted as a duplicate, one whose content changed becomes a new revision.

Example: mbc ingest documents.jsonl notes/ --bank my-bank

With --streaming the sources are watched until SIGTERM, Ctrl-C or --idle-exit; then every open window is committed, and
the counts are printed. A folder or prefix: each new or changed file is read once it is whole (names that start with .
or _ or end in .tmp or .part are left alone). Or pubsub://projects/P/subscriptions/S: one JSON document a message; it is
acknowledged when its window has been committed.

Example: mbc ingest inbox/ --bank my-bank --streaming --window 1h
"""


@click.command(help=INGEST_HELP)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@bank_option
@profile_option
@window_option
@click.option("--ingest-id", help="Name of this run; a run of the same name goes on where it stopped.")
@click.option("--keep-text", is_flag=True, help="Also store each document's text, compressed; off by default.")
@click.option(
    "--replay-per-window",
    type=click.IntRange(1),
    help="Most questions of a window that are kept for `mbc adapt`. The bank's own, or 256.",
)
@click.option(
    "--replay-lifetime",
    metavar="LENGTH",
    help="How long they are kept, like 90d, or never. The bank's own, or 365d.",
)
@click.option("--no-replay", is_flag=True, help="Keep no questions of these documents.")
@click.option("--streaming", is_flag=True, help="Watch the sources until SIGTERM, Ctrl-C or --idle-exit.")
@click.option("--poll", metavar="LENGTH", help="Streaming: time between two looks at a folder (5s).")
@click.option(
    "--allowed-lateness",
    metavar="LENGTH",
    help="Streaming: how long after its end a window takes documents; later ones are dead letters (no limit).",
)
@click.option("--idle-exit", metavar="LENGTH", help="Streaming: end after so long without anything new (never).")
@click.option(
    "--event-time-attribute",
    metavar="NAME",
    help="Streaming: the attribute of Pub/Sub messages that holds the event time (RFC 3339, or milliseconds).",
)
@device_option
@json_option
def ingest(
    sources: tuple[str, ...],
    bank: str,
    profile: str | None,
    window_seconds: int | None,
    ingest_id: str | None,
    keep_text: bool,
    replay_per_window: int | None,
    replay_lifetime: str | None,
    no_replay: bool,
    streaming: bool,
    poll: str | None,
    allowed_lateness: str | None,
    idle_exit: str | None,
    event_time_attribute: str | None,
    device: str,
    as_json: bool,
) -> None:
    """See INGEST_HELP."""
    with only_json(as_json) as stdout:
        from pipelines.options import (
            STREAM_OPTIONS,
            IngestSettings,
            refuse_without_streaming,
            replay_settings,
            stream_settings,
        )

        per_window, lifetime = replay_settings(replay_per_window, replay_lifetime, no_replay)
        settings = IngestSettings(
            profile=profile,
            window_seconds=window_seconds,
            ingest_id=ingest_id,
            keep_text=keep_text,
            replay_per_window=per_window,
            replay_lifetime=lifetime,
            device=device,
        )
        told = (poll, allowed_lateness, idle_exit, event_time_attribute)
        if streaming:
            from pipelines.streaming import stream

            result = stream(sources, bank, settings, stream_settings(*told), say=note)
        else:
            from pipelines.ingest import run_ingest

            refuse_without_streaming(dict(zip(STREAM_OPTIONS, told, strict=True)))
            result = run_ingest(sources, bank, settings)
        if as_json:
            print_json(result, stdout)
            return
    show_ingest(result, out())


def show_ingest(result: Mapping[str, Any], console: Console) -> None:
    """Counts that add up."""
    parts = ("documents", "duplicates", "replaced", "dead_letters")
    total = result.get("documents_in", sum(result[name] for name in parts))
    console.print(
        f"{total:,} documents in = {result['documents']:,} ingested + {result['duplicates']:,} duplicates"
        f" + {result['replaced']:,} replaced + {result['dead_letters']:,} dead letters"
    )
    console.print(
        f"{result['passages']:,} passages in {result['windows']:,} windows; codebook version"
        f" {result['codebook_version']}; {result['seconds']:.1f} s, {result['documents_per_second']:.1f} documents/s"
    )
    console.print(f"ingest id {result['ingest_id']}")
    by_reason = result.get("dead_letters_by_reason") or {}
    if by_reason:
        console.print(table("Dead letters", ["reason", "documents"], [list(item) for item in by_reason.items()]))
    if result.get("slices_skipped"):
        note(f"{result['slices_skipped']} slices were there already from an earlier run of this ingest id")
