"""Ask a bank: recall passages by their codes, put their words before the question, let a language model answer.

>>> from mbc_core import Bank, Reader                                                            # doctest: +SKIP
>>> Reader(Bank.open("demo-bank")).ask("Which treaty ended the war?").answer                     # doctest: +SKIP
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core import defaults, weights
from mbc_core.bank import Bank
from mbc_core.errors import IncompatibleBank, UsageError
from mbc_core.memory import Memory, QuestionEncoder, Recalled, iso_utc, microseconds, require_same, require_words
from mbc_core.reader.live_adapter import CHECK_SECONDS, LiveAdapter, Warn
from schemas.results import AskResult

if TYPE_CHECKING:
    from mbc_core.histogram import Histogram
    from mbc_core.reader.aggregate import AggregateReader
    from mbc_core.reader.attend_reader import AttendReader
    from mbc_core.reader.language_model import LanguageModel
    from mbc_core.reader.prompt import PromptFormat

READS = ("recall", "attend", "aggregate", "closed")
_BATCH = 256  # questions answered by one adapter before another may be put on


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
            "as_of": iso_utc(self.as_of),
            "sources": [one.to_json() for one in self.sources],
            "milliseconds": {"recall": round(self.recall_ms, 1), "generate": round(self.generate_ms, 1)},
        }


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
                their addresses stand for, each passage in a prompt of its own, and no words; ``aggregate`` reads the
                codes of the whole bank at once and recalls no passage, so its answers name no sources; ``closed``
                asks the model alone.

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
            scores = [[one.score for one in found] for found in recalled]
            answers = self.attend.answer(vectors, questions, asked, scores)
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
        require_same("encoder", encoder.encoder_id, manifest.encoder)
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
        require_words(questions)
        if read == "recall" and not self.bank.manifest.words:
            raise IncompatibleBank(
                "the bank has no word codes to read",
                value=f"profile {self.bank.manifest.profile}",
                cause="this profile stores addresses only",
                fix="ask with --read attend, recall from it with `mbc recall`, or ingest with --profile default",
            )
