"""Documents → passages: slices of the text, cut at sentence ends, that the encoder can read whole.

Nothing is dropped: the passages of a text, joined, are the text. The number of passages is the least that greedy
packing of whole sentences reaches, and their lengths are evened out, so that no document ends in a crumb.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

PASSAGE_RULE = "sentences-256"
"""Name of this rule in the encoder's id: at most 256 word pieces, [CLS] and [SEP] included."""

MAX_PIECES = 254
"""Word pieces a passage may have beside [CLS] and [SEP]."""

# Where a sentence may end: after a full stop (and closing quotes) and a space, after CJK stops, after a line break.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+\s*|\n\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Gen|Col|Capt|Lt|Sgt|Rev|Sen|Rep|Gov|Hon|Jr|Sr|Inc|Ltd|Co|Corp|Bros"
    r"|No|Nos|Vol|pp?|vs|etc|approx|ca?|cf|e\.g|i\.e|a\.m|p\.m|[A-Z](?:\.[A-Z])+)\.$"
)
_LONGEST_ABBREVIATION = 12
_LONG = 50_000  # characters; so long a text is never one passage, and counting it whole costs seconds
_SPACED = re.compile(r"\s*\S+\s*")


def split_passages(text: str, count_pieces: Callable[[str], int], max_pieces: int = MAX_PIECES) -> list[str]:
    """Cut ``text`` into passages of at most ``max_pieces`` word pieces.

    Cuts fall at sentence ends; a sentence that is too long by itself is cut at spaces, and a word that is too long by
    itself between characters.

    Args:
        text: any text.
        count_pieces: word pieces of a string, special tokens not counted.
        max_pieces: most pieces a passage, ≥ 1.

    Returns:
        Slices with ``"".join(passages) == text``; none for a blank text.

    >>> split_passages("One two. Three four five. Six.", lambda part: len(part.split()), max_pieces=4)
    ['One two. ', 'Three four five. Six.']
    """
    if not text.strip():
        return []
    if len(text) < _LONG and count_pieces(text) <= max_pieces:
        return [text]
    units = [unit for sentence in _sentences(text) for unit in _fit(sentence, count_pieces, max_pieces)]
    sizes = [size for _, size in units]
    passages = _join(units, _pack(sizes, _even_limit(sizes, max_pieces)))
    # With some tokenizers a whole has more pieces than its parts together: such a passage is cut once more.
    return [part for passage in passages for part, _ in _halve(passage, count_pieces, max_pieces)]


def _sentences(text: str) -> list[str]:
    """Slices that end where a sentence ends; joined they are the text."""
    cuts = [0]
    for end in _END.finditer(text):
        if end.end() < len(text) and not _goes_on(text, end):
            cuts.append(end.end())
    cuts.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def _goes_on(text: str, end: re.Match[str]) -> bool:
    """A full stop of an abbreviation or initial, or one that a lower-case letter follows, ends no sentence."""
    if "\n" in end[0]:
        return False
    stop = end.start() + 1
    abbreviated = _ABBREVIATION.search(text[max(0, stop - _LONGEST_ABBREVIATION) : stop]) is not None
    return text[end.end()].islower() or abbreviated


def _fit(part: str, count_pieces: Callable[[str], int], max_pieces: int) -> list[tuple[str, int]]:
    """``part`` itself, or slices of it that fit, cut at spaces where it has any; each with its number of pieces."""
    size = count_pieces(part)
    if size <= max_pieces:
        return [(part, size)]
    finer = _SPACED.findall(part)
    if len(finer) <= 1:  # one giant word: strips of an eighth of what fits, which are packed again
        step = max(1, len(part) * max_pieces // (8 * size))
        finer = [part[start : start + step] for start in range(0, len(part), step)]
    if len(finer) == 1:
        return [(part, size)]
    units = [unit for one in finer for unit in _fit(one, count_pieces, max_pieces)]
    slices = _join(units, _pack([size for _, size in units], max_pieces))
    return [unit for one in slices for unit in _halve(one, count_pieces, max_pieces)]


def _halve(part: str, count_pieces: Callable[[str], int], max_pieces: int) -> list[tuple[str, int]]:
    size = count_pieces(part)
    if len(part) <= 1 or size <= max_pieces:
        return [(part, size)]
    middle = len(part) // 2
    return _halve(part[:middle], count_pieces, max_pieces) + _halve(part[middle:], count_pieces, max_pieces)


def _join(units: Sequence[tuple[str, int]], ends: Sequence[int]) -> list[str]:
    return ["".join(unit for unit, _ in units[start:end]) for start, end in itertools.pairwise([0, *ends])]


def _pack(sizes: Sequence[int], limit: int) -> list[int]:
    """Ends of greedy runs of ``sizes`` whose sums stay within ``limit`` (each size alone fits)."""
    ends: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if place and total + size > limit:
            ends.append(place)
            total = 0
        total += size
    return [*ends, len(sizes)]


def _even_limit(sizes: Sequence[int], most: int) -> int:
    """The least limit with which greedy packing needs no more runs than with ``most``."""
    runs = len(_pack(sizes, most))
    low, high = max(sizes), most
    while low < high:
        middle = (low + high) // 2
        if len(_pack(sizes, middle)) <= runs:
            high = middle
        else:
            low = middle + 1
    return low
