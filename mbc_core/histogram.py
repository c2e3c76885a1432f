"""How often each code occurs: all that the aggregate read needs of a bank, whatever its size; exact int64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbc_core.codes import CODE_BITS

Int64 = NDArray[np.int64]
_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a bank's codes.

    Attributes:
        cells: codebook version → int64 [T, K], how often each of its codes occurs in each slot; versions that no row
            names are absent.
        passages: rows counted.
    """

    cells: Mapping[int, Int64]
    passages: int

    @property
    def counts(self) -> dict[int, Int64]:
        """Codebook version → int64 [K], how often each code occurs in any slot."""
        return {version: cells.sum(0) for version, cells in self.cells.items()}


def count_codes(packed: NDArray[np.uint8], slots: int, bits: int = CODE_BITS) -> Int64:
    """How often each code occurs in each slot of packed addresses uint8 [n, code_size(T)]: int64 [T, 2^bits].

    A code of up to 9 bits lies in at most two bytes, so each slot is two columns, a shift and a mask.
    """
    counts = np.zeros((slots, 1 << bits), dtype=np.int64)
    for start in range(0, len(packed), _BLOCK_ROWS):
        block = packed[start : start + _BLOCK_ROWS]
        for slot in range(slots):
            byte, shift = divmod(slot * bits, 8)
            low = block[:, byte].astype(np.uint16)
            if byte + 1 < block.shape[1]:
                low |= block[:, byte + 1].astype(np.uint16) << np.uint16(8)
            counts[slot] += np.bincount((low >> np.uint16(shift)) & np.uint16((1 << bits) - 1), minlength=1 << bits)
    return counts
