"""The dictionary of the attend read: frequent words, their tokens, their vectors; and texts as numbers of its words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.errors import UsageError
from mbc_core.reader.attend import WORD_TOKENS
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.prepared import Prepared
from mbc_core.words import split_words

TARGET_WORDS = 24
"""Words of a passage that are to be named: the most salient."""

ANSWER_WORDS = 6
_FUNCTION_WORDS = frozenset(
    (
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "by",
        "for",
        "and",
        "or",
        "is",
        "was",
        "are",
        "were",
        "with",
        "from",
    )
)


class TextEmbedder(Protocol):
    """What is needed of an encoder: a text is embedded alike as a passage and as a question."""

    def encode_questions(self, questions: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, d], unit norm."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Words by number, most frequent first.

    Attributes:
        words: their commonest spellings, distinct when case is folded.
        vectors: float32 [words, d], the encoder's embeddings less their mean.
        tokens: int64 [words, ≤ 4], -1 where there are no more.
    """

    words: list[str]
    vectors: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, data: Prepared, size: int, encoder: TextEmbedder, form: PromptFormat) -> Dictionary:
        """The ``size`` words that stand in most passages or answers of ``data``.

        Raises:
            UsageError: there are no words.
        """
        spellings: dict[str, Counter[str]] = {}
        for words in (*data.table["words"].to_pylist(), *(_answer_words(one[0]) for one in data.answers)):
            for word in set(words):
                spellings.setdefault(word.casefold(), Counter())[word] += 1
        common = sorted(spellings.values(), key=lambda found: (-found.total(), min(found)))[:size]
        chosen = [min(found, key=lambda word: (-found[word], word)) for found in common]
        if not chosen:
            raise UsageError("there are no words to make a dictionary of", value=0, fix="prepare with --salience")
        vectors = torch.from_numpy(encoder.encode_questions(chosen).astype(np.float32))
        ids = [one[:WORD_TOKENS] for one in form.encode_many([f" {word}" for word in chosen])]
        tokens = torch.full((len(chosen), max(len(one) for one in ids)), -1)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
        return cls(chosen, vectors - vectors.mean(0), tokens)

    def targets(self, data: Prepared) -> tuple[Tensor, Tensor]:
        """What is to be named: int64 [passages, TARGET_WORDS] and [questions, ANSWER_WORDS], -1 where there is no more.

        Of a passage its most salient words, of a question the words of its preferred answer, as far as the dictionary
        has them; function words answer nothing.
        """
        numbers = {word.casefold(): number for number, word in enumerate(self.words)}
        passages = []
        for words, scores in zip(data.table["words"].to_pylist(), data.table["scores"].to_pylist(), strict=True):
            order = np.argsort(-np.array(scores, dtype=np.float32), kind="stable")[:TARGET_WORDS]
            passages.append(_numbers((words[place] for place in order), numbers))
        answers = [_numbers(_answer_words(given[0]), numbers)[:ANSWER_WORDS] for given in data.answers]
        return _table(passages, TARGET_WORDS), _table(answers, ANSWER_WORDS)

    def answer_targets(self, answers: Sequence[str]) -> Tensor:
        """As :meth:`targets` has it for questions, int64 [answers, ANSWER_WORDS]."""
        numbers = {word.casefold(): number for number, word in enumerate(self.words)}
        return _table([_numbers(_answer_words(one), numbers)[:ANSWER_WORDS] for one in answers], ANSWER_WORDS)


def _answer_words(answer: str) -> list[str]:
    return [word.text for word in split_words(answer) if word.text.casefold() not in _FUNCTION_WORDS]


def _numbers(words: Iterable[str], numbers: dict[str, int]) -> list[int]:
    folded = (word.casefold() for word in words)
    return list(dict.fromkeys(numbers[word] for word in folded if word in numbers))


def _table(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for row, one in enumerate(rows):
        table[row, : len(one)] = one
    return torch.from_numpy(table)
