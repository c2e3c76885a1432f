"""Second look at what the addresses found: which of the question's words does a passage keep as word codes?

The address finds passages about the question's topic; the words tell them apart. A word counts by the bits that the
lexicon spends on it, its surprise, beyond those of the words that stand everywhere. Nothing is stored for this and
no model runs: the words are those that the reader would be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mbc_core.words import split_words

if TYPE_CHECKING:
    from mbc_core.lexicon import Lexicon

DEPTH = 50
"""Passages that are looked at again."""
WORD_WEIGHT = 0.3
"""λ: what a passage that keeps all of the question's words gains. Tuned on held-out passages, flat from 0.2 on."""
COMMON_BITS = 8
"""A word of so many bits or fewer says nothing about the topic."""


def word_weights(question: str, lexicon: Lexicon) -> dict[str, float]:
    """Case-folded words of a question and the share of its information that each holds; they add up to 1.

    Empty when it has common words only.
    """
    words = [word.text for word in split_words(question)]
    bits: dict[str, int] = {}
    for word, cost in zip(words, lexicon.costs(words), strict=True):
        folded = word.casefold()
        bits[folded] = max(bits.get(folded, 0), cost - COMMON_BITS)
    total = sum(max(0, cost) for cost in bits.values())
    return {word: cost / total for word, cost in bits.items() if cost > 0} if total else {}


def reranked(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    questions: Sequence[str],
    kept: Mapping[int, str],
    lexicon: Lexicon,
    k: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ``k`` best by address score + λ · overlap; ties go to the smaller row.

    Args:
        scores, rows: what the addresses found, [q, n], best first.
        kept: row → what its word codes say.

    Returns:
        (scores float32 [q, min(k, n)], rows int64), best first.
    """
    there = {row: {word.text.casefold() for word in split_words(text)} for row, text in kept.items()}
    gains = np.zeros(rows.shape, dtype=np.float32)
    for place, question in enumerate(questions):
        weights = word_weights(question, lexicon)
        for column, row in enumerate(rows[place].tolist()):
            gains[place, column] = sum(weight for word, weight in weights.items() if word in there[row])
    total = (scores + np.float32(WORD_WEIGHT) * gains).astype(np.float32)
    order = np.lexsort((rows, -total), axis=1)[:, :k]
    return np.take_along_axis(total, order, axis=1), np.take_along_axis(rows, order, axis=1)
