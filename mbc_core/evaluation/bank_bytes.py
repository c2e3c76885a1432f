"""What the paper's bank takes beside MAC's floats on the same backbone and T: exact formulas, three labelled ratios.

The released code stores T indices of 64 bits an entry where 9 bits suffice, and one entry a *question row*, so that a
document with five questions is stored five times, in both methods. Sizes here are given either way, by their names.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbc_core.codes import CODE_BITS
from mbc_core.errors import UsageError
from mbc_core.sizes import FLOAT_BYTES, mac_bytes

_INT64 = 8


@dataclass(frozen=True, slots=True)
class PaperBytes:
    """Bytes of a bank of N entries, in the paper's symbols.

    Attributes:
        entries: N: documents, passages, or question rows.
        mac: MAC's floats, N · T · w · 4.
        int64: the reference's indices, N · T · 8.
        packed: the same indices at 9 bits, ⌈N · T · 9 / 8⌉.
        codebook: E in float32, K · d_c · 4; shared by all entries.
        stored: what a bank of this project stores for so many entries (tables `codes` and `documents`, with keys,
            times, hashes and logs); None where no such bank was measured.
    """

    entries: int
    mac: int
    int64: int
    packed: int
    codebook: int
    stored: float | None

    @property
    def indices(self) -> float:
        """Packed indices alone, as a share of MAC's floats (0.003 is 0.3%)."""
        return self.packed / self.mac

    @property
    def with_codebook(self) -> float:
        """Packed indices and the codebook."""
        return (self.packed + self.codebook) / self.mac

    @property
    def all_in(self) -> float | None:
        """The stored tables and the codebook; None where nothing was measured."""
        return None if self.stored is None else (self.stored + self.codebook) / self.mac

    @property
    def as_the_paper(self) -> float:
        """Indices of 64 bits and the codebook, as the reference counts."""
        return (self.int64 + self.codebook) / self.mac


def paper_bytes(
    entries: int,
    slots: int,
    width: int,
    *,
    code_width: int | None = None,
    codewords: int = 512,
    stored_per_entry: float | None = None,
) -> PaperBytes:
    """Sizes of a bank of ``entries`` entries.

    Args:
        slots, width: T, and the width w of the language model, which MAC's vectors have.
        code_width: d_c of the codebook; the language model's width when None, as in the paper.
        codewords: K.
        stored_per_entry: measured bytes an entry in the tables of a bank.

    Raises:
        UsageError: there are no entries, or a size is below 1.

    >>> one = paper_bytes(1, 12, 576)
    >>> one.mac, one.int64, one.packed, one.codebook
    (27648, 96, 14, 1179648)
    """
    code_width = width if code_width is None else code_width
    if min(entries, slots, width, code_width, codewords) < 1:
        raise UsageError(
            "a bank without entries or width has no sizes to compare",
            value=(entries, slots, width, code_width, codewords),
            fix="give sizes of at least 1",
        )
    return PaperBytes(
        entries=entries,
        mac=entries * mac_bytes(slots, width),
        int64=entries * slots * _INT64,
        packed=packed_bytes(entries, slots),
        codebook=codewords * code_width * FLOAT_BYTES,
        stored=None if stored_per_entry is None else entries * stored_per_entry,
    )


def packed_bytes(entries: int, slots: int) -> int:
    """Bytes of ``entries`` · T indices of 9 bits in one piece: 13.5 an entry at T = 12, 27 at T = 24.

    >>> packed_bytes(2, 12), packed_bytes(1, 24)
    (27, 27)
    """
    return (entries * slots * CODE_BITS + 7) // 8
