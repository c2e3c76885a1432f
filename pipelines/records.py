"""The elements that travel through the pipeline: batches of Arrow rows, and the counts that must add up.

One element carries many documents: per-element overhead is paid once a batch, and arrays reach numpy without a
copy. The text of a document travels only from the reader into :class:`~pipelines.transforms.Encode`, never through
a shuffle. No Beam here: the plain loop uses the same types; ``pipelines.coders`` gives them deterministic coders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.errors import MbcError
from pipelines.windows import window_of
from schemas.document import Document
from schemas.tables import CODES, DEAD_LETTER, DOCUMENTS, REPLAY, TIME

QA = pa.list_(pa.struct([pa.field("question", pa.string()), pa.field("answer", pa.string())]))

STAGED = pa.schema(
    [
        pa.field("window", pa.string(), nullable=False),
        pa.field("key", pa.int64(), nullable=False),
        pa.field("content_hash", pa.binary(), nullable=False),
        pa.field("event_time", TIME),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("qa", QA),
    ]
)
"""A checked document with its key, hash and window, on its way to the encoder."""


def _without(schema: pa.Schema, *names: str) -> list[pa.Field]:
    return [one for one in schema if one.name not in names]


_WINDOW = pa.field("window", pa.string(), nullable=False)

DOCUMENT_ROWS = pa.schema([_WINDOW, *_without(DOCUMENTS, "added_at")])
CODE_ROWS = pa.schema(_without(CODES, "added_at"))
REPLAY_ROWS = pa.schema([*_without(REPLAY, "added_at"), pa.field("priority", pa.uint64(), nullable=False)])
DEAD_LETTER_ROWS = pa.schema([_WINDOW, *_without(DEAD_LETTER, "added_at", "ingest_id")])
"""Rows of a bank's tables before the sink stamps them; ``priority`` picks the replay rows that a window keeps."""


def passage_schema(width: int) -> pa.Schema:
    """Rows of encoded passages: a code row with an embedding (float32 [width]) where the address will be."""
    embedding = pa.field("embedding", pa.list_(pa.float32(), width), nullable=False)
    return pa.schema([*_without(CODE_ROWS, "address", "codebook_version"), embedding])


@dataclass(frozen=True, eq=False)
class DocumentBatch:
    """Checked documents, in one batch for the encoder.

    Attributes:
        documents: rows of ``STAGED``.
    """

    documents: pa.RecordBatch
    parts: ClassVar[tuple[str, ...]] = ("documents",)

    @classmethod
    def of(cls, documents: Iterable[Document], salt: bytes, window_seconds: int) -> DocumentBatch:
        """Key, hash and window each document.

        >>> batch = DocumentBatch.of([Document("a", "Some text.", event_time=0)], b"0" * 16, 86_400)
        >>> batch.documents["window"].to_pylist()
        ['1970-01-01T00:00:00Z']
        """
        return cls(staged_rows(list(documents), salt, window_seconds))

    def __len__(self) -> int:
        return int(self.documents.num_rows)


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Passages with their embeddings and word codes, and the rows of their documents, without text.

    Attributes:
        documents: rows of ``DOCUMENT_ROWS``.
        passages: rows of :func:`passage_schema`.
        replay: rows of ``REPLAY_ROWS``.
    """

    documents: pa.RecordBatch
    passages: pa.RecordBatch
    replay: pa.RecordBatch
    parts: ClassVar[tuple[str, ...]] = ("documents", "passages", "replay")

    @classmethod
    def concat(cls, batches: Sequence[EncodedBatch]) -> EncodedBatch:
        """All rows of several batches."""
        return cls(*(concat([getattr(one, part) for one in batches]) for part in cls.parts))

    def embeddings(self) -> npt.NDArray[np.float32]:
        """h of the paper, float32 [passages, width], without a copy."""
        return embeddings_of(self.passages)

    def by_window(self) -> Iterator[tuple[str, WindowVectors]]:
        """The vectors of each window in the batch."""
        return by_window(self.passages)

    def load(self) -> EncodedBatch:
        """Itself: it is in memory (``pipelines.spill`` has its like on disk)."""
        return self


@dataclass(frozen=True, eq=False)
class WindowVectors:
    """The passages of one window in one batch: all that :class:`~pipelines.transforms.UpdateCodebook` needs.

    Attributes:
        passages: columns ``key`` int64, ``passage`` int32, ``embedding`` float32 [width].
    """

    passages: pa.RecordBatch
    parts: ClassVar[tuple[str, ...]] = ("passages",)

    def embeddings(self) -> npt.NDArray[np.float32]:
        """h of the paper, float32 [passages, width], without a copy."""
        return embeddings_of(self.passages)

    def load(self) -> WindowVectors:
        """Itself: it is in memory (``pipelines.spill`` has its like on disk)."""
        return self


@dataclass(frozen=True, eq=False)
class CodeBatch:
    """What a bank stores of some documents.

    Attributes:
        documents: rows of ``DOCUMENT_ROWS``. codes: rows of ``CODE_ROWS``. replay: rows of ``REPLAY_ROWS``.
    """

    documents: pa.RecordBatch
    codes: pa.RecordBatch
    replay: pa.RecordBatch
    parts: ClassVar[tuple[str, ...]] = ("documents", "codes", "replay")

    @classmethod
    def concat(cls, batches: Sequence[CodeBatch]) -> CodeBatch:
        """All rows of several batches."""
        return cls(*(concat([getattr(one, part) for one in batches]) for part in cls.parts))

    def take(self, keep: npt.NDArray[np.bool_]) -> CodeBatch:
        """The rows of the documents where ``keep`` (one flag a document) is set."""
        keys = column(self.documents, "key")[keep]
        parts = [getattr(self, part) for part in self.parts]
        return CodeBatch(*(part.filter(pa.array(np.isin(column(part, "key"), keys))) for part in parts))


@dataclass(frozen=True, eq=False)
class DeadLetters:
    """Documents, records or files that cannot be ingested, with the reason.

    Attributes:
        rows: rows of ``DEAD_LETTER_ROWS``; ``window`` is empty for what never got that far.
    """

    rows: pa.RecordBatch
    parts: ClassVar[tuple[str, ...]] = ("rows",)

    def tallies(self, documents_in: bool) -> list[Tally]:
        """Counts by window. ``documents_in``: also count them as seen (the plan did not yet)."""
        counts: dict[str, dict[str, int]] = {}
        windows, reasons = self.rows["window"].to_pylist(), self.rows["reason"].to_pylist()
        for window, reason in zip(windows, reasons, strict=True):
            of_window = counts.setdefault(window, {})
            of_window[reason] = of_window.get(reason, 0) + 1
        return [
            Tally(window, documents_in=sum(dead.values()) if documents_in else 0, dead_letters=dead)
            for window, dead in counts.items()
        ]


@dataclass(frozen=True)
class Tally:
    """Counts of documents of one window; adding them up gives the ledger.

    Attributes:
        window: name; empty for records that never got a window.
        documents_in: seen at the source. documents: made visible. passages: their code rows.
        duplicates: visible already with equal content. replaced: lost to a newer document of the same id in this
            run. dead_letters: by reason.
        codebook_version: the version its codes name, if there are any. statistics: file of what it tells about the
            codebook, until a version has taken it in.
    """

    window: str
    documents_in: int = 0
    documents: int = 0
    passages: int = 0
    duplicates: int = 0
    replaced: int = 0
    dead_letters: Mapping[str, int] = field(default_factory=dict)
    codebook_version: int | None = None
    statistics: str | None = None

    def __add__(self, other: Tally) -> Tally:
        dead = dict(self.dead_letters)
        for reason, count in other.dead_letters.items():
            dead[reason] = dead.get(reason, 0) + count
        return Tally(
            self.window,
            self.documents_in + other.documents_in,
            self.documents + other.documents,
            self.passages + other.passages,
            self.duplicates + other.duplicates,
            self.replaced + other.replaced,
            dead,
            self.codebook_version if self.codebook_version is not None else other.codebook_version,
            self.statistics or other.statistics,
        )

    @property
    def missing(self) -> int:
        """Documents seen but not accounted for; anything but 0 is an error."""
        return self.documents_in - self.documents - self.duplicates - self.replaced - sum(self.dead_letters.values())

    def to_bytes(self) -> bytes:
        """JSON with sorted keys: equal tallies give equal bytes."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["dead_letters"] = dict(self.dead_letters)
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of :meth:`to_bytes`."""
        return cls(**json.loads(data))


def sum_tallies(tallies: Iterable[Tally]) -> list[Tally]:
    """One tally a window, in order of the window's name.

    Raises:
        MbcError: documents seen are not all ingested, duplicates, replaced or dead letters.
    """
    sums: dict[str, Tally] = {}
    for one in tallies:
        sums[one.window] = sums[one.window] + one if one.window in sums else one
    require_whole(sums.values())
    return [sums[window] for window in sorted(sums)]


def require_whole(tallies: Iterable[Tally]) -> None:
    """Invariant 5: nothing is lost silently.

    Raises:
        MbcError: names the first window where counts do not add up.
    """
    for one in tallies:
        if one.missing:
            raise MbcError(
                f"the counts of the window {one.window or '(none)'!s} do not add up",
                value=f"{one.documents_in} documents in, {one.missing} of them unaccounted for",
                cause="a step dropped or repeated documents: this is a defect of the program",
                fix="run it again with the same ingest id, and report it with this message",
            )


def embeddings_of(passages: pa.RecordBatch) -> npt.NDArray[np.float32]:
    """The column ``embedding`` as float32 [n, width], without a copy."""
    values = passages["embedding"]
    flat: npt.NDArray[np.float32] = values.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(values), values.type.list_size)


def embedding_array(vectors: npt.NDArray[np.float32]) -> pa.Array:
    """float32 [n, width] → the Arrow column :func:`embeddings_of` reads."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def column(rows: pa.RecordBatch | pa.Table, name: str) -> npt.NDArray[np.generic]:
    """One column without nulls as a numpy array."""
    values: npt.NDArray[np.generic] = rows[name].to_numpy(
        **({"zero_copy_only": False} if isinstance(rows, pa.RecordBatch) else {})
    )
    return values


def concat(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Rows of several record batches of one schema as one record batch."""
    return pa.concat_batches(batches) if len(batches) != 1 else batches[0]


def by_window(passages: pa.RecordBatch) -> Iterator[tuple[str, WindowVectors]]:
    """Parts of one batch of passages by window, in order of appearance; one window passes without a copy."""
    windows = passages["window"].dictionary_encode()
    slim = passages.select(["key", "passage", "embedding"])
    names = windows.dictionary.to_pylist()
    if len(names) == 1:
        yield names[0], WindowVectors(slim)
        return
    places = windows.indices.to_numpy(zero_copy_only=False)
    for number, name in enumerate(names):
        yield name, WindowVectors(slim.filter(pa.array(places == number)))


def stable_hash(*parts: bytes) -> int:
    """64 bits that are the same in every process and release: the choice of shards, splits and samples."""
    digest = hashlib.blake2b(b"\x00".join(parts), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def staged_rows(documents: Sequence[Document], salt: bytes, window_seconds: int) -> pa.RecordBatch:
    """Documents as rows of ``STAGED``: keyed, hashed and assigned to their windows."""
    qa = [[{"question": question, "answer": answer} for question, answer in one.qa] or None for one in documents]
    columns: dict[str, list[object]] = {
        "window": [window_of(one.event_time, window_seconds) for one in documents],
        "key": [one.key(salt) for one in documents],
        "content_hash": [one.content_hash(salt) for one in documents],
        "qa": list(qa),
    }
    for name in ("event_time", "doc_id", "title", "uri", "text"):
        columns[name] = [getattr(one, name) for one in documents]
    return pa.RecordBatch.from_arrays([pa.array(columns[one.name], one.type) for one in STAGED], schema=STAGED)
