"""How often each code occurs in a bank, by codebook version and slot: all that the aggregate read needs of it.

Counted in one pass over the columns ``key, added_at, address, codebook_version`` of the live rows, so forgotten
documents and earlier revisions never count. Histograms are exact int64, and add and subtract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mbc_core.bank.visible import binary_matrix, newest_revisions
from mbc_core.codes import code_size
from mbc_core.errors import DamagedFile
from mbc_core.histogram import Histogram, Int64, count_codes

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_COLUMNS = ["key", "added_at", "address", "codebook_version"]


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
        if counts[:, size:].any():
            raise DamagedFile(
                "a code lies beyond its codebook",
                value=f"version {version}, K = {size}",
                cause="a shard or codebook is of another bank",
                fix="run `mbc inspect --verify`, then restore the shard from a copy",
            )
        found[int(version)] = counts[:, :size]
    return Histogram(found, len(rows))
