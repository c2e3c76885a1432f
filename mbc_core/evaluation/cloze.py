"""Cloze questions: a sentence of the passage with a name, number or salient word left out.

They need no labels, so a bank can train and test its adapter on any documents. Everything is a pure function of the
passage and the seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLANK = "____"
PROMPT = "Fill in the blank: "
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])|\n+")
_MIN_WORDS, _MAX_WORDS = 6, 45
_MAX_SPAN = 5
_BEST_WORDS = 10
_WORD = re.compile(r"\w{3,}")
_EDGE = ".,;:!?\"'“”‘’()[]{}"


def make_cloze(text: str, words: Sequence[str], scores: NDArray[np.float32], seed: int | str) -> tuple[str, str] | None:
    """One cloze question about ``text``.

    The answer is one of the ten most salient words, grown over its capitalised or numeric neighbours ("12 July
    1999", "New York City"); it stands once in its sentence and is not the sentence's first word alone.

    Args:
        text: the passage.
        words: its words in text order.
        scores: float32 [len(words)], salience.
        seed: chooses among the candidates, together with the text.

    Returns:
        (question, answer), or None when no sentence offers a good blank.
    """
    candidates = _salient(words, scores)
    if not candidates:
        return None
    start = int.from_bytes(hashlib.blake2b(f"{seed}\x00{text}".encode(), digest_size=8).digest(), "little")
    sentences = [sentence.split() for sentence in _SENTENCE_END.split(text)]
    usable = [pieces for pieces in sentences if _MIN_WORDS <= len(pieces) <= _MAX_WORDS]
    blanks = [(pieces, place) for pieces in usable for place in _places(pieces, candidates)]
    for step in range(min(len(blanks), 6)):
        pieces, place = blanks[(start + step) % len(blanks)]
        made = _blank_out(pieces, place)
        if made is not None:
            return made
    return None


def gives_away(question: str, answer: str) -> bool:
    """Whether the question holds a word (three letters or more) of its answer.

    >>> gives_away("Fill in the blank: New ____ is a city of the United States.", "York City")
    True
    """
    asked = {word.lower() for word in _WORD.findall(question)}
    return any(word.lower() in asked for word in _WORD.findall(answer))


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, as cloze questions see them."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def _salient(words: Sequence[str], scores: NDArray[np.float32]) -> set[str]:
    """The best words, names and numbers first among equals; never short lower-case words."""
    order = np.argsort(-scores, kind="stable")
    best: dict[str, None] = {}
    for place in order.tolist():
        word = words[place].strip(_EDGE)
        if word and (_is_special(word) or len(word) > 4):
            best.setdefault(word)
        if len(best) == _BEST_WORDS:
            break
    return set(best)


def _places(pieces: list[str], candidates: set[str]) -> list[int]:
    bare = [piece.strip(_EDGE) for piece in pieces]
    return [
        place
        for place, word in enumerate(bare)
        if word in candidates and bare.count(word) == 1 and (place > 0 or _has_digit(word))
    ]


def _blank_out(pieces: list[str], place: int) -> tuple[str, str] | None:
    first, last = _grow(pieces, place)
    span = pieces[first : last + 1]
    head = span[0][: len(span[0]) - len(span[0].lstrip(_EDGE))]
    tail = span[-1][len(span[-1].rstrip(_EDGE)) :]
    joined = " ".join(span)
    answer = joined[len(head) : len(joined) - len(tail)]
    rest = " ".join([*pieces[:first], f"{head}{BLANK}{tail}", *pieces[last + 1 :]])
    if not answer or re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", rest, re.IGNORECASE):
        return None
    return PROMPT + rest, answer


def _grow(pieces: list[str], place: int) -> tuple[int, int]:
    """Widen over neighbours that belong to the same name or date; punctuation between them stops it."""
    first = last = place
    if not _is_special(pieces[place].strip(_EDGE)):
        return first, last
    while last + 1 < len(pieces) and last - first + 1 < _MAX_SPAN and _joined(pieces[last], pieces[last + 1]):
        last += 1
    while first > 1 and last - first + 1 < _MAX_SPAN and _joined(pieces[first - 1], pieces[first]):
        first -= 1
    return first, last


def _joined(left: str, right: str) -> bool:
    return (
        left[-1] not in _EDGE
        and right[0] not in _EDGE
        and _is_special(left.strip(_EDGE))
        and _is_special(right.strip(_EDGE))
    )


def _is_special(word: str) -> bool:
    return bool(word) and (word[0].isupper() or _has_digit(word))


def _has_digit(word: str) -> bool:
    return any(char.isdigit() for char in word)
