# ruff: noqa: ANN401, B008 - how Beam names state and timers: in the defaults of arguments, without a type
"""Which documents come too late: judged before any grouping, so that the reason can be told.

A runner drops what comes after its window has closed without a word. So the grouping behind this step never closes a
window, and here each document is compared with how far the watermark has come: a timer is set for the moment each
window closes (its end and the allowed lateness), and what arrives for a closed window goes out as a dead letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam import pvalue
from apache_beam.coders import VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.utils.timestamp import Timestamp

from pipelines.readers import MAX_RAW_BYTES
from pipelines.records import DEAD_LETTER_ROWS, DeadLetters
from pipelines.windows import window_of
from schemas.document import document_from_bytes

PCollection = beam.PCollection

TOO_LATE = "too_late"
"""Reason of the dead letters, and name of the output."""

_MOST_STEPS = 64
"""Windows without documents whose closing is looked out for, before one that has some."""

_MICROS = 1_000_000


class Lateness(NamedTuple):
    """Output of :class:`JudgeLateness`: documents by shard, as they came in."""

    in_time: PCollection[tuple[int, bytes]]
    too_late: PCollection[tuple[int, bytes]]


class JudgeLateness(beam.PTransform):
    """(shard, document) with event-time timestamps → those whose window is still open, and those that come too late.

    Whether a window has closed is known from the documents seen: the closing of a window that no document of this
    shard was in or after is not noticed, and a document of such a window is in time.

    Args:
        window_seconds: length of a window. allowed_seconds: how long after its end a window takes documents.

    Example:
        ``judged = documents | JudgeLateness(window_seconds=86_400, allowed_seconds=3_600)``
    """

    def __init__(self, window_seconds: int, allowed_seconds: int) -> None:
        super().__init__()
        self.window_seconds, self.allowed_seconds = window_seconds, allowed_seconds

    def expand(self, pcoll: PCollection[tuple[int, bytes]]) -> Lateness:
        """One stateful DoFn in the global window."""
        outputs = pcoll | "CompareWithWatermark" >> (
            beam.ParDo(_LatenessDoFn(self.window_seconds, self.allowed_seconds))
            .with_output_types(tuple[int, bytes])
            .with_outputs(TOO_LATE, main="in_time")
        )
        return Lateness(outputs.in_time, outputs[TOO_LATE])


class _LatenessDoFn(beam.DoFn):
    """Windows are numbered from the epoch. One timer walks over the ends of windows as the watermark passes them."""

    CLOSED = ReadModifyWriteStateSpec("closed", VarIntCoder())
    """The newest window known to be closed; all before it are."""
    NEWEST = ReadModifyWriteStateSpec("newest", VarIntCoder())
    """The newest window that a document was in."""
    NEXT = ReadModifyWriteStateSpec("next", VarIntCoder())
    """The window whose closing the timer waits for."""
    CLOSING = TimerSpec("closing", TimeDomain.WATERMARK)

    def __init__(self, window_seconds: int, allowed_seconds: int) -> None:
        self._length, self._allowed = window_seconds, allowed_seconds

    def process(
        self,
        element: tuple[int, bytes],
        timestamp: Timestamp = beam.DoFn.TimestampParam,
        closed: Any = beam.DoFn.StateParam(CLOSED),
        newest: Any = beam.DoFn.StateParam(NEWEST),
        next_one: Any = beam.DoFn.StateParam(NEXT),
        closing: Any = beam.DoFn.TimerParam(CLOSING),
    ) -> Iterator[tuple[int, bytes] | pvalue.TaggedOutput]:
        window, last_closed = timestamp.micros // (self._length * _MICROS), closed.read()
        if last_closed is not None and window <= last_closed:
            yield pvalue.TaggedOutput(TOO_LATE, element)
            return
        last_seen, awaited = newest.read(), next_one.read()
        if last_seen is None or window > last_seen:
            newest.write(window)
        # The newest window that is closed when the watermark stands where this one begins.
        first = window - min(1 + -(-self._allowed // self._length), _MOST_STEPS)
        first = first if last_closed is None else max(first, last_closed + 1)
        if awaited is None or first < awaited:
            self._wait_for(first, next_one, closing)
        yield element

    @on_timer(CLOSING)
    def close(
        self,
        closed: Any = beam.DoFn.StateParam(CLOSED),
        newest: Any = beam.DoFn.StateParam(NEWEST),
        next_one: Any = beam.DoFn.StateParam(NEXT),
        closing: Any = beam.DoFn.TimerParam(CLOSING),
    ) -> Iterator[tuple[int, bytes]]:
        """A window has closed: wait for the next, as long as documents were seen there."""
        awaited, last_seen, last_closed = next_one.read(), newest.read(), closed.read()
        closed.write(awaited if last_closed is None else max(last_closed, awaited))
        if awaited < last_seen:
            self._wait_for(max(awaited + 1, last_seen - _MOST_STEPS), next_one, closing)
        else:
            next_one.clear()
        yield from ()

    def _wait_for(self, window: int, next_one: Any, closing: Any) -> None:
        next_one.write(window)
        closing.set(Timestamp(seconds=(window + 1) * self._length + self._allowed))


def too_late_letters(data: bytes, salt: bytes, window_seconds: int, allowed_seconds: int, moment: int) -> DeadLetters:
    """The dead letter of a document that came after its window had closed.

    Args:
        data: the document, as JSON. salt: of the bank's manifest.
        moment: microseconds since the epoch: its time in the stream.
    """
    document = document_from_bytes(data)
    window = window_of(moment, window_seconds)
    when = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment)).isoformat().replace("+00:00", "Z")
    row = {
        "window": window,
        "reason": TOO_LATE,
        "message": f"the document of {when} came after its window {window} had closed. Likely cause: it was held up "
        f"for longer than the {allowed_seconds} s that are allowed. Fix: allow more lateness, or ingest it without "
        "streaming.",
        "source": document.uri or "stream",
        "position": 0,
        "key": document.key(salt),
        "raw": data[:MAX_RAW_BYTES],
    }
    return DeadLetters(pa.RecordBatch.from_pylist([row], DEAD_LETTER_ROWS))
