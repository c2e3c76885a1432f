"""A canonical Huffman code: frequent symbols take few bits, rare ones many, and no code begins another.

Only the lengths are kept: codes of equal length are consecutive numbers in the order of the symbols, shorter codes
come first. The last byte of a packed string is filled with ones; the longest code is all ones and at least eight
bits long, so the filling never reads as a symbol.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import DamagedFile

LONGEST = 32
"""Bits; longer codes are refused."""

BYTE = 8

_MASK = (1 << LONGEST) - 1


class PrefixCode:
    """Symbols 0 … n-1 ↔ bits.

    Args:
        lengths: bits of each symbol's code, 1 to 32; Σ 2^-length must be 1 (a complete code), and the longest ≥ 8.
        short: the longest may have fewer than 8 bits: for a part of another code, which ends where that one says.

    Raises:
        ValueError: no complete code has these lengths.

    >>> code = PrefixCode([8] * 256)
    >>> code.pack([7, 255]), code.unpack(bytes([7, 255]))
    (b'\\x07\\xff', [7, 255])
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], *, short: bool = False) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._longest = _check(self.lengths, 1 if short else BYTE)
        order = np.lexsort((np.arange(len(self.lengths)), self.lengths))
        self._symbols: list[int] = order.tolist()
        sorted_lengths = self.lengths[order]
        widths = np.left_shift(1, self._longest - sorted_lengths)  # how many full-length strings each code begins
        starts = np.cumsum(widths) - widths
        codes = np.empty(len(order), dtype=np.int64)
        codes[order] = starts >> (self._longest - sorted_lengths)
        self.codes: list[int] = codes.tolist()
        self.bits: list[int] = self.lengths.tolist()
        present = np.unique(sorted_lengths)
        first = np.searchsorted(sorted_lengths, present)
        self._groups = list(zip(present.tolist(), first.tolist(), starts[first].tolist(), strict=True))
        self._group_starts: list[int] = starts[first].tolist()
        self._beyond = LONGEST - self._longest

    @classmethod
    def from_counts(cls, counts: Sequence[float] | NDArray[np.float64], *, short: bool = False) -> PrefixCode:
        """The Huffman code of these positive counts; equal counts are told apart by their symbols' order.

        Raises:
            ValueError: a count is not positive, or the code would need more than 32 bits or (unless ``short``)
                fewer than 8.
        """
        weights = np.asarray(counts, dtype=np.float64)
        if not (weights > 0).all():
            raise ValueError("every symbol needs a positive count")
        heap = [(weight, symbol) for symbol, weight in enumerate(weights.tolist())]
        heapq.heapify(heap)
        parents = [0] * (2 * len(heap) - 1)
        for node in range(len(heap), len(parents)):
            left_weight, left = heapq.heappop(heap)
            right_weight, right = heapq.heappop(heap)
            parents[left] = parents[right] = node
            heapq.heappush(heap, (left_weight + right_weight, node))
        depth = [0] * len(parents)
        for node in range(len(parents) - 2, -1, -1):
            depth[node] = depth[parents[node]] + 1
        return cls(depth[: len(weights)], short=short)

    def after(self, before: int | None, symbol: int) -> int:
        """Bits of ``symbol``, whatever stands ``before`` it; :class:`~mbc_core.class_code.ClassCode` looks there."""
        return self.bits[symbol]

    def pack(self, symbols: Sequence[int]) -> bytes:
        """Bits of ``symbols`` one after the other, filled with ones to whole bytes."""
        value, size = 0, 0
        for symbol in symbols:
            value = value << self.bits[symbol] | self.codes[symbol]
            size += self.bits[symbol]
        return filled(value, size)

    def first(self, ahead: int) -> tuple[int, int]:
        """The symbol that the next 32 bits ``ahead`` begin with, and its bits."""
        ahead >>= self._beyond
        length, first, start = self._groups[bisect_right(self._group_starts, ahead) - 1]
        return self._symbols[first + ((ahead - start) >> (self._longest - length))], length

    def unpack(self, stored: bytes) -> list[int]:
        """Symbols of :meth:`pack`.

        Raises:
            DamagedFile: the bytes end inside a code.
        """
        left = len(stored) * BYTE
        value = (int.from_bytes(stored, "big") + 1 << LONGEST) - 1  # ones behind the end, as the filling is
        found = []
        while left > 0:
            symbol, length = self.first(value >> left & _MASK)
            if length > left:
                break
            found.append(symbol)
            left -= length
        whole_or_damaged(value >> LONGEST, left, len(stored))
        return found


def filled(value: int, size: int) -> bytes:
    """The ``size`` bits of ``value``, filled with ones to whole bytes."""
    filling = -size % BYTE
    return ((value + 1 << filling) - 1).to_bytes((size + filling) // BYTE, "big")


def whole_or_damaged(value: int, left: int, size: int) -> None:
    """Check that the last ``left`` bits of ``value``, of ``size`` bytes, are filling.

    Raises:
        DamagedFile: they are something else.
    """
    if left < BYTE and value & ((1 << left) - 1) == (1 << left) - 1:
        return
    raise DamagedFile(
        "the word codes of a passage are not whole",
        value=f"{size} bytes, of which the last {left} bits are no code",
        cause="a byte was lost or changed, or the column was written with another lexicon",
        fix="run `mbc inspect --verify`, then restore the shard from a copy or ingest the document again",
    )


def _check(lengths: NDArray[np.int64], least: int) -> int:
    """The longest length, if a complete code has these lengths."""
    if not len(lengths) or lengths.min() < 1 or lengths.max() > LONGEST:
        raise ValueError(f"code lengths must be 1 to {LONGEST} bits")
    longest = int(lengths.max())
    if int(np.left_shift(1, longest - lengths).sum()) != 1 << longest:
        raise ValueError("the code lengths do not make a complete prefix code")
    if longest < least:
        raise ValueError(f"the longest code must have at least {least} bits")
    return longest
