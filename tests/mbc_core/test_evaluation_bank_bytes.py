"""Bank bytes against the sizes that the paper's released code implies, typed out."""

from __future__ import annotations

import pytest

from mbc_core.codes import pack
from mbc_core.errors import UsageError
from mbc_core.evaluation.bank_bytes import packed_bytes, paper_bytes
from mbc_core.evaluation.method_report import Counted, bytes_rows

MIB = 1 << 20

# name, T, width, MAC B and int64 B an entry, codebook MiB, MAC and MBC MiB of 1,665 entries, ratio, indices only
BACKBONES = [
    ("distilgpt2", 12, 768, 36_864, 96, 1.50, 58.5, 1.65, 0.028, 0.0026),
    ("gpt2-large", 24, 1280, 122_880, 192, 2.50, 195, 2.80, 0.014, 0.0016),
    ("gpt2-xl", 24, 1600, 153_600, 192, 3.125, 244, 3.43, 0.014, 0.0013),
    ("llama2-7b", 24, 4096, 393_216, 192, 8.0, 624, 8.30, 0.013, 0.0005),
]


@pytest.mark.parametrize(
    ("name", "slots", "width", "mac", "int64", "book", "mac_all", "mbc_all", "share", "alone"), BACKBONES
)
def test_sizes_of_1665_documents(name, slots, width, mac, int64, book, mac_all, mbc_all, share, alone):
    found = paper_bytes(1_665, slots, width)
    assert found.mac == 1_665 * mac and found.int64 == 1_665 * int64
    assert found.codebook == book * MIB
    assert found.mac / MIB == pytest.approx(mac_all, abs=0.5)
    assert (found.int64 + found.codebook) / MIB == pytest.approx(mbc_all, abs=0.005)
    assert found.as_the_paper == pytest.approx(share, abs=0.0005)
    assert found.int64 / found.mac == pytest.approx(alone, abs=0.00005)


def test_the_published_third_of_a_percent_is_one_entry_a_question_row():
    found = paper_bytes(10_570, 24, 1600)
    assert (found.int64 + found.codebook) / MIB == pytest.approx(5.06, abs=0.005)
    assert found.mac / MIB == pytest.approx(1548, abs=0.5)
    assert found.as_the_paper == pytest.approx(0.0033, abs=0.00005)


def test_smollm2_takes_27648_and_55296_bytes_in_mac_and_13_and_a_half_or_27_packed():
    twelve, more = paper_bytes(2, 12, 576), paper_bytes(2, 24, 576)
    assert (twelve.mac, more.mac) == (2 * 27_648, 2 * 55_296)
    assert (twelve.packed, more.packed) == (27, 54)
    assert (twelve.int64, more.int64) == (2 * 96, 2 * 192)
    assert twelve.codebook == more.codebook == 512 * 576 * 4
    assert twelve.indices == 27 / 55_296 and twelve.with_codebook == (27 + 1_179_648) / 55_296


def test_packed_bytes_are_those_of_the_packer_in_one_piece():
    import numpy as np

    for entries, slots in ((1, 12), (3, 12), (5, 24), (7, 13)):
        assert packed_bytes(entries, slots) == pack(np.zeros((1, entries * slots), np.uint16)).size


def test_all_in_counts_the_stored_tables_and_the_codebook():
    found = paper_bytes(100, 12, 576, code_width=32, stored_per_entry=80.5)
    assert found.codebook == 512 * 32 * 4
    assert found.all_in == (8_050 + 65_536) / (100 * 27_648)
    assert paper_bytes(100, 12, 576).all_in is None


@pytest.mark.parametrize("wrong", [(0, 12, 576), (1, 0, 576), (1, 12, 0)])
def test_an_empty_bank_has_no_sizes(wrong):
    with pytest.raises(UsageError, match="at least 1"):
        paper_bytes(*wrong)


def test_rows_count_documents_passages_and_question_rows_and_only_passages_were_stored():
    rows = bytes_rows(Counted(793, 871, 4_309, {12: 80.0}), [12, 24], 576)
    assert [(row["T"], row["codes"], row["entry"], row["entries"], row["codebook"]) for row in rows] == [
        (12, "learned", "passage", 871, 1_179_648), (12, "address", "passage", 871, 65_536),
        (12, "learned", "document", 793, 1_179_648), (12, "learned", "question row", 4_309, 1_179_648),
        (24, "learned", "passage", 871, 1_179_648), (24, "address", "passage", 871, 32_768),
        (24, "learned", "document", 793, 1_179_648), (24, "learned", "question row", 4_309, 1_179_648),
    ]  # fmt: skip
    assert rows[0]["share_all_in"] == (871 * 80 + 1_179_648) / (871 * 27_648)
    assert rows[1]["share_all_in"] == (871 * 80 + 65_536) / (871 * 27_648)
    assert [row["share_all_in"] for row in rows[2:]] == [None] * 6
    assert rows[3]["int64"] == 4_309 * 96 and rows[7]["share_indices"] == 4_309 * 27 / (4_309 * 55_296)
    assert [row["codes"] for row in bytes_rows(Counted(1, 1, 1, {}), [5], 576)] == ["learned"] * 3  # 5 does not divide
