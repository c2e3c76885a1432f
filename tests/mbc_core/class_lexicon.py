"""Codes with few classes, whose neighbours matter a lot, and what every class code must do: for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.errors import DamagedFile
from mbc_core.follow_code import FollowCode, Followers
from mbc_core.lexicon import Lexicon
from mbc_core.prefix_code import PrefixCode

UNARY = (1, 2, 3, 4, 5, 6, 7, 8, 8)
"""Lengths of nine classes; so uneven that after one class a class takes one bit, after another eight."""

MERGES = [("Ġ", "a"), ("Ġa", "b"), ("Ġ", "b"), ("a", "b"), ("Ġ", "1")]


def class_code(symbols: int, seed: int = 0) -> ClassCode:
    """Nine classes of ``symbols`` ≥ 9; the last class has one member."""
    draw = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(8), [8], np.arange(symbols - 9) % 8])
    steps = [draw.permutation(UNARY).tolist() for _ in range(10)]
    members = np.zeros(symbols, dtype=np.int64)
    for one in range(8):
        own = np.flatnonzero(classes == one)
        if len(own) > 1:
            members[own] = PrefixCode.from_counts(draw.random(len(own)) ** 4 + 1e-3, short=True).lengths
    return ClassCode(classes.tolist(), steps, members.tolist(), np.rint(np.mean(steps, axis=0)).astype(int).tolist())


def follow_code(symbols: int, seed: int = 0, *, levels: int = 2) -> FollowCode:
    """The same with lists: two symbols of three have one to five followers, of two levels."""
    draw = np.random.default_rng(seed + 100)
    plain = class_code(symbols, seed)
    leaders = np.flatnonzero(np.arange(symbols) % 3 < 2)
    sizes = draw.integers(1, 6, size=len(leaders))
    lists = [np.sort(draw.choice(symbols, size, replace=False)) for size in sizes.tolist()]
    bits = [
        PrefixCode.from_counts(draw.random(size) ** 4 + 1e-3, short=True).lengths if size > 1 else [0]
        for size in sizes.tolist()
    ]
    found = Followers(
        leaders, draw.integers(0, levels, size=len(leaders)), sizes, np.concatenate(lists), np.concatenate(bits)
    )
    listed = [draw.permutation([*UNARY[:8], 9, 9]).tolist() for _ in range(9 * levels)]
    return FollowCode(
        plain.classes.tolist(),
        plain.transitions.tolist(),
        plain.members.tolist(),
        plain.usual.tolist(),
        listed,
        found,
    )


def follow_lexicon(seed: int = 0) -> Lexicon:
    """As :func:`class_lexicon`, with followers."""
    return Lexicon(MERGES, follow_code(len(Lexicon(MERGES)), seed))


def class_lexicon(seed: int = 0) -> Lexicon:
    """Bytes and a few words made of a, b and 1; words of several codes are common."""
    return Lexicon(MERGES, class_code(len(Lexicon(MERGES)), seed))


def reads_as(code: ClassCode, stored: bytes, expected: Sequence[int] | None) -> None:
    """``stored`` is read as the ``expected`` symbols; None: it is damage, and told as such."""
    if expected is not None:
        assert code.unpack(stored) == expected
        return
    with pytest.raises(DamagedFile, match=f"of a passage are not whole: '{len(stored)} bytes, of which the last"):
        code.unpack(stored)


def canonical(lengths: list[int]) -> list[str]:
    """Codes as texts of 0 and 1, told by counting up."""
    codes, value, before = [""] * len(lengths), 0, 0
    for length, place in sorted((length, place) for place, length in enumerate(lengths)):
        value <<= length - before
        codes[place] = format(value, f"0{length}b")
        value, before = value + 1, length
    return codes


def every_cut_reads(code: ClassCode, plain_unpack: Callable[[bytes], list[int] | None], symbols: list[int]) -> None:
    """Bytes of ``symbols``, cut anywhere, are the first of them or damage, as the plain loop says."""
    stored = code.pack(symbols)
    for cut in range(len(stored)):
        expected = plain_unpack(stored[:cut])
        reads_as(code, stored[:cut], expected)
        assert expected is None or expected == symbols[: len(expected)]


def every_filling_is_passed_over(code: ClassCode, count: int) -> None:
    """Two symbols of ``count`` come back, whatever number of bits fills the last byte."""
    seen = set()
    for first in range(count):
        for second in range(count):
            seen.add(-sequence_bits(code, [first, second]) % 8)
            assert code.unpack(code.pack([first, second])) == [first, second]
    assert seen == set(range(8))
