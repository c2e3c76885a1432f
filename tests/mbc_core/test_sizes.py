"""Sizes to compare with: figures worked out by hand."""

from __future__ import annotations

import pytest

from mbc_core.errors import UsageError
from mbc_core.sizes import compress, mac_bytes, ratios
from schemas.results import BankBytes


def test_macs_floats_on_smollm2():
    assert mac_bytes(12, 576) == 27_648
    assert mac_bytes(24, 576) == 55_296


def stored(**sizes: int) -> BankBytes:
    names = ("codes", "documents", "replay", "codebooks", "adapters", "other")
    known = {name: sizes.get(name, 0) for name in names}
    return BankBytes(**known, total=sum(known.values()))


def test_ratios_by_hand():
    sizes = stored(codes=40, documents=100, codebooks=61, replay=7, other=12)
    found = ratios(documents=10, slots=2, width=5, address=20, codebooks=60, stored=sizes)
    assert found.mac == 40
    assert found.indices == pytest.approx(20 / 400)
    assert found.with_codebook == pytest.approx(80 / 400)
    assert found.all_in == pytest.approx(140 / 400)
    assert found.on_disk == pytest.approx(220 / 400)


def test_an_empty_bank_has_no_ratios():
    with pytest.raises(UsageError, match="empty bank has no sizes"):
        ratios(documents=0, slots=2, width=5, address=0, codebooks=0, stored=stored())


def test_compression_orders_as_it_must():
    texts = [f"The city of number {n} lies on a river called {n * n}, founded in {1000 + n}." for n in range(400)]
    found = compress(texts)
    assert found.passages == 400
    assert found.text == pytest.approx(sum(map(len, texts)) / 400)
    assert found.zstd_dictionary < found.zstd < found.text + 20
    assert found.dictionary > 0


def test_bytes_not_characters_are_counted():
    assert compress(["é" * 100]).text == 200


def test_too_few_texts_for_a_dictionary():
    found = compress(["one short text"])
    assert found.dictionary == 0
    assert found.zstd_dictionary == found.zstd


def test_nothing_to_compress():
    with pytest.raises(UsageError, match="no texts to compress"):
        compress([])
