"""What travels through the streaming graph beside the batch graph's elements: the parts of a window, and its panes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.coders import Coder
from apache_beam.coders.typecoders import registry

from pipelines.coders import DeadLettersCoder, EncodedBatchCoder, from_ipc, to_ipc
from pipelines.records import STAGED, DeadLetters, EncodedBatch, column, staged_rows
from pipelines.windows import window_of
from schemas.document import Document

KNOWN_ROWS = pa.schema([STAGED.field(name) for name in ("key", "content_hash", "event_time")])
"""Documents that the bank shows already; they are counted, not encoded."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COUNT = struct.Struct("<Q")
_UNDATED_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True, eq=False)
class StreamPart:
    """Some of the documents of one window.

    Attributes:
        batches: encoded ones; no id is twice in one batch.
        known: rows of ``KNOWN_ROWS``. letters: those that cannot be ingested. Each may be none.
    """

    batches: tuple[EncodedBatch, ...] = ()
    known: tuple[pa.RecordBatch, ...] = ()
    letters: tuple[DeadLetters, ...] = ()

    @classmethod
    def concat(cls, parts: Iterable[StreamPart]) -> StreamPart:
        """All of several parts; rows are not copied."""
        every = list(parts)
        return cls(
            tuple(batch for one in every for batch in one.batches),
            tuple(rows for one in every for rows in one.known),
            tuple(letters for one in every for letters in one.letters),
        )


@dataclass(frozen=True, eq=False)
class WindowPane:
    """What a window of one shard gave at one moment: when it ended (pane 0), or later.

    Attributes:
        window: its name. end: seconds since the epoch. shard, pane: which one, from the grouping by shard.
        part: the documents.
    """

    window: str
    end: int
    shard: int
    pane: int
    part: StreamPart


class StreamPartCoder(Coder):
    """Coder of :class:`StreamPart`: three counted lists of framed Arrow streams."""

    def encode(self, value: StreamPart) -> bytes:
        """Frames of the batches, the known rows and the dead letters."""
        batches, letters = EncodedBatchCoder(), DeadLettersCoder()
        return b"".join(
            [
                _frames([batches.encode(one) for one in value.batches]),
                _frames([to_ipc(one) for one in value.known]),
                _frames([letters.encode(one) for one in value.letters]),
            ]
        )

    def decode(self, encoded: bytes) -> StreamPart:
        """Inverse of :meth:`encode`."""
        view = memoryview(encoded)
        batches, view = _unframe(view)
        known, view = _unframe(view)
        letters, view = _unframe(view)
        return StreamPart(
            tuple(EncodedBatchCoder().decode(one) for one in batches),
            tuple(from_ipc(one) for one in known),
            tuple(DeadLettersCoder().decode(one) for one in letters),
        )

    def is_deterministic(self) -> bool:
        """Equal rows, equal bytes."""
        return True

    def to_type_hint(self) -> type[StreamPart]:
        """The element class."""
        return StreamPart

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class WindowPaneCoder(Coder):
    """Coder of :class:`WindowPane`: a JSON header, then the part."""

    def encode(self, value: WindowPane) -> bytes:
        """One frame with the names, then the part's frames."""
        head = json.dumps([value.window, value.end, value.shard, value.pane]).encode()
        return _frames([head]) + StreamPartCoder().encode(value.part)

    def decode(self, encoded: bytes) -> WindowPane:
        """Inverse of :meth:`encode`."""
        (head,), rest = _unframe(memoryview(encoded))
        return WindowPane(*json.loads(bytes(head)), StreamPartCoder().decode(bytes(rest)))

    def is_deterministic(self) -> bool:
        """Equal panes, equal bytes."""
        return True

    def to_type_hint(self) -> type[WindowPane]:
        """The element class."""
        return WindowPane

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


def _frames(parts: Sequence[bytes]) -> bytes:
    framed = [_COUNT.pack(len(parts))]
    for one in parts:
        framed += [_COUNT.pack(len(one)), one]
    return b"".join(framed)


def _unframe(view: memoryview) -> tuple[list[memoryview], memoryview]:
    (count,) = _COUNT.unpack_from(view)
    view, parts = view[_COUNT.size :], []
    for _ in range(count):
        (length,) = _COUNT.unpack_from(view)
        parts.append(view[_COUNT.size : _COUNT.size + length])
        view = view[_COUNT.size + length :]
    return parts, view


@dataclass(frozen=True, slots=True)
class Arrived:
    """A document and its time in the stream: its own, or that of its arrival when it has none.

    Attributes:
        document: as it was given. moment: microseconds since the epoch.
    """

    document: Document
    moment: int

    @classmethod
    def of(cls, document: Document, moment: int) -> Self:
        """The document's own time counts before ``moment``."""
        return cls(document, moment if document.event_time is None else document.event_time)


def arrived_rows(arrived: Sequence[Arrived], salt: bytes, window_seconds: int) -> pa.RecordBatch:
    """Documents as rows of ``STAGED``; one without a date gets its arrival's time and window.

    Its content hash stays that of the document as given: when it comes again, it is a duplicate.
    """
    rows = staged_rows([one.document for one in arrived], salt, window_seconds)
    moments = [one.moment for one in arrived]
    replaced = {
        "event_time": pa.array(moments, STAGED.field("event_time").type),
        "window": pa.array([window_of(one, window_seconds) for one in moments], pa.string()),
    }
    return pa.RecordBatch.from_arrays([replaced.get(one.name, rows[one.name]) for one in STAGED], schema=STAGED)


def document_to_bytes(document: Document) -> bytes:
    """JSON that :func:`schemas.document.document_from_bytes` reads back to an equal document."""
    time = None
    if document.event_time is not None:
        time = (_EPOCH + timedelta(microseconds=document.event_time)).isoformat()
    fields = {"id": document.doc_id, "text": document.text, "title": document.title, "uri": document.uri}
    qa = [{"question": question, "answer": answer} for question, answer in document.qa]
    return json.dumps(fields | {"timestamp": time, "qa": qa}, ensure_ascii=False).encode()


def times_of(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The column ``event_time`` in microseconds, int64 [n]; the least value where there is none."""
    times: npt.NDArray[np.int64] = rows["event_time"].cast(pa.int64()).fill_null(_UNDATED_TIME).to_numpy()
    return times


def hashes_of(rows: pa.RecordBatch) -> npt.NDArray[np.uint8]:
    """The column ``content_hash`` as uint8 [n, 16]."""
    return np.frombuffer(b"".join(rows["content_hash"].to_pylist()), np.uint8).reshape(-1, 16)


def keys_of(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The column ``key`` as int64 [n]."""
    return column(rows, "key").astype(np.int64, copy=False)


registry.register_coder(StreamPart, StreamPartCoder)
registry.register_coder(WindowPane, WindowPaneCoder)
