"""What a passage costs, beside what it is compared with: the text, zstd, and MAC's floats on the same backbone.

MAC (the paper's rival) keeps T vectors of the language model's width a document, in float32. A ratio without its
label means nothing here, so there are always three: the indices alone, the indices with their codebooks, and all-in
(the tables that recall reads); and beside them everything on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mbc_core.errors import UsageError
from schemas.results import BankBytes

FLOAT_BYTES = 4
_LEVEL = 19
_DICTIONARY_SHARE = 0.05
_SMALLEST_DICTIONARY = 4096
_LARGEST_DICTIONARY = 1 << 20


@dataclass(frozen=True, slots=True)
class Compressed:
    """Sizes of a set of texts.

    Attributes:
        passages: how many.
        text: bytes a text, UTF-8.
        zstd: bytes a text, each compressed alone at level 19.
        zstd_dictionary: the same with a dictionary trained on these very texts, which flatters it.
        dictionary: bytes of that dictionary, not counted in ``zstd_dictionary``; 0 when too few texts to train one.
    """

    passages: int
    text: float
    zstd: float
    zstd_dictionary: float
    dictionary: int


@dataclass(frozen=True, slots=True)
class Ratios:
    """Share of MAC's floats that a bank takes, 0.003 being 0.3%.

    Attributes:
        mac: bytes a document in MAC: T · width · 4.
        indices: the packed codebook indices alone.
        with_codebook: the indices and the files of all codebook versions, learning state included.
        all_in: the tables `codes` and `documents` as stored, logs included; `all_in` of `mbc inspect`.
        on_disk: every byte of the bank: also codebooks, replay, ledger, adapters.
    """

    mac: int
    indices: float
    with_codebook: float
    all_in: float
    on_disk: float


def mac_bytes(slots: int, width: int) -> int:
    """Bytes that MAC stores a document: ``slots`` (T) float32 vectors of the language model's ``width``.

    >>> mac_bytes(12, 576), mac_bytes(24, 576)
    (27648, 55296)
    """
    return slots * width * FLOAT_BYTES


def ratios(*, documents: int, slots: int, width: int, address: float, codebooks: int, stored: BankBytes) -> Ratios:
    """The labelled ratios to MAC's floats on the same backbone and T.

    Args:
        documents: how many the bank holds.
        slots, width: T, and the width of the language model.
        address: bytes of all packed indices together.
        codebooks: bytes of the files of all codebook versions.
        stored: what `mbc inspect` says under ``bytes``.

    Raises:
        UsageError: an empty bank has no ratio.
    """
    if documents < 1:
        raise UsageError("an empty bank has no sizes to compare", value=documents, fix="ingest some documents first")
    mac = mac_bytes(slots, width)
    total = documents * mac
    return Ratios(
        mac=mac,
        indices=address / total,
        with_codebook=(address + codebooks) / total,
        all_in=(stored["codes"] + stored["documents"]) / total,
        on_disk=stored["total"] / total,
    )


def compress(texts: Sequence[str]) -> Compressed:
    """Compress each text alone, as a store that reads single passages must.

    Raises:
        UsageError: no texts.
    """
    import zstandard

    if not texts:
        raise UsageError("no texts to compress", value=0, fix="give at least one")
    raw: list[bytes | bytearray | memoryview[int]] = [text.encode("utf-8") for text in texts]
    total = sum(map(len, raw))
    plain = zstandard.ZstdCompressor(level=_LEVEL)
    alone = sum(len(plain.compress(data)) for data in raw)
    wanted = min(_LARGEST_DICTIONARY, max(_SMALLEST_DICTIONARY, int(total * _DICTIONARY_SHARE)))
    try:
        dictionary = zstandard.train_dictionary(wanted, raw)
    except zstandard.ZstdError:  # too few or too short texts: no dictionary can be trained
        return Compressed(len(raw), total / len(raw), alone / len(raw), alone / len(raw), 0)
    trained = zstandard.ZstdCompressor(level=_LEVEL, dict_data=dictionary)
    packed = sum(len(trained.compress(data)) for data in raw)
    return Compressed(len(raw), total / len(raw), alone / len(raw), packed / len(raw), len(dictionary.as_bytes()))
