# ruff: noqa: ANN401, B008 - how Beam names state and timers: in the defaults of arguments, without a type
"""The streaming graph: the batch graph's steps over event-time windows, committed window by window as they end.

    records → judge lateness → window → encode → gather a window's pane → wait for the window's turn → quantize, commit

A record is a :class:`~schemas.document.Document` or a :class:`~pipelines.readers.Rejected`. A window's first pane
fires when the watermark passes its end; what comes later, up to the allowed lateness, makes panes of its own, each
with its file and commit. What comes later still is a dead letter with its reason.

Which codebook a window uses depends on what the windows before it showed, and what it shows on the codebook it was
quantized with. A graph cannot hold that circle, so it lives in one step with state: panes wait there until the
watermark has passed their end, and are then taken in the order of their windows, each choosing its version, adding
its statistics to the chain, and committing. So the decision that a window needs always exists when its turn comes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam import pvalue
from apache_beam.coders import VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.trigger import AccumulationMode, AfterCount, AfterWatermark
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import FixedWindows, GlobalWindows, IntervalWindow, TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import PaneInfo, WindowedValue

from mbc_core.bank.latest import Standing
from mbc_core.windows import window_order
from pipelines.graph import Job
from pipelines.lateness import JudgeLateness, too_late_letters
from pipelines.plan import rejected_rows
from pipelines.read import BATCH_CHARACTERS, BATCH_DOCUMENTS
from pipelines.readers import Record, Rejected
from pipelines.records import DeadLetters, DocumentBatch, EncodedBatch, stable_hash
from pipelines.refused import forgotten_rows
from pipelines.stream_records import (
    KNOWN_ROWS,
    Arrived,
    StreamPart,
    WindowPane,
    WindowPaneCoder,
    arrived_rows,
    document_to_bytes,
)
from pipelines.stream_sink import opened
from pipelines.transforms import Encode
from pipelines.windows import window_of
from schemas.document import document_from_bytes

PCollection = beam.PCollection

_FOR_EVER = 100 * 366 * 86_400
"""Seconds for which the grouping takes late documents: lateness has been judged before it."""


@dataclass(frozen=True)
class StreamPlan:
    """What the streaming graph needs to know; the length of a window is the bank's.

    Attributes:
        job: bank, encoder, rotation, rules and shards, as a batch run has them.
        ingest_id: names the stream; under the same name it goes on after a restart.
        allowed_lateness_seconds: how long after its end a window takes documents; None: for ever.
    """

    job: Job
    ingest_id: str
    allowed_lateness_seconds: int | None = 0

    @property
    def window_seconds(self) -> int:
        """Length of a window."""
        return self.job.bank.manifest.window_seconds


class StreamIngest(beam.PTransform):
    """Records with event-time timestamps → commits to a bank, each window when it ends; gives the commits' names.

    A document that has a date is windowed by it, one without by its timestamp in the stream, as are rejected records.
    Plain twin: :meth:`pipelines.stream_sink.PaneCommitter.commit_window`, for what follows the grouping.

    Args:
        plan: where to, and how.

    Example:
        ``committed = records | StreamIngest(StreamPlan(job, "feed", allowed_lateness_seconds=3_600))``
    """

    def __init__(self, plan: StreamPlan) -> None:
        super().__init__()
        self.plan, self.life = plan, uuid.uuid4().hex

    def expand(self, pcoll: PCollection[Record]) -> PCollection[str]:
        """Judge, window, encode, gather, commit."""
        plan, job = self.plan, self.plan.job
        stamped = pcoll | "StampRecords" >> (
            beam.ParDo(_StampDoFn(job.bank.manifest.salt, job.shards))
            .with_output_types(tuple[int, bytes], rejected=tuple[int, StreamPart])
            .with_outputs("rejected", main="documents")
        )
        in_time, too_late = stamped.documents, []
        if plan.allowed_lateness_seconds is not None:
            judged = stamped.documents | "JudgeLateness" >> JudgeLateness(
                plan.window_seconds, plan.allowed_lateness_seconds
            )
            in_time = judged.in_time
            letters = judged.too_late | "TooLate" >> beam.ParDo(_TooLateDoFn(plan)).with_output_types(
                tuple[int, StreamPart]
            )
            too_late = [letters | "WindowTooLate" >> self._windows()]
        batches = (
            in_time
            | "Window" >> self._windows()
            | "BatchDocuments"
            >> (
                beam.ParDo(_BatchDoFn(plan, self.life))
                .with_output_types(DocumentBatch, settled=tuple[int, StreamPart])
                .with_outputs("settled", main="new")
            )
        )
        encoded = batches.new | "Encode" >> Encode(job.encoder, job.rule)
        parts = [
            encoded.batches | "PartOfBatch" >> _part(_part_of_batch, job.shards),
            encoded.dead_letters | "PartOfDeadLetters" >> _part(_part_of_letters, job.shards),
            batches.settled,
            stamped.rejected | "WindowRejected" >> self._windows(),
            *too_late,
        ]
        panes = (
            parts
            | "Parts" >> beam.Flatten()
            | "GatherPane" >> beam.GroupByKey()
            | "NamePane" >> beam.ParDo(_NamePaneDoFn(plan.window_seconds)).with_output_types(WindowPane)
        )
        return (
            panes
            | "OneTimeline" >> beam.WindowInto(GlobalWindows())
            | "OneKey" >> beam.WithKeys(0).with_output_types(tuple[int, WindowPane])
            | "CommitWindows" >> beam.ParDo(_CommitWindowsDoFn(plan, self.life)).with_output_types(str)
        )

    def _windows(self) -> beam.WindowInto:
        return beam.WindowInto(
            FixedWindows(self.plan.window_seconds),
            trigger=AfterWatermark(late=AfterCount(1)),
            accumulation_mode=AccumulationMode.DISCARDING,
            allowed_lateness=_FOR_EVER,
        )


def _part(make: Any, shards: int) -> beam.PTransform:
    return beam.Map(make, shards=shards).with_output_types(tuple[int, StreamPart])


def _shard_of(key: int, shards: int) -> int:
    return 0 if shards == 1 else stable_hash(b"shard", int(key).to_bytes(8, "little", signed=True)) % shards


def _part_of_batch(batch: EncodedBatch, shards: int) -> tuple[int, StreamPart]:
    return _shard_of(batch.documents["key"][0].as_py(), shards), StreamPart(batches=(batch,))


def _part_of_letters(letters: DeadLetters, shards: int) -> tuple[int, StreamPart]:
    return _shard_of(letters.rows["key"][0].as_py(), shards), StreamPart(letters=(letters,))


class _TooLateDoFn(beam.DoFn):
    def __init__(self, plan: StreamPlan) -> None:
        self._salt = plan.job.bank.manifest.salt
        self._rule = plan.window_seconds, plan.allowed_lateness_seconds or 0

    def process(
        self, element: tuple[int, bytes], timestamp: Timestamp = beam.DoFn.TimestampParam
    ) -> Iterator[tuple[int, StreamPart]]:
        letters = too_late_letters(element[1], self._salt, *self._rule, timestamp.micros)
        yield element[0], StreamPart(letters=(letters,))


class _StampDoFn(beam.DoFn):
    """Records by kind; documents by shard and with the time that their window follows from."""

    def __init__(self, salt: bytes, shards: int) -> None:
        self._salt, self._shards = salt, shards

    def process(self, element: Record) -> Iterator[TimestampedValue | pvalue.TaggedOutput]:
        if isinstance(element, Rejected):
            letters = DeadLetters(rejected_rows([element], self._salt))
            yield pvalue.TaggedOutput("rejected", (0, StreamPart(letters=(letters,))))
            return
        moved = (_shard_of(element.key(self._salt), self._shards), document_to_bytes(element))
        yield moved if element.event_time is None else TimestampedValue(moved, Timestamp(micros=element.event_time))


class _BatchDoFn(beam.DoFn):
    """Documents in batches, one window and shard each, as long as a bundle lasts; known ones need no encoder."""

    def __init__(self, plan: StreamPlan, life: str) -> None:
        self._plan, self._life = plan, life
        self._manifest = plan.job.bank.manifest

    def setup(self) -> None:
        self._committer = opened(self._plan, self._life)

    def start_bundle(self) -> None:
        self._held: dict[tuple[IntervalWindow, int], dict[int, Arrived]] = {}
        self._characters: dict[tuple[IntervalWindow, int], int] = {}

    def process(
        self,
        element: tuple[int, bytes],
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        window: IntervalWindow = beam.DoFn.WindowParam,
    ) -> Iterator[DocumentBatch | pvalue.TaggedOutput]:
        shard, data = element
        document = document_from_bytes(data)
        place, key = (window, shard), document.key(self._manifest.salt)
        if key in self._held.get(place, ()):  # no id twice in a batch: its passages could not be told apart
            yield from self._release(place)
        self._held.setdefault(place, {})[key] = Arrived.of(document, timestamp.micros)
        self._characters[place] = self._characters.get(place, 0) + len(document.text)
        if len(self._held[place]) >= BATCH_DOCUMENTS or self._characters[place] >= BATCH_CHARACTERS:
            yield from self._release(place)

    def finish_bundle(self) -> Iterator[WindowedValue | pvalue.TaggedOutput]:
        for place in list(self._held):
            for output in self._release(place):
                tagged = isinstance(output, pvalue.TaggedOutput)
                value = WindowedValue(output.value if tagged else output, place[0].max_timestamp(), [place[0]])
                yield pvalue.TaggedOutput(output.tag, value) if tagged else value

    def _release(self, place: tuple[IntervalWindow, int]) -> Iterator[DocumentBatch | pvalue.TaggedOutput]:
        held = list(self._held.pop(place, {}).values())
        self._characters.pop(place, None)
        if not held:
            return
        rows = arrived_rows(held, self._manifest.salt, self._manifest.window_seconds)
        standing = self._committer.judge_arrived(rows)
        known, gone = standing == Standing.DUPLICATE, standing == Standing.FORGOTTEN
        shown = rows.filter(pa.array(known)).select(KNOWN_ROWS.names)
        refused = forgotten_rows(rows["window"].filter(pa.array(gone)).to_pylist())
        part = StreamPart(
            known=(shown,) if shown.num_rows else (), letters=(DeadLetters(refused),) if refused.num_rows else ()
        )
        if part.known or part.letters:
            yield pvalue.TaggedOutput("settled", (place[1], part))
        if not (known | gone).all():
            yield DocumentBatch(rows.filter(pa.array(~(known | gone))))


class _NamePaneDoFn(beam.DoFn):
    """One pane of one shard, with the number that the grouping gave it."""

    def __init__(self, window_seconds: int) -> None:
        self._window_seconds = window_seconds

    def process(
        self,
        element: tuple[int, Iterable[StreamPart]],
        window: IntervalWindow = beam.DoFn.WindowParam,
        pane: PaneInfo = beam.DoFn.PaneInfoParam,
    ) -> Iterator[WindowPane]:
        shard, parts = element
        name = window_of(window.start.micros, self._window_seconds)
        yield WindowPane(name, window.end.micros // 1_000_000, shard, pane.index, StreamPart.concat(parts))


class _CommitWindowsDoFn(beam.DoFn):
    """Panes wait here until the watermark has passed their window's end, and are committed in order of the windows."""

    HELD = BagStateSpec("held", WindowPaneCoder())
    """Panes whose turn has not come."""
    NEXT = ReadModifyWriteStateSpec("next", VarIntCoder())
    """The earliest of their windows' ends, seconds since the epoch: what the timer waits for."""
    END = TimerSpec("window_end", TimeDomain.WATERMARK)

    def __init__(self, plan: StreamPlan, life: str) -> None:
        self._plan, self._life = plan, life

    def setup(self) -> None:
        self._committer = opened(self._plan, self._life)

    def process(
        self,
        element: tuple[int, WindowPane],
        held: Any = beam.DoFn.StateParam(HELD),
        next_end: Any = beam.DoFn.StateParam(NEXT),
        end: Any = beam.DoFn.TimerParam(END),
    ) -> Iterator[str]:
        held.add(element[1])
        awaited = next_end.read()
        if awaited is None or element[1].end < awaited:
            next_end.write(element[1].end)
            end.set(Timestamp(seconds=element[1].end))
        yield from ()

    @on_timer(END)
    def commit(
        self,
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        held: Any = beam.DoFn.StateParam(HELD),
        next_end: Any = beam.DoFn.StateParam(NEXT),
        end: Any = beam.DoFn.TimerParam(END),
    ) -> Iterator[str]:
        """Commit every window that has ended."""
        due: dict[str, list[WindowPane]] = {}
        later: list[WindowPane] = []
        for pane in held.read():
            if pane.end * 1_000_000 <= timestamp.micros:
                due.setdefault(pane.window, []).append(pane)
            else:
                later.append(pane)
        held.clear()
        next_end.clear()
        for pane in later:
            held.add(pane)
        if later:
            next_end.write(min(pane.end for pane in later))
            end.set(Timestamp(seconds=min(pane.end for pane in later)))
        for window in sorted(due, key=window_order):
            yield from self._committer.commit_window(due[window])
