"""Streams for tests: steps written out, run live by the runner that users get."""

from __future__ import annotations

import json
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import TimestampedValue
from oracle import empty_bank
from tiny import RULE, TinySpec, rotation, settings

from mbc_core.bank.replay import set_policy
from pipelines.graph import Job
from pipelines.plain import EncodeRule
from pipelines.stream_graph import StreamIngest, StreamPlan
from schemas.document import Document

DAY = 86_400
LIVE = ["--runner=DirectRunner", "--streaming"]
COUNTS = ("documents_in", "documents", "duplicates", "replaced")


@dataclass(frozen=True)
class Watermark:
    """The watermark moves here (seconds)."""

    seconds: float


@dataclass(frozen=True)
class At:
    """A record that arrives with this timestamp (seconds)."""

    seconds: float
    record: object


def day(number: int) -> str:
    """Name of a window of the bank: days from the epoch."""
    return f"1970-01-{number + 1:02d}T00:00:00Z"


def document(name: str, seconds: float | None, text: str = "Some words here.") -> Document:
    time = None if seconds is None else int(seconds * 1_000_000)
    return Document(name, text, title=f"Title {name}", event_time=time)


def plan_of(bank, ingest_id="stream", lateness=0, shards=1, replay=8, rule=RULE, encoder=None) -> StreamPlan:
    job = Job(bank, encoder or TinySpec(), rotation(), EncodeRule(words=24), rule, shards)
    set_policy(bank, replay)
    return StreamPlan(job, ingest_id, lateness)


def new_bank(folder, name="bank"):
    return empty_bank(folder / name, settings(folder / "w"))


def stream_of(steps) -> TestStream:
    """Documents arrive at their own time, others as :class:`At` says; each list of records is one bundle."""
    stream = TestStream()
    for step in steps:
        if isinstance(step, Watermark):
            stream = stream.advance_watermark_to(step.seconds)
            continue
        records = step if isinstance(step, list) else [step]
        stream = stream.add_elements([_stamped(one) for one in records])
    return stream.advance_watermark_to_infinity()


def run(steps, plan: StreamPlan) -> None:
    """Run the streaming graph over a written-out stream, to its end."""
    pipeline = beam.Pipeline(options=PipelineOptions(LIVE))
    _ = pipeline | stream_of(steps) | StreamIngest(plan)
    pipeline.run().wait_until_finish()


def _stamped(record):
    if isinstance(record, At):
        return TimestampedValue(record.record, record.seconds)
    return TimestampedValue(record, record.event_time / 1_000_000)


def panes(bank, ingest_id="stream"):
    """(slice, pane, window) → {counts that are not 0, dead letters by reason}, from the ledger."""
    found = {}
    for row in bank.read("ledger").to_pylist():
        if row["ingest_id"] == ingest_id:
            counts = {name: row[name] for name in COUNTS if row[name]}
            place = row["slice"], row["pane"], row["window"]
            assert place not in found
            found[place] = counts | json.loads(row["dead_letters"])
    return found


def stored(bank):
    """(doc_id, window) of every revision that codes show, in no order."""
    codes = bank.read("codes", ["key", "added_at", "window"]).to_pylist()
    ids = {(row["key"], row["added_at"]): row["doc_id"] for row in bank.read("documents").to_pylist()}
    return sorted({(ids[row["key"], row["added_at"]], row["window"]) for row in codes})
