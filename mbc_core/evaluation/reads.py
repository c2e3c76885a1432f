"""The same questions read in several ways: recalled word codes, closed book, full text, the right passage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.table import format_row, measured_row
from mbc_core.lexicon import Lexicon
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import MAX_PROMPT_TOKENS, PromptFormat
from mbc_core.words import choose_words
from schemas.results import EvalRow

Choose = Callable[[Sequence[str], NDArray[np.float32], int, Lexicon], NDArray[np.uint16]]

Kind = Literal["recall", "closed", "text", "right", "right_text", "shuffled"]
KINDS: tuple[Kind, ...] = ("recall", "closed", "text", "right", "right_text", "shuffled")
PROFILE_OF = {12: "compact", 24: "default", 41: "rich"}


@dataclass(frozen=True, eq=False)
class ReadSet:
    """Passages and questions to read them for.

    Attributes:
        texts: n passages.
        words, scores: words of each passage in text order and their salience, float32.
        questions, answers: q questions, each with its accepted answers.
        rows: int64 [q], the passage that answers.
        question_embeddings: float32 [q, d], unit norm.
    """

    texts: Sequence[str]
    words: Sequence[Sequence[str]]
    scores: Sequence[NDArray[np.float32]]
    questions: Sequence[str]
    answers: Sequence[Sequence[str]]
    rows: NDArray[np.int64]
    question_embeddings: NDArray[np.float32]

    def sample(self, limit: int | None, seed: int) -> ReadSet:
        """At most ``limit`` questions, drawn by the seed, in their order; all passages stay."""
        if limit is None or limit >= len(self.questions):
            return self
        kept = np.sort(np.random.default_rng(seed).choice(len(self.questions), limit, replace=False))
        return ReadSet(
            self.texts,
            self.words,
            self.scores,
            [self.questions[one] for one in kept],
            [self.answers[one] for one in kept],
            self.rows[kept],
            self.question_embeddings[kept],
        )


class Search(Protocol):
    """What recall needs of an index over the passages of a :class:`ReadSet`."""

    @property
    def bytes_per_passage(self) -> int:
        """Stored size of one passage's address."""

    def nearest(self, questions: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Rows int64 [q, ≤ k], best first."""


@dataclass(frozen=True, slots=True)
class Read:
    """One way to read.

    Attributes:
        kind: ``recall`` (words of the k passages found by code), ``closed`` (no memory), ``text`` (full text of
            the k passages found), ``right`` and ``right_text`` (words or text of the passage that answers),
            ``shuffled`` (words of k passages that were found for another question).
        k: passages.
        words: word codes a passage; None for text and closed book.
    """

    kind: Kind
    k: int = 5
    words: int | None = 24


DEFAULT_READS = (
    Read("closed", 0, None),
    Read("recall", 5, 12),
    Read("recall", 5, 24),
    Read("recall", 5, 41),
    Read("right", 1, 24),
    Read("text", 5, None),
    Read("text", 1, None),
    Read("right_text", 1, None),
)


def evaluate_reads(
    language_model: LanguageModel,
    questions: ReadSet,
    reads: Sequence[Read],
    *,
    search: Search,
    lexicon: Lexicon,
    max_tokens: int = MAX_PROMPT_TOKENS,
    batch_tokens: int = 16_384,
    seed: int = 0,
    choose: Choose = choose_words,
    progress: Callable[[str], None] = lambda line: None,
) -> list[EvalRow]:
    """Answer every question in every way.

    Args:
        search: finds passages by code.
        max_tokens: of a prompt; passages go, least score first, never the question.
        seed: of the bootstrap intervals and of the shuffled read.
        choose: which words of a passage are kept: words, scores, budget, lexicon → codes.
        progress: told each row when it is done.

    Raises:
        UsageError: there are no questions.
    """
    if not len(questions.questions):
        raise UsageError("there are no questions to read for", value=0, fix="give a set with questions")
    form = PromptFormat(language_model.tokenizer)
    began = time.perf_counter()
    found = search.nearest(questions.question_embeddings, max(1, max(read.k for read in reads)))
    recall_ms = 1e3 * (time.perf_counter() - began) / len(questions.questions)
    rows = []
    for read in reads:
        memory, size = _memory(questions, read, found, search.bytes_per_passage, lexicon, seed, choose)
        prompts = [
            form.build(lines, question, max_tokens).ids
            for lines, question in zip(memory, questions.questions, strict=True)
        ]
        began = time.perf_counter()
        predictions = answer_prompts(language_model, form, prompts, batch_tokens=batch_tokens)
        spent = 1e3 * (time.perf_counter() - began) / len(prompts)
        searched = read.kind in ("recall", "text", "shuffled")
        rows.append(
            measured_row(
                read.kind,
                _profile(read),
                read.k,
                predictions,
                questions.answers,
                bytes_per_passage=size,
                prompt_tokens=float(np.mean([len(prompt) for prompt in prompts])),
                milliseconds=spent + (recall_ms if searched else 0.0),
                seed=seed,
            )
        )
        progress(format_row(rows[-1]))
    return rows


def _memory(
    questions: ReadSet,
    read: Read,
    found: NDArray[np.int64],
    address_bytes: int,
    lexicon: Lexicon,
    seed: int,
    choose: Choose,
) -> tuple[list[list[str]], float]:
    """Memory lines of each question, and stored bytes a passage under this read."""
    total = len(questions.questions)
    if read.kind == "closed":
        return [[] for _ in range(total)], 0.0
    rows = questions.rows[:, None] if read.kind in ("right", "right_text") else found[:, : read.k]
    if read.kind == "shuffled":
        rows = rows[_derangement(total, seed)]
    if read.words is None:
        lines = {int(row): questions.texts[row] for row in np.unique(rows)}
        size = float(np.mean([len(text.encode()) for text in questions.texts]))
    else:
        lines, size = {}, 0.0
        for row in np.unique(rows).tolist():
            codes = choose(questions.words[row], questions.scores[row], read.words, lexicon).tolist()
            lines[row], size = lexicon.decode(codes), size + len(lexicon.pack(codes))
        size = address_bytes + size / max(1, len(lines))
    return [[lines[row] for row in chosen] for chosen in rows.tolist()], size


def _derangement(total: int, seed: int) -> NDArray[np.int64]:
    """Another question's number for each question (its own only when there is no other)."""
    order = np.random.default_rng(seed).permutation(total)
    away = np.empty(total, dtype=np.int64)
    away[order] = np.roll(order, 1)
    return away


def _profile(read: Read) -> str:
    if read.kind == "closed":
        return "-"
    return "text" if read.words is None else PROFILE_OF.get(read.words, f"{read.words} words")
