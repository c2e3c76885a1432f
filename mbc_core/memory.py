"""Ask a bank: recall passages by their codes, put their words before the question, let a language model answer.

>>> from mbc_core import Bank, Reader                                                            # doctest: +SKIP
>>> Reader(Bank.open("demo-bank")).ask("Which treaty ended the war?").answer                     # doctest: +SKIP
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mbc_core import defaults, weights
from mbc_core.bank import Bank
from mbc_core.codes import Rotation, code_size, unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError
from mbc_core.reader.live_adapter import CHECK_SECONDS, LiveAdapter, Warn
from mbc_core.recall import Part, RecallIndex
from mbc_core.rerank import DEPTH, reranked
from schemas.results import AskResult, Source

if TYPE_CHECKING:
    from mbc_core.histogram import Histogram
    from mbc_core.lexicon import Lexicon
    from mbc_core.query_map import QueryMap
    from mbc_core.reader.aggregate import AggregateReader
    from mbc_core.reader.attend_reader import AttendReader
    from mbc_core.reader.language_model import LanguageModel
    from mbc_core.reader.prompt import PromptFormat
    from schemas.manifest import Manifest

READS = ("recall", "attend", "aggregate", "closed")
_BATCH = 256  # questions answered by one adapter before another may be put on
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
            "event_time": _iso(self.event_time),
            "score": round(self.score, 4),
            "words": self.words,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with what it was made from; times are milliseconds a question."""

    question: str
    answer: str
    read: str
    as_of: datetime | None
    sources: tuple[Recalled, ...]
    recall_ms: float
    generate_ms: float

    def to_json(self) -> AskResult:
        """As ``mbc ask --json`` prints it."""
        return {
            "question": self.question,
            "answer": self.answer,
            "read": self.read,
            "as_of": _iso(self.as_of),
            "sources": [one.to_json() for one in self.sources],
            "milliseconds": {"recall": round(self.recall_ms, 1), "generate": round(self.generate_ms, 1)},
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
        _require_same("rotation", rotation.digest, manifest.rotation)
        if manifest.words:
            lexicon = lexicon or defaults.lexicon_for(manifest)
            _require_same("lexicon", lexicon.digest if lexicon is not None else "", manifest.lexicon)
        encoder = encoder or defaults.encoder_for(manifest, device=device)
        _require_same("encoder", encoder.encoder_id, manifest.encoder)
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
        _require_words(questions)
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
        _require_words(questions)
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


class Reader:
    """Answers questions from a bank.

    The encoder, the language model and its adapter are loaded when they are first needed. The adapter is the bank's
    live one for this language model; else the one that came with the release; else none.

    Args:
        bank: an open bank, where one is, or an open :class:`Memory`.
        language_model: the base model, without adapter; SmolLM2-135M-Instruct when None.
        encoder: the one the bank was made with; the release's own when None.
        adapter: folder of an adapter to use instead.
        as_of: answer as the bank and its adapter stood then.
        device: where models run.
        refresh: seconds between two looks whether another adapter was promoted or rolled back; it then reads from the
            next batch on, unless ``adapter`` or ``as_of`` is given.
        warn: gets a line when an adapter cannot be loaded and the one before it goes on reading.
        attend: folder of the weights that the read ``attend`` uses; the release's own when None.
        paper: folder of the weights that the read ``aggregate`` uses; the release's own for the bank's T when None.
    """

    def __init__(
        self,
        bank: Bank | Memory | str | Path,
        *,
        language_model: LanguageModel | None = None,
        encoder: QuestionEncoder | None = None,
        adapter: Path | None = None,
        as_of: datetime | None = None,
        device: str = "cpu",
        refresh: float = CHECK_SECONDS,
        warn: Warn | None = None,
        attend: Path | None = None,
        paper: Path | None = None,
    ) -> None:
        self._given = bank.bank if isinstance(bank, Memory) else bank
        self.bank = self._given if isinstance(self._given, Bank) else Bank.open(self._given)
        self._encoder, self._base, self._folder = encoder, language_model, adapter
        self.as_of, self.device = as_of, device
        self._refresh, self._warn, self._attend_folder, self._paper_folder = refresh, warn, attend, paper
        self._loaded: LiveAdapter | None = None
        self._loading = threading.Lock()
        if isinstance(bank, Memory):
            self.memory = bank  # fills the cached property

    @cached_property
    def memory(self) -> Memory:
        """What is recalled from."""
        return Memory.open(self.bank, self._encoder, as_of=self.as_of, device=self.device)

    @property
    def language_model(self) -> LanguageModel:
        """The base model with its adapter as it is now; see :meth:`LiveAdapter.batch` for use beside promotions."""
        return self.live.language_model

    @property
    def adapter(self) -> str | None:
        """Which adapter reads: a version of the bank, ``shipped``, the folder that was given, or None."""
        return self.live.name

    @property
    def live(self) -> LiveAdapter:
        """The base model, loaded once, and the adapter that is on it."""
        with self._loading:
            if self._loaded is None:
                base = self._own_copy()
                self._loaded = LiveAdapter(
                    base, self.bank, folder=self._folder, as_of=self.as_of, every=self._refresh, warn=self._warn
                )
            return self._loaded

    def _own_copy(self) -> LanguageModel:
        """The base model for one adapter more; its weights are loaded once."""
        from mbc_core.reader.attend_reader import shared_copy

        if self._base is None:
            self._base = defaults.language_model(device=self.device)
        return shared_copy(self._base)

    @cached_property
    def attend(self) -> AttendReader:
        """What reads passages as vectors.

        Raises:
            ModelError: there are no weights for it, or they are for another language model.
            IncompatibleBank: they read the vectors of another encoder.
        """
        from mbc_core.reader.attend_reader import AttendReader

        folder = defaults.attend_weights(given=self._attend_folder) or weights.path(defaults.ATTEND)
        with self._loading:
            return AttendReader(self._own_copy(), folder, self.bank.manifest.encoder)

    @cached_property
    def aggregate(self) -> AggregateReader:
        """What reads the whole bank from the histogram of its codes.

        Raises:
            ModelError: there are no weights for the bank's T, or they are for another language model.
            IncompatibleBank: they were trained for another encoder, rotation or T.
        """
        from mbc_core.reader.aggregate import AggregateReader

        manifest = self.bank.manifest
        folder = self._paper_folder or defaults.paper_weights(manifest.slots)
        with self._loading:
            reader = AggregateReader(folder, self._own_copy())
        reader.require_bank(manifest.encoder, manifest.rotation, manifest.slots)
        return reader

    @cached_property
    def histogram(self) -> Histogram:
        """How often each code occurs in the bank, as of the reader's moment."""
        from mbc_core.bank.histogram import bank_histogram

        return bank_histogram(self.bank, microseconds(self.as_of))

    def refresh(self) -> bool:
        """Read with the adapter that is live now; True when it is another one than before."""
        return self.live.refresh()

    def ask(self, question: str, k: int = 5, read: str = "recall") -> Answer:
        """Answer one question; see :meth:`ask_many`."""
        return self.ask_many([question], k, read)[0]

    def ask_many(self, questions: Sequence[str], k: int = 5, read: str = "recall") -> list[Answer]:
        """Answer questions, in batches.

        Args:
            k: how many passages are recalled.
            read: ``recall`` puts the words of the passages before the question; ``attend`` reads the vectors that
                their addresses stand for, and no words; ``aggregate`` reads the codes of the whole bank at once and
                recalls no passage, so its answers name no sources; ``closed`` asks the model alone.

        Raises:
            UsageError: an empty or far too long question, an unknown read, or k below 1.
            IncompatibleBank: the bank has no word codes to read, or was made with other pieces.
        """
        self._check(questions, read)
        began = time.perf_counter()
        recalled: list[list[Recalled]] = [[] for _ in questions]
        if read == "attend":
            recalled, vectors, asked = self.memory.recall_vectors(questions, k)
            between = time.perf_counter()
            answers = self.attend.answer(vectors, questions, asked)
        elif read == "aggregate":
            memory = self.aggregate.memory(self.histogram, self.bank)
            embeddings = self._question_encoder.encode_questions(questions)
            between = time.perf_counter()
            answers = self.aggregate.answer(questions, embeddings, memory)
        else:
            recalled = self.memory.recall(questions, k) if read == "recall" else recalled
            between = time.perf_counter()
            answers = self.answer([[one.words for one in found] for found in recalled], questions)
        count = max(1, len(questions))
        recall_ms = 1e3 * (between - began) / count if read != "closed" else 0.0
        generate_ms = 1e3 * (time.perf_counter() - between) / count
        return [
            Answer(question, answer, read, self.as_of, tuple(found), recall_ms, generate_ms)
            for question, answer, found in zip(questions, answers, recalled, strict=True)
        ]

    @cached_property
    def _question_encoder(self) -> QuestionEncoder:
        """The bank's encoder, without an index that the aggregate read does not need."""
        if "memory" in self.__dict__:
            return self.memory.encoder
        manifest = self.bank.manifest
        encoder = self._encoder or defaults.encoder_for(manifest, device=self.device)
        _require_same("encoder", encoder.encoder_id, manifest.encoder)
        return encoder

    def answer(self, memory: Sequence[Sequence[str]], questions: Sequence[str]) -> list[str]:
        """Answers of the language model to questions with these memory lines, best first, before them.

        In batches of up to 256 questions, each read by one adapter; safe in several threads.
        """
        from mbc_core.reader.generate import answer_prompts

        prompts, answers = self._prompts(memory, questions), list[str]()
        for start in range(0, len(prompts), _BATCH):
            with self.live.batch() as language_model:
                answers += answer_prompts(language_model, self._form, prompts[start : start + _BATCH])
        return answers

    def prompt_tokens(self, memory: Sequence[Sequence[str]], questions: Sequence[str]) -> list[int]:
        """Length of the prompts that :meth:`answer` would use."""
        return [len(prompt) for prompt in self._prompts(memory, questions)]

    @cached_property
    def _form(self) -> PromptFormat:
        from mbc_core.reader.prompt import PromptFormat

        return PromptFormat(self.language_model.tokenizer)

    def _prompts(self, memory: Sequence[Sequence[str]], questions: Sequence[str]) -> list[list[int]]:
        from mbc_core.reader.prompt import prompt_room

        room = prompt_room(self.language_model)
        return [self._form.build(lines, question, room).ids for lines, question in zip(memory, questions, strict=True)]

    def _check(self, questions: Sequence[str], read: str) -> None:
        if read not in READS:
            raise UsageError(
                "there is no such read",
                value=read,
                cause="a misspelt name, or a read that this release does not have",
                fix=f"use one of {', '.join(READS)}",
            )
        _require_words(questions)
        if read == "recall" and not self.bank.manifest.words:
            raise IncompatibleBank(
                "the bank has no word codes to read",
                value=f"profile {self.bank.manifest.profile}",
                cause="this profile stores addresses only",
                fix="ask with --read attend, recall from it with `mbc recall`, or ingest with --profile default",
            )


def _require_words(questions: Sequence[str]) -> None:
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


def _iso(moment: datetime | None) -> str | None:
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


def _require_same(what: str, ours: str, theirs: str) -> None:
    if ours != theirs:
        raise IncompatibleBank(
            f"the bank was made with another {what}",
            value=theirs,
            cause=f"this reader would use {ours}",
            fix=f"open it with the {what} it was made with, or ingest its sources again into a new bank",
        )
