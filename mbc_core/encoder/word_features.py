"""What an uncased encoder cannot see of a word: its shape, the punctuation around it, whether it comes again.

Answers are mostly names and numbers, and the encoder reads everything in lower case. With the same training the head
kept as many answers with these features as without (.728 and .729 of the held-out ones); they are in the head that
ships. Every feature is a small whole number, and 0 is kept for word pieces that belong to no word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mbc_core.words import Word

SIZES: tuple[int, ...] = (9, 9, 9, 8, 8, 13, 10)
"""Categories of each feature, 0 included: shape, mark before, mark after, place in the sentence, occurrences, length,
place in the passage."""

_MARKS = ("", ",", ".!?", ":;", "\"'“”‘’«»", "([{)]}", "-–—/…")
_OTHER_MARK = len(_MARKS) + 1
_SENTENCE_ENDS = ".!?"
_STEPS = (0, 1, 2, 4, 8, 16)
_PARTS = 9


def word_features(text: str, words: Sequence[Word]) -> npt.NDArray[np.uint8]:
    """Features of each word, uint8 [len(words) + 1, len(SIZES)]; the last row, all 0, is that of no word.

    >>> int(word_features("He said: no", split_words("He said: no"))[0, 0])  # capitalised
    3
    """
    found = np.zeros((len(words) + 1, len(SIZES)), dtype=np.uint8)
    folded = [word.text.casefold() for word in words]
    times, met = Counter(folded), Counter[str]()
    since = 0
    for place, word in enumerate(words):
        before = text[words[place - 1].end if place else 0 : word.start]
        after = text[word.end : words[place + 1].start if place + 1 < len(words) else len(text)]
        if any(mark in before for mark in _SENTENCE_ENDS):
            since = 0
        met[folded[place]] += 1
        found[place] = (
            _shape(word.text),
            _mark(before.strip()[-1:]),
            _mark(after.strip()[:1]),
            1 + sum(since >= step for step in _STEPS),
            _occurrences(met[folded[place]], times[folded[place]]),
            min(len(word.text), SIZES[5] - 1),
            1 + place * _PARTS // len(words),
        )
        since += 1
    return found


def _shape(word: str) -> int:
    """1 lower, 2 a capital inside, 3 Capitalised, 4 CAPITALS, 5 digits, 6 digits first, 7 a digit inside, 8 neither."""
    letters = [char for char in word if char.isalpha()]
    if any(char.isdigit() for char in word):
        return 5 if not letters else 6 if word[0].isdigit() else 7
    if not letters:
        return 8
    capitals = sum(char.isupper() for char in letters)
    if not capitals:
        return 1
    if capitals == len(letters) > 1:
        return 4
    return 3 if letters[0].isupper() and capitals == 1 else 2


def _mark(char: str) -> int:
    if not char:
        return 1
    return next((place + 1 for place, marks in enumerate(_MARKS) if char in marks and marks), _OTHER_MARK)


def _occurrences(number: int, times: int) -> int:
    """1 the only one; 2-4 the first of two, three, more; 5-7 a later one."""
    if times == 1:
        return 1
    return (2 if number == 1 else 5) + min(times, 4) - 2
