"""Code histograms of a bank: exact, live rows only, by codebook version, as of any moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.bank.codebooks import register_codebook
from mbc_core.bank.histogram import bank_histogram
from mbc_core.codes import pack, unpack
from mbc_core.histogram import count_codes
from tests.mbc_core.tiny_reader import CODEWORDS, SLOTS, Doc, add_documents, documents, make_bank, pieces


def counted(bank, as_of=None) -> dict[int, list[list[int]]]:
    """One code at a time, from what recall itself is shown."""
    found: dict[int, list[int]] = {}
    for row in bank.passages(as_of).to_pylist():
        cells = found.setdefault(row["codebook_version"], [[0] * CODEWORDS for _ in range(SLOTS)])
        for counts, code in zip(cells, unpack(np.frombuffer(row["address"], np.uint8)[None], SLOTS)[0], strict=True):
            counts[code] += 1
    return found


def told(bank, as_of=None) -> dict[int, list[list[int]]]:
    found = bank_histogram(bank, as_of)
    assert all(np.array_equal(found.counts[version], cells.sum(0)) for version, cells in found.cells.items())
    return {version: cells.tolist() for version, cells in found.cells.items()}


@given(st.integers(0, 20), st.sampled_from([1, 3, 12, 24]), st.sampled_from([5, 8, 9]), st.integers(0, 2**32 - 1))
def test_packed_codes_are_counted_as_they_unpack(rows, slots, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, slots)).astype(np.uint16)
    counts = count_codes(pack(codes, bits), slots, bits)
    wanted = [np.bincount(slot, minlength=1 << bits).tolist() for slot in codes.T]
    assert counts.dtype == np.int64 and counts.tolist() == wanted


def test_a_histogram_is_what_recall_sees_code_by_code(tmp_path):
    bank = make_bank(tmp_path / "b", documents(12))
    found = bank_histogram(bank)
    assert told(bank) == counted(bank) and found.passages == len(bank.passages())
    assert sum(np.sum(one) for one in told(bank).values()) == SLOTS * found.passages


def test_each_codebook_version_has_its_own(tmp_path):
    bank = make_bank(tmp_path / "b", documents(12)[:6])
    first = pieces()[1]
    second = replace(
        first, version=1, parent=0, codewords=first.codewords[::-1].copy(), sum=first.sum[::-1].copy(),
        built_from=("2024-07-01T00:00:00Z",), last_window="2024-07-01T00:00:00Z",
    )  # fmt: skip
    register_codebook(bank, second)
    add_documents(bank, documents(12)[6:], "second", second)
    assert sorted(told(bank)) == [0, 1] and told(bank) == counted(bank)


def test_revisions_and_forgotten_documents_do_not_count(tmp_path):
    docs = documents(8)
    bank = make_bank(tmp_path / "b", docs)
    first = told(bank)
    before = max(row.as_py() for row in bank.passages()["added_at"].cast("int64"))
    add_documents(bank, [Doc(docs[0].doc_id, "Another harbour, another founder: Zebediah of Zanzibar.")], "again")
    assert told(bank) == counted(bank) != first
    assert told(bank, before) == counted(bank, before) == first
    bank.forget([docs[3].doc_id])
    assert told(bank) == counted(bank) and bank_histogram(bank).passages == len(bank.passages())


def test_an_empty_bank_has_no_counts(tmp_path):
    found = bank_histogram(make_bank(tmp_path / "b", documents(4)), as_of=0)
    assert found.counts == found.cells == {} and found.passages == 0


@pytest.mark.parametrize("parts", [2, 3])
def test_histograms_of_parts_add_up(parts):
    codes = pack(np.random.default_rng(0).integers(0, 512, (100, 24)).astype(np.uint16))
    whole = count_codes(codes, 24)
    assert np.array_equal(sum(count_codes(one, 24) for one in np.array_split(codes, parts)), whole)
