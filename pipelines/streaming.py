"""The live form of the main job: a watched folder, bucket prefix or Pub/Sub subscription → codes in a bank.

    python -m pipelines.ingest inbox/ --bank my-bank --streaming
    python -m pipelines.ingest pubsub://projects/P/subscriptions/S --bank my-bank --streaming \\
        --event-time-attribute=published

Documents are windowed by event time; a window is committed when the watermark passes its end, and again for each
batch of documents that comes later. The stream goes on until it is asked to end (SIGTERM, Ctrl-C) or has been idle for
``--idle-exit``: then no source is read any further, every open window is committed, and the counts are printed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from mbc_core.bank import Bank
from mbc_core.bank.replay import PER_WINDOW
from mbc_core.errors import UsageError
from pipelines.graph import run
from pipelines.ingest import counted, not_all_in_the_ledger, total_of
from pipelines.live import STREAM_RUNNER, Drain, SourceCounts, registered
from pipelines.opening import job_of, open_bank
from pipelines.options import IngestSettings, StreamSettings
from pipelines.progress import ENCODED
from pipelines.pubsub import SCHEME, ReadMessages, check_subscription, subscription_of
from pipelines.records import Tally
from pipelines.staging import staging_folder
from pipelines.stream_graph import StreamIngest, StreamPlan
from pipelines.stream_progress import FIGURES, CountCommits, CountRecords, stream_report, tell
from pipelines.watch import FileStream, WatchRule, check_watched

_LOCAL = ("", "directrunner", STREAM_RUNNER.lower())


def stream(
    sources: Sequence[str],
    bank: str,
    settings: IngestSettings | None = None,
    streaming: StreamSettings | None = None,
    *,
    beam_args: Sequence[str] = (),
    show_progress: bool | None = None,
    say: Callable[[str], None] = tell,
    drain: Drain | None = None,
) -> dict[str, Any]:
    """Ingest from sources that go on, until asked to end; call it in the main thread to have signals end it.

    Args:
        sources: folders, globs, files, ``s3://…``, ``gs://…``; or one ``pubsub://projects/P/subscriptions/S``.
        bank: local path, ``s3://…`` or ``gs://…``; made when there is none.
        settings: as for a batch run. streaming: what only a stream has.
        beam_args: Beam's options. show_progress: on standard error; None shows it on terminals only.
        say: gets lines for people. drain: another way to end it, for programs.

    Returns:
        The keys of ``schemas.results.IngestResult``: counts of this ingest id (restarts under it included), from the
        ledger; and ``documents_in, dead_letters_by_reason, left``: files that were still being written.

    Raises:
        UsageError: sources or settings that cannot be. StorageError: something may not be read or written.
        MbcError: counts that do not add up, and other errors of the family.
    """
    began = time.monotonic()
    settings, streaming, drain = settings or IngestSettings(), streaming or StreamSettings(), drain or Drain()
    subscription = _check(sources, streaming)
    options, local = _options(beam_args, subscription is not None)
    with draining(drain) if local else nullcontext():  # from the start: a model takes a while to load
        opened = open_bank(bank, settings)
        ingest_id = settings.ingest_id or _derived_id(sources, settings)
        plan = StreamPlan(job_of(opened, settings), ingest_id, streaming.allowed_lateness)
        before = _ledger(opened.bank, ingest_id)
        pipeline = beam.Pipeline(options=options)
        counts = None
        if local:
            counts = _run_locally(pipeline, plan, sources, subscription, settings, streaming, show_progress, say, drain)
        else:
            _build(pipeline, ReadMessages(str(subscription), streaming.event_time_attribute), plan)
            run(pipeline)
        return _result(opened.bank, ingest_id, before, counts, time.monotonic() - began)


def _check(sources: Sequence[str], streaming: StreamSettings) -> str | None:
    """The subscription, if the source is one; what cannot be is refused."""
    messages = [one for one in sources if one.startswith(SCHEME)]
    if not sources:
        raise UsageError("no source was given", fix="name a folder, a bucket prefix or pubsub://…")
    if messages and len(sources) > 1:
        raise UsageError(
            "a Pub/Sub subscription must be the only source",
            value=list(sources),
            cause="folders and subscriptions keep time differently",
            fix="run one stream for each, into the same bank",
        )
    if messages:
        subscription = subscription_of(messages[0])
        check_subscription(subscription)
        return subscription
    if streaming.event_time_attribute is not None:
        raise UsageError(
            "files have no event-time attribute",
            value=streaming.event_time_attribute,
            cause="--event-time-attribute names an attribute of Pub/Sub messages",
            fix="leave it out: the documents' own `timestamp` is used",
        )
    check_watched(sources)
    return None


def _options(beam_args: Sequence[str], messages: bool) -> tuple[PipelineOptions, bool]:
    """Beam's options, and whether this process runs the pipeline itself."""
    options = PipelineOptions([*beam_args, "--streaming"])
    runner = (options.view_as(StandardOptions).runner or "").rpartition(".")[2]
    if runner.lower() in _LOCAL:
        rest = [one for one in beam_args if not one.startswith("--runner")]
        return PipelineOptions([*rest, f"--runner={STREAM_RUNNER}", "--streaming"]), True
    if runner.lower() == "fnapirunner" or not messages:
        raise UsageError(
            "this runner cannot run this stream",
            value=runner,
            cause="it fires no window before the end" if messages else "folders are watched by the local runner only",
            fix="leave out --runner" + ("" if messages else ", or have the store notify a Pub/Sub topic"),
        )
    return options, False


def _derived_id(sources: Sequence[str], settings: IngestSettings) -> str:
    """The same sources are the same stream after a restart: it goes on where it stopped."""
    places = [one if "://" in one else str(Path(one).absolute()) for one in sources]
    replay = PER_WINDOW if settings.replay_per_window is None else settings.replay_per_window
    told = "\n".join([*sorted(places), str(settings.keep_text), str(replay)])
    return f"stream-{hashlib.blake2b(told.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()}"


# ------------------------------------------------------------------------------------------------------------ running


def _build(pipeline: beam.Pipeline, read: beam.PTransform, plan: StreamPlan) -> None:
    """The whole graph: source, counts for people, and the streaming graph."""
    (
        pipeline
        | "ReadStream" >> read
        | "CountRecords" >> CountRecords(plan.window_seconds)
        | "StreamIngest" >> StreamIngest(plan)
        | "CountCommits" >> CountCommits()
    )


def _run_locally(
    pipeline: beam.Pipeline,
    plan: StreamPlan,
    sources: Sequence[str],
    subscription: str | None,
    settings: IngestSettings,
    streaming: StreamSettings,
    show_progress: bool | None,
    say: Callable[[str], None],
    drain: Drain,
) -> SourceCounts:
    """Run until the source ends; returns what it counted."""
    with ExitStack() as stack:
        if subscription is None:
            folder = stack.enter_context(staging_folder(settings.staging))
            rule = WatchRule(streaming.poll, streaming.idle_exit)
            files = FileStream(sources, rule, folder, drain, say)
            counts = files.counts
            _build(pipeline, stack.enter_context(registered(files)), plan)
        else:
            from pipelines.pubsub_local import MessageStream, drainable

            messages = MessageStream(plan.window_seconds, streaming.idle_exit, drain, say)
            counts = messages.counts
            _build(pipeline, ReadMessages(subscription, streaming.event_time_attribute), plan)
            stack.enter_context(drainable(pipeline, messages))
        FIGURES.reset()
        ENCODED.set(0)
        stack.enter_context(stream_report(show_progress, counts, say))
        run(pipeline)
    if counts.left:
        say(f"left for the next run, still being written or not read yet: {', '.join(counts.left[:10])}")
    return counts


_TOLD = (
    b"asked to end: reading what was found and committing every open window; ask again to leave what is not read yet\n",
    b"asked again to end: committing what is on its way\n",
)


@contextmanager
def draining(drain: Drain) -> Iterator[None]:
    """SIGTERM and SIGINT ask for the end, the second one for a quicker one; a third SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if drain.level == 2 and number == signal.SIGINT:
            raise KeyboardInterrupt
        os.write(2, _TOLD[drain.ask() - 1])  # print could be interrupted in itself

    known = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in known.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------ results


def _ledger(bank: Bank, ingest_id: str) -> list[dict[str, Any]]:
    return [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == ingest_id]


def _result(
    bank: Bank, ingest_id: str, before: list[dict[str, Any]], counts: SourceCounts | None, seconds: float
) -> dict[str, Any]:
    """The counts of this stream, from the ledger; they must add up to what was handed on."""
    rows = _ledger(bank, ingest_id)
    total = total_of(rows)
    if counts is not None:
        _require_all(total, counts.records, total_of(before))
    now = total.documents - total_of(before).documents
    return {
        **counted(bank, ingest_id, rows, total, now, seconds),
        "left": [] if counts is None else list(counts.left),
    }


def _require_all(total: Tally, records: int, before: Tally) -> None:
    """Every record that the source handed on is in the ledger; after a restart some were counted before."""
    held = total.documents_in - before.documents_in
    if held > records or (held < records and not before.documents_in):
        raise not_all_in_the_ledger(records, held)
