"""Words of a passage, and the choice of those that become word codes.

A word code is an index into the :class:`~mbc_core.lexicon.Lexicon`, which also says how many bits it takes on
storage. Salience scores say which words questions are asked about; a budget says how many bits a passage may spend,
counted in plain codes of 16 bits; here the two meet. No model is needed in this module.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mbc_core.errors import ModelError

if TYPE_CHECKING:  # the lexicon brings the tokenizers library; splitting words does not need it
    from mbc_core.lexicon import Lexicon

BYTES_PER_CODE = 2
"""Of a plain word code; a profile with n word codes keeps at most 2·n bytes of words a passage."""

COST_POWER = 0.6
"""Words are taken by score / bits^0.6: between the best scores (0) and most score a bit (1). Tuned on held-out
passages; at 0.6 more answers are kept whole than at either end."""

OPENING_SHARE = 0.5
"""Share of the bits that goes to the passage's first words as they stand: a text says first what it is about, and a
language model reads running text better than a list of words."""

BRIDGED = 1
"""Words between two chosen ones, at most so many, are kept with them: mostly short, so cheap; they make a phrase."""

Price = Callable[[int | None, int, int | None], int]
"""Bits that a word adds, told by the places of the kept word before it, of the word, of the kept word after it."""

# A run of characters without white space, also cut at dashes that join two clauses ("gone—and", "gone--and").
_RUN = re.compile(r"(?:(?!—|―|--|…|\.\.\.)\S)+")
# Punctuation that carries meaning at a word's edge: 50%, #1, @name, AT&T's standalone &.
_MEANS_SOMETHING = frozenset("%‰#@&")
# Symbols (not punctuation to Unicode) that are only typography at a word's edge.
_DECORATION = frozenset("`´|~^<>=¨¸\N{BULLET}\N{MIDDLE DOT}")


@dataclass(frozen=True, slots=True)
class Word:
    """One word as it stands in a text: ``text == whole_text[start:end]`` (offsets in characters)."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[Word]:
    """Words of ``text`` in order, with edge punctuation stripped and bare punctuation left out.

    Currency signs, ``%``, ``#``, ``@`` and a minus before a digit stay, since they change the meaning.

    >>> [word.text for word in split_words('He said: "It cost $5 (or -4%)."')]
    ['He', 'said', 'It', 'cost', '$5', 'or', '-4%']
    """
    found = []
    for run in _RUN.finditer(text):
        start, end = _strip_edges(text, run.start(), run.end())
        if start < end:
            found.append(Word(text[start:end], start, end))
    return found


def choose_words(
    words: Sequence[str],
    scores: npt.NDArray[np.float32],
    budget: int,
    lexicon: Lexicon,
    *,
    opening: float = OPENING_SHARE,
    bridged: int = BRIDGED,
) -> npt.NDArray[np.uint16]:
    """Spend at most ``16 * budget`` bits on the best words of one passage.

    They are taken in the order of :func:`keeping_order`; a word is taken whole or left out, and a cheaper one may then
    use the room; the words taken stay in text order. So a short text is kept word for word.

    Args:
        words: the passage's words in text order.
        scores: float32 [len(words)], higher is more worth keeping.
        budget: the profile's word codes, ≥ 0: what so many plain codes of 16 bits would take.
        lexicon: turns a word into codes and tells their bits.
        opening, bridged: as for :func:`keeping_order`; others than the bank's own are for comparing choices.

    Returns:
        uint16, codes of the chosen words in text order; ``lexicon.pack`` of them has at most 2 · budget bytes.

    Raises:
        ModelError: scores are not one finite number a word.
    """
    _require_scores(words, scores)
    costs = np.array(lexicon.costs(words), dtype=np.int64)
    codes = lexicon.encode_words(words)
    taken = choose_places(
        words,
        word_worth(scores, costs),
        costs.tolist(),
        budget_bits(budget),
        price=lexicon.price(codes),
        opening=opening,
        bridged=bridged,
    )
    return np.fromiter((code for place in taken for code in codes[place]), dtype=np.uint16)


def budget_bits(budget: int) -> int:
    """Bits that a profile's number of word codes allows a passage."""
    return 8 * BYTES_PER_CODE * budget


def word_worth(scores: npt.NDArray[np.float32], costs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """In which order words are taken: float32 [n], score / bits^0.6; a score below zero counts as it is."""
    worth = scores / np.maximum(costs, 1).astype(np.float32) ** np.float32(COST_POWER)
    return np.where(scores > 0, worth, scores).astype(np.float32)


def choose_places(
    words: Sequence[str],
    worth: npt.NDArray[np.float32],
    costs: Sequence[int],
    room: int,
    *,
    price: Price | None = None,
    opening: float = OPENING_SHARE,
    bridged: int = BRIDGED,
) -> list[int]:
    """Positions of the words that :func:`choose_words` takes, ascending; ``costs`` and ``room`` in bits.

    A word that costs nothing is empty and never taken.

    Args:
        price: what a word adds between two that are kept, see :meth:`mbc_core.lexicon.Lexicon.price`; without it a
            word adds its cost. The costs alone say in which order words are tried.
        opening, bridged: as for :func:`keeping_order`; 0 and 0 take the words worth most and nothing else.
    """
    taken: list[int] = []
    told = price or (lambda before, place, after: costs[place])
    order, repetitions = keeping_order(words, worth, costs, opening=opening, bridged=bridged)

    def take(places: Sequence[int]) -> bool:
        """Whether there was room for all of them."""
        nonlocal room
        whole = True
        for place in places:
            if not costs[place]:  # an empty word: there is nothing to keep, and no code beside which to price others
                continue
            at, added = added_bits(taken, place, told)
            if added <= room:
                taken.insert(at, place)
                room -= added
            else:
                whole = False
        return whole

    if take(order):
        take(repetitions)
    return taken


def added_bits(kept: Sequence[int], place: int, price: Price) -> tuple[int, int]:
    """Where ``place`` belongs among the ``kept`` places, ascending, and the bits that it adds there."""
    at = bisect_left(kept, place)
    return at, price(kept[at - 1] if at else None, place, kept[at] if at < len(kept) else None)


def keeping_order(
    words: Sequence[str],
    worth: npt.NDArray[np.float32],
    costs: Sequence[int],
    *,
    opening: float = OPENING_SHARE,
    bridged: int = BRIDGED,
) -> tuple[list[int], list[int]]:
    """In which order the words of a passage are kept, whatever the budget: a smaller one keeps a part of a larger one.

    Two lists take turns by the bits they have spent: the passage's first words, as they stand, and the words worth
    most (ties: earlier first), each distinct word once, case-folded. When one of the latter comes within ``bridged``
    words of a word that is kept, those between come with it.

    Args:
        words: in text order.
        worth: float32 [n], as :func:`word_worth` tells.
        costs: bits of each word.
        opening: share of the bits that the first words get, 0 to 1.

    Returns:
        positions in the order of keeping, and the positions of repeated words that are left, most worth first: together
        every position once.
    """
    kept = [False] * len(words)
    order: list[int] = []
    seen: set[str] = set()
    folded = [word.casefold() for word in words]
    by_worth = np.argsort(-worth, kind="stable").tolist()
    first, best, spent = 0, 0, [0, 0]

    def keep(places: Sequence[int], by: int) -> None:
        for place in places:
            kept[place] = True
            seen.add(folded[place])
            order.append(place)
            spent[by] += costs[place]

    while True:
        while best < len(words) and (kept[by_worth[best]] or folded[by_worth[best]] in seen):
            best += 1
        while first < len(words) and kept[first]:
            first += 1
        if best == len(words):
            return order, [place for place in by_worth if not kept[place]]
        if opening and spent[0] * (1 - opening) <= spent[1] * opening:
            keep([first], 0)
            continue
        place = by_worth[best]
        keep([place], 1)
        for step in (-1, 1):
            keep(_between(kept, place, step, bridged), 1)


def _between(kept: Sequence[bool], place: int, step: int, most: int) -> list[int]:
    """The unkept positions beside ``place``, if at most ``most`` of them lead to a kept one; else none."""
    gap: list[int] = []
    at = place + step
    while 0 <= at < len(kept) and not kept[at] and len(gap) <= most:
        gap.append(at)
        at += step
    return gap if 0 < len(gap) <= most and 0 <= at < len(kept) else []


def _strip_edges(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and _is_edge(text[start]) and not _is_sign(text, start, end):
        start += 1
    while end > start and _is_edge(text[end - 1]):
        end -= 1
    return start, end


def _is_sign(text: str, start: int, end: int) -> bool:
    return text[start] == "-" and start + 1 < end and text[start + 1].isdigit()


@cache  # a few hundred distinct characters at most in practice; the look-up runs for every word
def _is_edge(char: str) -> bool:
    if char in _DECORATION:
        return True
    return unicodedata.category(char)[0] in "PZC" and char not in _MEANS_SOMETHING


def _require_scores(words: Sequence[str], scores: npt.NDArray[np.float32]) -> None:
    if scores.shape != (len(words),) or not np.isfinite(scores).all():
        raise ModelError(
            "salience scores do not fit the words",
            value=f"{len(words)} words, scores of shape {scores.shape}",
            cause="each word needs one finite score, in text order",
            fix="pass `EncodedPassage.words` and `EncodedPassage.scores` of the same passage",
        )
