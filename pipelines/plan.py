"""The plan pass of local batch runs: read every source once, judge every record, deal documents out into slices.

Plain Python, bounded memory: texts go to the staging folder, some 60 bytes a document stay. The plan depends only on
the documents and the options (and on what other runs made visible), never on the order of the records, so that a
rerun cuts the same slices and skips those that are finished.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.windows import window_order
from pipelines.readers import Record, Rejected
from pipelines.records import DEAD_LETTER_ROWS, STAGED, DeadLetters, Tally, staged_rows
from pipelines.refused import forgotten_rows, refuse_letters
from pipelines.staging import append_rows, read_rows
from schemas.document import Document, document_key

SLICE_DOCUMENTS = 5_000
"""Most documents of a slice: large enough that a shard's files compress well, small enough to redo after a crash."""

SLICE_TEXT_BYTES = 64 << 20
_CHUNK_DOCUMENTS = 4_096
_CHUNK_TEXT_BYTES = 32 << 20
_REJECTED_ROWS, _REJECTED_BYTES = 20_000, 32 << 20
_UNDATED_TIME = np.iinfo(np.int64).min
_DUPLICATE, _FORGOTTEN = 1, 3  # of mbc_core.bank.Status; the bank's package is heavy and not needed to plan


class Visible(Protocol):
    """What the plan asks of a bank: which documents it shows already (``mbc_core.bank.VisibleKeys``)."""

    def status(self, keys: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """0 new, 1 duplicate, 2 revision, 3 to be forgotten, for keys int64 [n] and hashes uint8 [n, 16]."""
        ...


@dataclass(frozen=True, slots=True)
class Slice:
    """A bounded share of a run, durable before the next one starts.

    Attributes:
        name: number and content digest: if a rerun plans other contents, it is another slice.
        path: staging file with its documents, in no order.
        documents: how many.
        parts: window → how many slices of the run share it, in order of the windows.
        continues: the last window when the next slice goes on with it; its statistics then stay open.
    """

    name: str
    path: Path
    documents: int
    parts: dict[str, int]
    continues: str | None


@dataclass(frozen=True, slots=True)
class Judged:
    """Records that need no encoding: one commit of counts, and of dead letters where there are any.

    Attributes:
        name: like a slice's.
        tallies: counts. path: staging file with rows of ``DEAD_LETTER_ROWS``, or None.
    """

    name: str
    tallies: tuple[Tally, ...]
    path: Path | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        documents_in: every record seen. judged: commits without codes. slices: in the order of their windows.
        target: int64, one entry a document in the order read: number of its slice, or -1.
        keys, hashes: int64 [n] and uint8 [n, 16] of every document that should be visible when the run is done.
    """

    documents_in: int
    judged: tuple[Judged, ...]
    slices: tuple[Slice, ...]
    target: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]

    @property
    def names(self) -> set[str]:
        """Names of all its commits."""
        return {one.name for one in (*self.judged, *self.slices)}


# ------------------------------------------------------------------------------------------------ records to rows


def rejected_rows(rejected: Iterable[Rejected], salt: bytes) -> pa.RecordBatch:
    """Rejected records as rows of ``DEAD_LETTER_ROWS``; none of them got as far as a window."""
    rows = [
        {
            "window": "",
            "reason": one.reason,
            "message": one.message,
            "source": one.source,
            "position": one.position,
            "key": None if one.doc_id is None else document_key(one.doc_id, salt),
            "raw": one.raw,
        }
        for one in rejected
    ]
    return pa.RecordBatch.from_pylist(rows, DEAD_LETTER_ROWS)


# -------------------------------------------------------------------------------------------------------- spilling


class Spill:
    """Takes records one by one; keeps their texts on disk and an index in memory.

    Args:
        folder: an empty staging folder.
        salt: of the bank's manifest. window_seconds: length of a window.
    """

    def __init__(self, folder: Path, salt: bytes, window_seconds: int) -> None:
        self.folder, self.salt, self.window_seconds = folder, salt, window_seconds
        self.documents_in = 0
        self.rejected_files: list[Path] = []
        self._documents: list[Document] = []
        self._rejected: list[Rejected] = []
        self._bytes = self._rejected_bytes = 0
        self._index: list[pa.RecordBatch] = []
        self._fingerprint = hashlib.blake2b(digest_size=10)

    def read(self, records: Iterable[Record], progress: Callable[[int], None] | None = None) -> None:
        """Take every record; ``progress`` gets 1 for each."""
        for record in records:
            self.documents_in += 1
            if isinstance(record, Document):
                self._take(record)
            else:
                self._reject(record)
            if progress is not None:
                progress(1)

    def finish(self) -> None:
        """Write what is still held."""
        self._spill_documents()
        self._spill_rejected()

    @property
    def fingerprint(self) -> str:
        """Digest of every record in order: names the run of the same documents into the same bank."""
        return self._fingerprint.hexdigest()

    @property
    def chunks(self) -> int:
        """How many files of documents there are."""
        return len(self._index)

    def chunk(self, number: int) -> Path:
        """File of chunk ``number``: rows of ``STAGED``."""
        return self.folder / f"chunk-{number:06d}"

    def index(self) -> Index:
        """What is known of every document, in the order read."""
        empty = pa.schema([*(STAGED.field(name) for name in _INDEXED), pa.field("bytes", pa.int64())]).empty_table()
        table = pa.Table.from_batches(self._index) if self._index else empty
        windows = table["window"].combine_chunks().dictionary_encode()
        times = table["event_time"].cast(pa.int64()).fill_null(_UNDATED_TIME)
        hashes = b"".join(table["content_hash"].to_pylist())
        return Index(
            keys=table["key"].to_numpy(),
            hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 16),
            times=times.to_numpy(),
            names=windows.dictionary.to_pylist(),
            windows=windows.indices.to_numpy(zero_copy_only=False).astype(np.int32),
            bytes=table["bytes"].to_numpy(),
            chunks=np.repeat(np.arange(self.chunks, dtype=np.int32), [one.num_rows for one in self._index]),
        )

    def _take(self, document: Document) -> None:
        self._documents.append(document)
        self._bytes += len(document.text)
        if len(self._documents) >= _CHUNK_DOCUMENTS or self._bytes >= _CHUNK_TEXT_BYTES:
            self._spill_documents()

    def _reject(self, rejected: Rejected) -> None:
        told = f"{rejected.reason}\0{rejected.position}\0{len(rejected.raw)}\0".encode()
        self._fingerprint.update(told + rejected.raw)
        self._rejected.append(rejected)
        self._rejected_bytes += len(rejected.raw)
        if len(self._rejected) >= _REJECTED_ROWS or self._rejected_bytes >= _REJECTED_BYTES:
            self._spill_rejected()

    def _spill_documents(self) -> None:
        if not self._documents:
            return
        rows = staged_rows(self._documents, self.salt, self.window_seconds)
        append_rows(self.chunk(self.chunks), rows)
        sizes = pa.array([len(one.text) for one in self._documents], pa.int64())
        self._index.append(rows.select(_INDEXED).append_column("bytes", sizes))
        self._fingerprint.update(rows["key"].to_numpy().tobytes() + b"".join(rows["content_hash"].to_pylist()))
        self._documents, self._bytes = [], 0

    def _spill_rejected(self) -> None:
        if not self._rejected:
            return
        path = self.folder / f"rejected-{len(self.rejected_files):06d}"
        append_rows(path, rejected_rows(self._rejected, self.salt))
        self.rejected_files.append(path)
        self._rejected, self._rejected_bytes = [], 0


_INDEXED = ["window", "key", "content_hash", "event_time"]


@dataclass(frozen=True, slots=True)
class Index:
    """One entry a document, in the order read.

    Attributes:
        keys: int64 [n]. hashes: uint8 [n, 16]. times: int64 [n], the least value where there is none.
        windows: int32 [n], places in ``names``. bytes: int64 [n], size of the text. chunks: int32 [n], its file.
    """

    keys: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]
    times: npt.NDArray[np.int64]
    names: list[str]
    windows: npt.NDArray[np.int32]
    bytes: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int32]


# --------------------------------------------------------------------------------------------------------- slicing


def newest(index: Index) -> npt.NDArray[np.bool_]:
    """Mask of the documents that stand for their id: newest time (none is oldest), then greatest content hash."""
    halves = np.ascontiguousarray(index.hashes).view(">u8")
    order = np.lexsort((halves[:, 1], halves[:, 0], index.times, index.keys))
    last = np.append(index.keys[order][1:] != index.keys[order][:-1], True)[: len(order)]
    wins = np.zeros(len(order), bool)
    wins[order[last]] = True
    return wins


def make_plan(
    spill: Spill,
    visible: Visible,
    slice_documents: int = SLICE_DOCUMENTS,
    slice_text_bytes: int = SLICE_TEXT_BYTES,
) -> Plan:
    """Judge every document and cut the ones to encode into slices; :func:`deal_out` then fills the slices' files.

    Args:
        spill: finished.
        visible: what the bank showed before this run (its own commits left out).
        slice_documents, slice_text_bytes: most documents and characters of a slice.
    """
    index = spill.index()
    wins = newest(index)
    status = np.zeros(len(wins), np.int8)
    status[wins] = visible.status(index.keys[wins], index.hashes[wins])
    duplicate, gone = status == _DUPLICATE, status == _FORGOTTEN
    order = _slice_order(index, np.flatnonzero(wins & ~duplicate & ~gone))
    starts = _cut(index.bytes[order], slice_documents, slice_text_bytes)
    slices = _name_slices(index, order, starts, spill.folder)
    target = np.full(len(wins), -1, np.int64)
    for number, (start, end) in enumerate(_pairs(starts)):
        target[order[start:end]] = number
    return Plan(
        documents_in=spill.documents_in,
        judged=(
            *_judge_rejected(spill, visible),
            *_judge_known(index, ~wins, duplicate),
            *_judge_forgotten(index, gone, spill.folder),
        ),
        slices=tuple(slices),
        target=target,
        keys=index.keys[wins & ~gone],
        hashes=index.hashes[wins & ~gone],
    )


def _slice_order(index: Index, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Documents by window, then by key: whatever the order of the sources, the same."""
    rank = np.empty(len(index.names), np.int64)
    for place, number in enumerate(sorted(range(len(index.names)), key=lambda one: window_order(index.names[one]))):
        rank[number] = place
    return chosen[np.lexsort((index.keys[chosen], rank[index.windows[chosen]]))]


def _cut(sizes: npt.NDArray[np.int64], most: int, most_bytes: int) -> list[int]:
    """First places of the slices, and the end: each takes as many documents as both limits allow, at least one."""
    ends, starts = np.cumsum(sizes), [0]
    while starts[-1] < len(sizes):
        start = starts[-1]
        before = int(ends[start - 1]) if start else 0
        full = int(np.searchsorted(ends, before + most_bytes, "right"))
        starts.append(min(max(full, start + 1), start + most, len(sizes)))
    return starts


def _name_slices(index: Index, order: npt.NDArray[np.intp], starts: list[int], folder: Path) -> list[Slice]:
    windows = [index.names[one] for one in index.windows[order].tolist()]
    inside = [list(dict.fromkeys(windows[start:end])) for start, end in _pairs(starts)]
    shared: dict[str, int] = {}
    for name in (name for one in inside for name in one):
        shared[name] = shared.get(name, 0) + 1
    slices = []
    for number, ((start, end), names) in enumerate(zip(_pairs(starts), inside, strict=True)):
        rows = order[start:end]
        name = f"{number:05d}-{_digest(index.keys[rows].tobytes(), index.hashes[rows].tobytes())}"
        goes_on = end < len(windows) and windows[end] == windows[end - 1]
        parts = {window: shared[window] for window in names}
        slices.append(Slice(name, folder / f"slice-{number:06d}", end - start, parts, names[-1] if goes_on else None))
    return slices


def deal_out(spill: Spill, plan: Plan, finished: Collection[str] = ()) -> None:
    """Stream the chunks once more and append each document to its slice's file; the chunks are deleted.

    Args:
        finished: names of slices that need no file.
    """
    wanted_slices = np.array([one.name not in finished for one in plan.slices] + [False], bool)
    held: dict[int, list[pa.RecordBatch]] = {}
    held_bytes = first = 0
    for chunk in range(spill.chunks):
        rows = read_rows(spill.chunk(chunk))
        spill.chunk(chunk).unlink()
        target = plan.target[first : first + rows.num_rows]
        first += rows.num_rows
        for number in np.unique(target[wanted_slices[target]]).tolist():  # -1 finds the False at the end
            part = rows.take(pa.array(np.flatnonzero(target == number)))
            held.setdefault(number, []).append(part)
            held_bytes += part.nbytes
        if held_bytes >= SLICE_TEXT_BYTES or chunk == spill.chunks - 1:
            for number, parts in held.items():
                append_rows(plan.slices[number].path, pa.concat_batches(parts))
            held, held_bytes = {}, 0


def _judge_rejected(spill: Spill, visible: Visible) -> Iterator[Judged]:
    for number, path in enumerate(spill.rejected_files):
        rows = read_rows(path)
        content = "\n".join(f"{row['reason']} {row['position']} {row['source']}" for row in rows.to_pylist())
        name = f"rejected-{number:05d}-{_digest(content.encode())}"
        letters = DeadLetters(refuse_letters(rows, visible, spill.salt))
        if letters.rows is not rows:
            path = path.with_suffix(".refused")
            path.unlink(missing_ok=True)  # of an earlier plan of this run
            append_rows(path, letters.rows)
        yield Judged(name, tuple(letters.tallies(documents_in=True)), path)


def _judge_known(index: Index, replaced: npt.NDArray[np.bool_], duplicate: npt.NDArray[np.bool_]) -> Iterator[Judged]:
    if not (replaced | duplicate).any():
        return
    lost = np.bincount(index.windows[replaced], minlength=len(index.names)).tolist()
    known = np.bincount(index.windows[duplicate], minlength=len(index.names)).tolist()
    tallies = [
        Tally(name, documents_in=gone + there, replaced=gone, duplicates=there)
        for name, gone, there in zip(index.names, lost, known, strict=True)
        if gone or there
    ]
    digest = _digest(np.sort(index.keys[replaced | duplicate]).tobytes(), b"".join(one.to_bytes() for one in tallies))
    yield Judged(f"known-{digest}", tuple(tallies), None)


def _judge_forgotten(index: Index, gone: npt.NDArray[np.bool_], folder: Path) -> Iterator[Judged]:
    if not gone.any():
        return
    letters = DeadLetters(forgotten_rows(sorted(index.names[one] for one in index.windows[gone].tolist())))
    path = folder / "forgotten"
    path.unlink(missing_ok=True)
    append_rows(path, letters.rows)
    yield Judged(f"forgotten-{_digest(np.sort(index.keys[gone]).tobytes())}", tuple(letters.tallies(True)), path)


def _pairs(starts: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=5).hexdigest()
