"""Words of a passage, and the choice of those that become word codes.

A word code is an index into the :class:`~mbc_core.lexicon.Lexicon`: 16 bits, little-endian on storage. Salience
scores say which words questions are asked about; a budget says how many codes a passage may spend; here the two
meet. No model is needed in this module.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mbc_core.errors import DamagedFile, ModelError

if TYPE_CHECKING:  # the lexicon brings the tokenizers library; splitting words does not need it
    from mbc_core.lexicon import Lexicon

BYTES_PER_CODE = 2

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
    words: Sequence[str], scores: npt.NDArray[np.float32], budget: int, lexicon: Lexicon
) -> npt.NDArray[np.uint16]:
    """Spend at most ``budget`` codes on the best words of one passage.

    Best scores first (ties: earlier first); each distinct word once, case-folded, at its best-scoring place; a word
    is taken whole or left out, and a shorter one may then use the room; the words taken stay in text order.

    Args:
        words: the passage's words in text order.
        scores: float32 [len(words)], higher is more worth keeping.
        budget: most codes to spend, ≥ 0.
        lexicon: turns a word into codes.

    Returns:
        uint16 [≤ budget], codes of the chosen words in text order.

    Raises:
        ModelError: scores are not one finite number a word.
    """
    _require_scores(words, scores)
    codes = lexicon.encode_words(words)
    taken = choose_places(words, scores, [len(code) for code in codes], budget)
    return np.fromiter((code for place in taken for code in codes[place]), dtype=np.uint16)


def choose_places(
    words: Sequence[str], scores: npt.NDArray[np.float32], costs: Sequence[int], budget: int
) -> list[int]:
    """Positions of the words that :func:`choose_words` takes, ascending; ``costs`` are codes a word."""
    taken: list[int] = []
    seen: set[str] = set()
    room = budget
    for place in np.argsort(-scores, kind="stable").tolist():
        folded = words[place].casefold()
        if room <= 0:
            break
        if folded in seen:
            continue
        seen.add(folded)  # also when it does not fit: another spelling of it must not come in for it later
        if costs[place] <= room:
            taken.append(place)
            room -= costs[place]
    return sorted(taken)


def words_to_bytes(codes: npt.NDArray[np.uint16]) -> bytes:
    """Word codes (uint16 [n]) → 2·n little-endian bytes, as stored in the bank."""
    return np.ascontiguousarray(codes, dtype="<u2").tobytes()


def words_from_bytes(stored: bytes) -> npt.NDArray[np.uint16]:
    """Stored bytes → word codes, uint16 [len(stored) / 2].

    Raises:
        DamagedFile: an odd number of bytes.
    """
    if len(stored) % BYTES_PER_CODE:
        raise DamagedFile(
            "the word codes of a passage are not whole",
            value=f"{len(stored)} bytes",
            cause="each code is 2 bytes, so a byte was lost or the column holds something else",
            fix="run `mbc inspect --verify`, then restore the shard from a copy or ingest the document again",
        )
    return np.frombuffer(stored, dtype="<u2").astype(np.uint16)


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
