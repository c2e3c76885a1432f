"""Documents that were read but not yet handed on, in order of event time: in memory while few, on disk when many.

A stream that takes a folder of old documents would see them in the order of the files. Handed on by event time,
windows fill one after the other, each can close as soon as the next document is newer, and the watermark is exact:
the time of the oldest document that still waits.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.readers import Record, Rejected
from pipelines.records import QA
from pipelines.staging import staging_errors
from schemas.document import Document

MEMORY_DOCUMENTS = 4_096
MEMORY_CHARACTERS = 32 << 20
"""What waits in memory; beyond that a sorted run is written to the staging folder."""

_RUN_ROWS = 256
_DOCUMENT = ("doc_id", "text", "title", "uri", "event_time")
_REJECTED = ("reason", "message", "source", "position", "raw")
_RUN = pa.schema(
    [
        pa.field("time", pa.int64(), nullable=False),
        pa.field("number", pa.int64(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("doc_id", "text", "title", "uri")),
        pa.field("event_time", pa.int64()),
        pa.field("qa", QA),
        *(pa.field(name, pa.string()) for name in ("reason", "message", "source")),
        pa.field("position", pa.int64()),
        pa.field("raw", pa.binary()),
    ]
)
"""A record on disk: with a ``reason`` it is a rejected one."""


@dataclass(frozen=True, slots=True, order=True)
class Waiting:
    """One record that waits: ordered by its time, then as it was read.

    Attributes:
        time: microseconds since the epoch: the document's own, or its arrival's.
        number: counts up, so that of two revisions with one time the later read comes later.
        record: what waits.
    """

    time: int
    number: int
    record: Record = field(compare=False)

    @property
    def characters(self) -> int:
        """What it weighs, about."""
        return len(self.record.raw) if isinstance(self.record, Rejected) else len(self.record.text)


class Batch:
    """Records that enter a backlog together, or not at all: one file's, which may prove half written at its end.

    Args:
        backlog: what they are for.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self.held: list[Waiting] = []
        self.runs: list[Path] = []
        self.size = 0
        self._characters = 0

    def add(self, time: int, record: Record) -> None:
        """Take one record."""
        waiting = Waiting(time, next(self._backlog.numbers), record)
        self.held.append(waiting)
        self.size += 1
        self._characters += waiting.characters
        if len(self.held) >= MEMORY_DOCUMENTS or self._characters >= MEMORY_CHARACTERS:
            self.runs.append(self._backlog.spill(self.held))
            self.held, self._characters = [], 0

    def discard(self) -> None:
        """Forget all of it."""
        for path in self.runs:
            path.unlink(missing_ok=True)
        self.held, self.runs, self.size = [], [], 0


class Backlog:
    """What waits, oldest first.

    Args:
        folder: of ``pipelines.staging``, for what memory should not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self._names = itertools.count()
        self._held: list[Waiting] = []
        self._held_characters = 0
        self._runs: list[tuple[Waiting, int, Iterator[Waiting]]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def oldest(self) -> int | None:
        """Time of the oldest record that waits, microseconds; None when nothing does."""
        heads = [self._held[0].time] if self._held else []
        return min([*heads, self._runs[0][0].time] if self._runs else heads, default=None)

    def batch(self) -> Batch:
        """A batch to fill, then to :meth:`take`."""
        return Batch(self)

    def take(self, batch: Batch) -> None:
        """Everything of ``batch`` waits from now on."""
        for path in batch.runs:
            self._open(path)
        for one in batch.held:
            heapq.heappush(self._held, one)
            self._held_characters += one.characters
        self._size += batch.size
        if len(self._held) >= MEMORY_DOCUMENTS or self._held_characters >= MEMORY_CHARACTERS:
            self._open(self.spill(self._held))
            self._held, self._held_characters = [], 0

    def release(self, most: int, characters: int) -> list[Waiting]:
        """The oldest records, at most so many and so large together, at least one where any waits."""
        released: list[Waiting] = []
        while self._size and len(released) < most and characters > 0:
            released.append(self._pop())
            characters -= released[-1].characters
        return released

    def spill(self, waiting: list[Waiting]) -> Path:
        """Write ``waiting`` as one sorted run.

        Raises:
            StorageError: the disk refused.
        """
        path = self.folder / f"run-{next(self._names):06d}"
        ordered = sorted(waiting)
        with staging_errors(path), pa.OSFile(str(path), "wb") as sink:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_stream(sink, _RUN, options=options) as out:
                for start in range(0, len(ordered), _RUN_ROWS):
                    out.write_batch(_to_rows(ordered[start : start + _RUN_ROWS]))
        return path

    def _open(self, path: Path) -> None:
        run = _read_run(path)
        first = next(run, None)
        if first is not None:
            heapq.heappush(self._runs, (first, first.number, run))

    def _pop(self) -> Waiting:
        self._size -= 1
        if not self._runs or (self._held and self._held[0] < self._runs[0][0]):
            self._held_characters -= self._held[0].characters
            return heapq.heappop(self._held)
        oldest, _, run = self._runs[0]
        following = next(run, None)
        if following is None:
            heapq.heappop(self._runs)
        else:
            heapq.heapreplace(self._runs, (following, following.number, run))
        return oldest


def _to_rows(waiting: list[Waiting]) -> pa.RecordBatch:
    records = [one.record for one in waiting]
    pairs = [getattr(one, "qa", ()) for one in records]
    columns: dict[str, list[object]] = {
        "time": [one.time for one in waiting],
        "number": [one.number for one in waiting],
        "qa": [[{"question": question, "answer": answer} for question, answer in qa] or None for qa in pairs],
    }
    for name in (*_DOCUMENT, *_REJECTED):
        columns[name] = [getattr(one, name, None) for one in records]
    return pa.RecordBatch.from_arrays([pa.array(columns[one.name], one.type) for one in _RUN], schema=_RUN)


def _read_run(path: Path) -> Iterator[Waiting]:
    """The run's records in order; the file is deleted when all are read."""
    with staging_errors(path), pa.OSFile(str(path), "rb") as stream, pa.ipc.open_stream(stream) as batches:
        for rows in batches:
            for row in rows.to_pylist():
                yield Waiting(row["time"], row["number"], _to_record(row))
    path.unlink(missing_ok=True)


def _to_record(row: dict[str, Any]) -> Record:
    if row["reason"] is not None:
        return Rejected(**{name: row[name] for name in _REJECTED}, doc_id=row["doc_id"])
    qa = tuple((pair["question"], pair["answer"]) for pair in row["qa"] or ())
    return Document(**{name: row[name] for name in _DOCUMENT}, qa=qa)
