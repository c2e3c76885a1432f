"""How often each code occurs in a bank, by codebook version: all that the aggregate read needs of it.

Counted in one pass over the columns ``key, added_at, address, codebook_version`` of the live rows, so forgotten
documents and earlier revisions never count. Histograms are exact int64, and add and subtract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mbc_core.bank.visible import binary_matrix, newest_revisions
from mbc_core.codes import CODE_BITS, code_size
from mbc_core.errors import DamagedFile

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

Int64 = NDArray[np.int64]
_BLOCK_ROWS = 1 << 16
_COLUMNS = ["key", "added_at", "address", "codebook_version"]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a bank's codes.

    Attributes:
        counts: codebook version → int64 [K], how often each of its codes occurs; versions that no row names are absent.
        passages: rows counted.
    """

    counts: Mapping[int, Int64]
    passages: int


def bank_histogram(bank: Bank, as_of: int | None = None) -> Histogram:
    """The histogram of every document's newest revision.

    Args:
        as_of: microseconds since the epoch: only what had been added by then. None: now.

    Raises:
        DamagedFile: a shard or codebook is damaged.
    """

    def read() -> Histogram:
        rows = bank.read("codes", _COLUMNS)
        return histogram_of(bank, rows.filter(pa.array(newest_revisions(rows, as_of))))

    return bank.steady(read, "codes")


def histogram_of(bank: Bank, rows: pa.Table) -> Histogram:
    """The histogram of ``rows``, with the columns ``address`` and ``codebook_version``.

    Raises:
        DamagedFile: an address has another length, or holds a code beyond its codebook.
    """
    slots = bank.manifest.slots
    packed = binary_matrix(rows["address"], code_size(slots), "address")
    versions = rows["codebook_version"].to_numpy()
    found: dict[int, Int64] = {}
    for version in np.unique(versions).tolist():
        own = packed if len(found) == 0 and (versions == version).all() else packed[versions == version]
        counts = count_codes(own, slots)
        size = len(bank.codebook(version).codewords)
        if counts[size:].any():
            raise DamagedFile(
                "a code lies beyond its codebook",
                value=f"version {version}, K = {size}",
                cause="a shard or codebook is of another bank",
                fix="run `mbc inspect --verify`, then restore the shard from a copy",
            )
        found[int(version)] = counts[:size]
    return Histogram(found, len(rows))


def count_codes(packed: NDArray[np.uint8], slots: int, bits: int = CODE_BITS) -> Int64:
    """How often each code occurs in packed addresses uint8 [n, code_size(T)]: int64 [2^bits].

    A code of up to 9 bits lies in at most two bytes, so each slot is two columns, a shift and a mask.
    """
    counts = np.zeros(1 << bits, dtype=np.int64)
    for start in range(0, len(packed), _BLOCK_ROWS):
        block = packed[start : start + _BLOCK_ROWS]
        for slot in range(slots):
            byte, shift = divmod(slot * bits, 8)
            low = block[:, byte].astype(np.uint16)
            if byte + 1 < block.shape[1]:
                low |= block[:, byte + 1].astype(np.uint16) << np.uint16(8)
            counts += np.bincount((low >> np.uint16(shift)) & np.uint16((1 << bits) - 1), minlength=1 << bits)
    return counts
