"""Samples of the vectors that statistics were made from: reset candidates, and whole passages to judge an update with.

Both keep the smallest of a hash. That is a uniform sample which merges in any order to the same bytes (invariant 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mbc_core.codes import Float32

SAMPLE_SIZE = 4096
"""Vectors kept as reset candidates."""

PROBES = 256
"""Whole passages kept to judge an update with."""

RESET_SINCE = np.iinfo(np.uint16).max
"""In a probe's codes: the code that this slot was counted under was reset since, and its sum taken out."""

FIXED_POINT = float(1 << 28)
"""Sums count in units of 2^-28: finer than float32 at the size of a slot vector's elements."""

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Vectors a reset may use: the ``limit`` smallest of a hash, a uniform sample that merges in any order.

    Attributes:
        limit: most vectors kept.
        hashes: uint64 [s], ascending.
        keys: int64 [s]: key of the document each vector came from.
        vectors: float32 [s, d_c].
    """

    limit: int
    hashes: UInt64
    keys: Int64
    vectors: Float32

    @classmethod
    def of(cls, limit: int, hashes: UInt64, vectors: Float32, keys: Int64) -> Candidates:
        """Sample slot vectors [n, T, d_c] of documents ``keys`` [n] by their :func:`slot_hashes` [n, T]."""
        flat = np.ascontiguousarray(vectors.reshape(-1, vectors.shape[2]))
        return cls(limit, hashes.ravel(), np.repeat(keys, vectors.shape[1]), flat)._smallest()

    def __add__(self, other: Candidates) -> Candidates:
        return Candidates(
            self.limit,
            np.concatenate([self.hashes, other.hashes]),
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.vectors, other.vectors]),
        )._smallest()

    def without(self, keys: Int64) -> Candidates:
        """The same sample less the vectors of some documents, such as forgotten ones."""
        stay = np.isin(self.keys, keys, invert=True)
        return Candidates(self.limit, self.hashes[stay], self.keys[stay], self.vectors[stay])

    def _smallest(self) -> Candidates:
        chosen = _smallest(self.hashes, self.limit)
        return Candidates(self.limit, self.hashes[chosen], self.keys[chosen], self.vectors[chosen])


@dataclass(frozen=True, eq=False)
class Probes:
    """Whole passages to judge an update with, sampled and merged like :class:`Candidates`; no text.

    Attributes:
        limit: most passages kept.
        hashes: uint64 [s], ascending.
        keys: int64 [s]: key of each passage's document.
        vectors: float32 [s, T, d_c].
        codes: uint16 [s, T]: what the passage was counted under, so that it can be taken out of the sums again;
            :data:`RESET_SINCE` where it was taken out already.
    """

    limit: int
    hashes: UInt64
    keys: Int64
    vectors: Float32
    codes: NDArray[np.uint16]

    @classmethod
    def none(cls, limit: int, width: int) -> Probes:
        """A sample of nothing, for slot vectors of ``width``; it may be added to a sample with any number of slots."""
        vectors, codes = np.zeros((0, 0, width), np.float32), np.zeros((0, 0), np.uint16)
        return cls(limit, np.zeros(0, np.uint64), np.zeros(0, np.int64), vectors, codes)

    @classmethod
    def of(cls, limit: int, hashes: UInt64, vectors: Float32, codes: NDArray[np.uint16], keys: Int64) -> Probes:
        """Sample passages [n] of documents ``keys`` [n] by their :func:`slot_hashes` [n, T]; codes [n, T]."""
        of_passage: UInt64 = np.zeros(len(vectors), np.uint64)
        for column in (*hashes.T, *codes.astype(np.uint64).T):
            of_passage = _mix(of_passage ^ column)
        return cls(limit, of_passage, keys, vectors, codes).smallest(limit)

    def __len__(self) -> int:
        return len(self.hashes)

    def __add__(self, other: Probes) -> Probes:
        if not len(self) or not len(other):
            return self if len(self) else other
        parts = [(getattr(self, name), getattr(other, name)) for name in ("hashes", "keys", "vectors", "codes")]
        return Probes(self.limit, *(np.concatenate(part) for part in parts)).smallest(self.limit)

    def smallest(self, count: int) -> Probes:
        """The ``count`` passages of the sample with the least hashes: a uniform sample of it."""
        return self._take(_smallest(self.hashes, count))

    def without(self, keys: Int64) -> Probes:
        """The same sample less the passages of some documents, such as forgotten ones."""
        return self._take(np.flatnonzero(np.isin(self.keys, keys, invert=True)))

    def forget_codes(self, codes: NDArray[np.bool_]) -> Probes:
        """Mark slots whose code is among ``codes`` [K]: the sums of these codes were taken out."""
        known = self.codes != RESET_SINCE
        reset = known & codes[np.where(known, self.codes, 0)]
        return replace(self, codes=np.where(reset, np.uint16(RESET_SINCE), self.codes))

    def sums(self, size: int) -> tuple[Int64, Int64]:
        """What these passages added to the statistics: counts [size] and sums [size, d_c], in units of 2^-28."""
        codes = self.codes.ravel().astype(np.int64)
        counted = codes != RESET_SINCE
        codes, fixed = codes[counted], fixed_point(self.vectors.reshape(-1, self.vectors.shape[2])[counted])
        return np.bincount(codes, minlength=size).astype(np.int64), sums_by_code(fixed, codes, size)

    def _take(self, chosen: NDArray[np.intp]) -> Probes:
        if not len(chosen):
            return Probes.none(self.limit, self.vectors.shape[2])
        return Probes(self.limit, self.hashes[chosen], self.keys[chosen], self.vectors[chosen], self.codes[chosen])


def slot_hashes(seed: int, vectors: Float32, keys: Int64, passages: NDArray[np.int32]) -> UInt64:
    """A hash of every slot vector [n, T, d_c] and of where it stands → uint64 [n, T]."""
    count, slots, width = vectors.shape
    hashes: UInt64 = _mix(np.full(count * slots, seed & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64))
    for part in (np.repeat(keys, slots), np.repeat(passages, slots), np.tile(np.arange(slots), count)):
        hashes = _mix(hashes ^ part.astype(np.int64).view(np.uint64))
    # The vector itself is hashed too: equal hashes then mean equal vectors, and order cannot matter.
    for column in np.ascontiguousarray(vectors.reshape(-1, width)).view(np.uint32).T:
        hashes = _mix(hashes ^ column.astype(np.uint64))
    return hashes.reshape(count, slots)


def fixed_point(rows: Float32) -> Int64:
    """Rows in units of 2^-28."""
    return np.rint(rows.astype(np.float64) * FIXED_POINT).astype(np.int64)


def sums_by_code(fixed: Int64, codes: Int64, size: int) -> Int64:
    """Σ of rows [m, d_c] by code → int64 [K, d_c]."""
    sums = np.zeros((size, fixed.shape[1]), dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    if len(present):
        sums[present] = np.add.reduceat(fixed[order], starts, axis=0)
    return sums


def _smallest(hashes: UInt64, limit: int) -> NDArray[np.intp]:
    """Places of the ``limit`` smallest hashes, ascending."""
    chosen = np.arange(len(hashes))
    if len(chosen) > limit:
        chosen = np.argpartition(hashes, limit - 1)[:limit] if limit else chosen[:0]
    return chosen[np.argsort(hashes[chosen])]


def _mix(values: UInt64) -> UInt64:
    """One round of SplitMix64: spreads 64 bits over 64 bits, one to one."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E37_79B9_7F4A_7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
        spread: UInt64 = mixed ^ (mixed >> np.uint64(31))
        return spread
