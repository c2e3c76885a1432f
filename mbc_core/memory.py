"""What a bank holds, searchable: recall passages by their codes, best first, with the words they keep.

>>> from mbc_core import Bank, Memory                                                            # doctest: +SKIP
>>> Memory.open(Bank.open("demo-bank")).recall(["Which treaty ended the war?"])[0][0].words      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mbc_core import defaults
from mbc_core.bank import Bank
from mbc_core.codes import Rotation, code_size, unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError
from mbc_core.recall import Part, RecallIndex
from mbc_core.rerank import DEPTH, reranked
from schemas.results import Source

if TYPE_CHECKING:
    from mbc_core.lexicon import Lexicon
    from mbc_core.query_map import QueryMap
    from schemas.manifest import Manifest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class QuestionEncoder(Protocol):
    """What recall needs of an encoder."""

    @property
    def encoder_id(self) -> str:
        """As the bank's manifest spells it."""

    def encode_questions(self, questions: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, d], unit norm."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """A passage that was recalled.

    Attributes:
        doc_id, title: of its document.
        event_time: when its document happened, UTC; None when it has no date.
        score: of its address, an estimate of the cosine (:mod:`mbc_core.recall`), and what its words add to it
            (:mod:`mbc_core.rerank`).
        words: what its word codes say; empty in banks without word codes.
        key, passage: where it stands in the bank.
    """

    doc_id: str
    title: str | None
    event_time: datetime | None
    score: float
    words: str
    key: int
    passage: int

    def to_json(self) -> Source:
        """As ``mbc ask --json`` prints it."""
        return {
            "doc_id": self.doc_id,
            "title": self.title,
            "event_time": iso_utc(self.event_time),
            "score": round(self.score, 4),
            "words": self.words,
        }


class Memory:
    """The passages of a bank as they stood at one moment, searchable by their codes. Make one with :meth:`open`."""

    def __init__(
        self, bank: Bank, passages: pa.Table, index: RecallIndex, encoder: QuestionEncoder, lexicon: Lexicon | None
    ) -> None:
        self.bank, self.encoder, self.lexicon = bank, encoder, lexicon
        self._passages, self._index = passages, index

    @classmethod
    def open(
        cls,
        bank: Bank | str | Path,
        encoder: QuestionEncoder | None = None,
        *,
        as_of: datetime | None = None,
        device: str = "cpu",
        lexicon: Lexicon | None = None,
        rotation: Rotation | None = None,
        query_map: QueryMap | None = None,
    ) -> Memory:
        """Read the codes of a bank and index them as they are packed.

        Args:
            bank: an open bank, or where one is.
            encoder, lexicon, rotation: those the bank was made with; the release's own when None.
            as_of: only what had been added by then (UTC when it names no zone); None: now.
            device: where the encoder runs.
            query_map: how questions are put to the codes; the release's own when None, if it has one for them. It
                concerns reading alone: no manifest names it. :meth:`QueryMap.identity` gives the plain score.

        Raises:
            UsageError: nothing is there.
            IncompatibleBank: the bank was made with another encoder, lexicon or rotation, or the map for another one.
            DamagedFile: a shard or codebook is damaged.
        """
        opened = bank if isinstance(bank, Bank) else Bank.open(bank)
        manifest = opened.manifest
        rotation = rotation or defaults.rotation()
        require_same("rotation", rotation.digest, manifest.rotation)
        if manifest.words:
            lexicon = lexicon or defaults.lexicon_for(manifest)
            require_same("lexicon", lexicon.digest if lexicon is not None else "", manifest.lexicon)
        encoder = encoder or defaults.encoder_for(manifest, device=device)
        require_same("encoder", encoder.encoder_id, manifest.encoder)
        passages = opened.passages(microseconds(as_of))
        query_map = query_map or defaults.query_map(rotation, manifest.slots)
        parts = _parts(opened, passages, manifest)
        index = RecallIndex.build(parts, rotation, manifest.slots, query_map=query_map)
        return cls(opened, passages, index, encoder, lexicon if manifest.words else None)

    def __len__(self) -> int:
        return len(self._index)

    def recall(self, questions: Sequence[str], k: int = 5, *, rerank: bool = True) -> list[list[Recalled]]:
        """The ``k`` best passages for each question, best first; fewer when the bank holds fewer.

        Args:
            rerank: look again at what the addresses found, by the words it keeps (:mod:`mbc_core.rerank`); has no
                effect in a bank without word codes.

        Raises:
            UsageError: an empty question, or k below 1.
        """
        if not questions:
            return []
        require_words(questions)
        embeddings = self.encoder.encode_questions(questions)
        scores, rows = self.search(embeddings, k, questions=questions if rerank else None)
        flat = self._recalled(rows.ravel(), scores.ravel())
        width = rows.shape[1]
        return [flat[place * width : (place + 1) * width] for place in range(len(questions))]

    def recall_vectors(
        self, questions: Sequence[str], k: int = 5
    ) -> tuple[list[list[Recalled]], list[NDArray[np.float32]], NDArray[np.float32]]:
        """The ``k`` best passages for each question by address alone, and what is read of them as vectors.

        Returns:
            the passages, best first; for each question x̂ of its passages, float32 [k, d]; the questions' own
            embeddings, float32 [q, d].

        Raises:
            UsageError: an empty question, or k below 1.
        """
        require_words(questions)
        embeddings = self.encoder.encode_questions(questions)
        scores, rows = self.search(embeddings, k)
        found = self._recalled(rows.ravel(), scores.ravel())
        starts = [place * rows.shape[1] for place in range(len(questions))]
        passages = [found[start : start + rows.shape[1]] for start in starts]
        vectors = self.vectors(rows.ravel()).reshape(*rows.shape, self.rotation.width)
        return passages, list(vectors), embeddings

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """x̂ of these rows, each by the codebook version that it names, float32 [rows, d]."""
        from mbc_core.reader.attend import passage_vectors

        found = np.zeros((len(rows), self.rotation.width), np.float32)
        chosen = self._passages.select(["address", "codebook_version"]).take(pa.array(rows))
        slots = self.bank.manifest.slots
        packed = np.frombuffer(b"".join(chosen["address"].to_pylist()), np.uint8).reshape(len(rows), code_size(slots))
        versions = chosen["codebook_version"].to_numpy()
        for version in np.unique(versions).tolist():
            of_it = np.flatnonzero(versions == version)
            codewords = self.bank.codebook(version).codewords
            found[of_it] = passage_vectors(unpack(packed[of_it], slots), codewords, self.rotation)
        return found

    def search(
        self, embeddings: NDArray[np.float32], k: int, *, questions: Sequence[str] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores float32 and row numbers int64, both [q, min(k, passages)], for question embeddings [q, d].

        Args:
            questions: what the embeddings say; with them the best :data:`mbc_core.rerank.DEPTH` are re-ranked by
                their words. None: by address alone.
        """
        if questions is None or self.lexicon is None:
            return self._index.search(embeddings, k)
        scores, rows = self._index.search(embeddings, max(k, DEPTH) if k >= 1 else k)  # the index refuses k < 1
        found = np.unique(rows)
        kept = dict(zip(found.tolist(), self.words(found), strict=True))
        return reranked(scores, rows, questions, kept, self.lexicon, k)

    def words(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """What the word codes of these rows say."""
        stored = self._passages["words"].take(pa.array(np.asarray(rows, dtype=np.int64))).to_pylist()
        return [self._decode(one) for one in stored]

    @property
    def payload_bytes(self) -> float:
        """Mean bytes of a passage's address and words, as they are stored."""
        sizes = [pc.mean(pc.binary_length(self._passages[name])).as_py() for name in ("address", "words")]
        return float(sum(size or 0.0 for size in sizes))

    @property
    def rotation(self) -> Rotation:
        """R, which turns the vectors that codes stand for back into the encoder's space."""
        return self._index.rotation

    @property
    def passages(self) -> pa.Table:
        """What :meth:`mbc_core.bank.Bank.passages` gave when the memory was opened; row numbers point into it."""
        return self._passages

    def keys(self) -> NDArray[np.int64]:
        """Document key of every row."""
        return np.asarray(self._passages["key"].to_numpy(), dtype=np.int64)

    def _recalled(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Recalled]:
        found = self._passages.select(["doc_id", "title", "event_time", "words", "key", "passage"])
        return [
            Recalled(
                one["doc_id"],
                one["title"],
                one["event_time"],
                float(score),
                self._decode(one["words"]),
                one["key"],
                one["passage"],
            )
            for one, score in zip(found.take(pa.array(rows)).to_pylist(), scores, strict=True)
        ]

    def _decode(self, stored: bytes) -> str:
        return self.lexicon.read(stored) if self.lexicon is not None and stored else ""


def require_words(questions: Sequence[str]) -> None:
    """Refuse what cannot be asked.

    Raises:
        UsageError: a question is empty, or holds half a character.
    """
    for place, question in enumerate(questions):
        which = f"number {place + 1} of {len(questions)}"
        if not question.strip():
            raise UsageError("a question is empty", value=which, fix="ask something")
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            raise UsageError(
                "a question is not UTF-8",
                value=which,
                cause="it came in another encoding, or was cut inside a character",
                fix="re-encode it as UTF-8",
            )


def microseconds(moment: datetime | None) -> int | None:
    """Microseconds since the epoch; UTC when the moment names no zone."""
    if moment is None:
        return None
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def iso_utc(moment: datetime | None) -> str | None:
    """ISO 8601 to the second, with Z; UTC when the moment names no zone."""
    if moment is None:
        return None
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _parts(bank: Bank, passages: pa.Table, manifest: Manifest) -> list[Part]:
    """Packed addresses by codebook version, as they are stored; row numbers of ``passages`` are the row ids."""
    size = code_size(manifest.slots)
    lengths = pc.binary_length(passages["address"])
    if len(passages) and not pc.all(pc.equal(lengths, size)).as_py():
        raise DamagedFile(
            "an address has the wrong length",
            value=f"{sorted(set(lengths.to_pylist()))} bytes",
            cause=f"T = {manifest.slots} takes {size} bytes; a shard is damaged or of another bank",
            fix="run `mbc inspect --verify`, then restore the shard from a copy",
        )
    packed = np.frombuffer(b"".join(passages["address"].to_pylist()), dtype=np.uint8).reshape(-1, size)
    versions = passages["codebook_version"].to_numpy()
    parts = []
    for version in np.unique(versions).tolist():
        rows = np.flatnonzero(versions == version).astype(np.int64)
        parts.append((bank.codebook(version), np.ascontiguousarray(packed[rows]), rows))
    return cast("list[Part]", parts)


def require_same(what: str, ours: str, theirs: str) -> None:
    """Refuse to read a bank with another piece than it was made with; ``ours`` and ``theirs`` are ids or digests.

    Raises:
        IncompatibleBank: they differ.
    """
    if ours != theirs:
        raise IncompatibleBank(
            f"the bank was made with another {what}",
            value=theirs,
            cause=f"this reader would use {ours}",
            fix=f"open it with the {what} it was made with, or ingest its sources again into a new bank",
        )
