"""Batch statistics: exact sums with a zero and an addition; any chunking, order or merge gives equal bytes."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from codebook_data import codebook_of, four_by_five, topical_embeddings
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.codebook.statistics import FIXED_POINT, BatchStatistics
from mbc_core.codes import Rotation, quantize, to_slots
from mbc_core.errors import DamagedFile, UsageError

SLOTS, SAMPLE = 4, 16


def passages(count: int = 40, seed: int = 0):
    """(codebook, slot vectors, codes, document keys, passage numbers); every third document has a second passage."""
    vectors = to_slots(topical_embeddings(count, 32, seed=seed), Rotation.random(32, seed=1), SLOTS)
    book = codebook_of(vectors, 12)
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, size=count, dtype=np.int64)
    numbers = np.zeros(count, dtype=np.int32)
    keys[2::3], numbers[2::3] = keys[1::3][: len(keys[2::3])], 1
    return book, vectors, quantize(vectors, book.codewords), keys, numbers


DATA = passages()


def of(rows, *, data=DATA, seed: int = 5, sample_size: int = SAMPLE) -> BatchStatistics:
    book, vectors, codes, keys, numbers = data
    rows = np.asarray(rows, dtype=np.int64)
    return BatchStatistics.of(
        book, vectors[rows], codes[rows], keys[rows], numbers[rows], seed, sample_size=sample_size
    )


def test_typed_out_on_a_four_by_five_codebook():
    vectors = np.array([[[1.5, 0, 0, 0, 0.25], [0, 1, 0, 0, 0]], [[0.5, 0, 0, 0, -0.25], [0, 0, 0, 2, 0]]], np.float32)
    codes = np.array([[0, 1], [0, 3]], np.uint16)
    found = BatchStatistics.of(
        four_by_five(), vectors, codes, np.array([10, -11], np.int64), np.array([0, 0], np.int32)
    )
    assert found.counts.tolist() == [2, 1, 0, 1]
    assert (found.sums / FIXED_POINT).tolist() == [[2, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 2, 0]]
    assert found.vectors == 4
    assert found.error_sum / FIXED_POINT == (0.25 + 0.0625) + 0 + (0.25 + 0.0625) + 1
    assert found.energy_sum / FIXED_POINT == (2.25 + 0.0625) + 1 + (0.25 + 0.0625) + 4
    assert sorted(found.candidates.keys.tolist()) == [-11, -11, 10, 10]
    assert sorted(found.candidates.vectors.tolist()) == sorted(vectors.reshape(-1, 5).tolist())


@given(
    order=st.permutations(range(40)),
    cuts=st.sets(st.integers(1, 39), max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_chunking_order_and_merge_tree_gives_equal_bytes(order, cuts, seed):
    bounds = [0, *sorted(cuts), 40]
    parts = [of(order[low:high]) for low, high in pairwise(bounds)]
    parts.append(BatchStatistics.zero(12, 8, 0, 5, sample_size=SAMPLE))
    choose = random.Random(seed)
    while len(parts) > 1:  # merge two random parts until one is left
        one = parts.pop(choose.randrange(len(parts)))
        two = parts.pop(choose.randrange(len(parts)))
        parts.append(one + two)
    assert parts[0].to_bytes() == of(range(40)).to_bytes()


@given(st.lists(st.integers(0, 39), min_size=1, max_size=60), st.integers(1, 200))
def test_the_sample_is_the_bottom_of_the_hashes_also_with_repeats(rows, sample_size):
    """A passage seen twice counts twice; the sample is what sorting everything would give, whatever its size."""
    everything = of(rows, sample_size=10_000).candidates
    merged = reduce(lambda a, b: a + b, [of([row], sample_size=sample_size) for row in rows]).candidates
    size = min(sample_size, len(rows) * SLOTS)
    assert merged.hashes.tolist() == sorted(everything.hashes.tolist())[:size]
    assert merged.vectors.tobytes() == everything.vectors[:size].tobytes()
    assert merged.keys.tobytes() == everything.keys[:size].tobytes()


def test_different_seeds_keep_different_vectors():
    assert of(range(40), seed=1).candidates.vectors.tobytes() != of(range(40), seed=2).candidates.vectors.tobytes()


def test_the_sample_is_spread_over_the_documents():
    """Bottom-k by hash is a uniform sample: 400 of 4,000 vectors take from nearly all quarters of the keys alike."""
    data = passages(1000, seed=3)
    ranks = np.searchsorted(np.sort(np.unique(data[3])), of(range(1000), data=data, sample_size=400).candidates.keys)
    quarters = np.bincount(ranks * 4 // len(np.unique(data[3])), minlength=4)
    assert quarters.sum() == 400
    assert quarters.min() > 60
    assert quarters.max() < 140


def test_zero_changes_nothing():
    zero = BatchStatistics.zero(12, 8, 0, 5, sample_size=SAMPLE)
    whole = of(range(40))
    assert (zero + whole).to_bytes() == (whole + zero).to_bytes() == whole.to_bytes()
    assert (zero.vectors, zero.counts.sum(), len(zero.candidates.hashes)) == (0, 0, 0)
    assert of([]).to_bytes() == zero.to_bytes()


def test_sums_equal_a_plain_loop():
    book, vectors, codes, *_ = DATA
    found = of(range(40))
    for code in range(book.size):
        mine = vectors[codes == code].astype(np.float64)
        assert found.counts[code] == len(mine)
        assert found.sums[code] / FIXED_POINT == pytest.approx(mine.sum(axis=0), abs=1e-6)
    squares = ((vectors - book.codewords[codes]).astype(np.float64) ** 2).sum()
    assert found.error_sum / FIXED_POINT == pytest.approx(squares, abs=1e-4)
    assert found.energy_sum / FIXED_POINT == pytest.approx(40, abs=1e-4)  # unit vectors


def test_carried_to_a_newer_head_leaves_out_codes_reset_since():
    book, *_ = DATA
    reset_at = np.zeros(12, np.int32)
    reset_at[[3, 7]] = 1, 2
    head = replace(book, version=2, parent=1, reset_at=reset_at)
    whole = of(range(40))
    carried = whole.carried_to(head)
    assert carried.codebook_version == 2
    assert (carried.counts[[3, 7]] == 0).all()
    assert (carried.sums[[3, 7]] == 0).all()
    others = np.delete(np.arange(12), [3, 7])
    assert np.array_equal(carried.counts[others], whole.counts[others])
    under_one = replace(whole, codebook_version=1).carried_to(head)
    assert under_one.counts[3] == whole.counts[3] > 0, "reset by version 1, so version 1's vectors are its own"
    assert under_one.counts[7] == 0
    assert carried.vectors == whole.vectors, "time passes for all codes alike"


def test_a_forgotten_document_leaves_the_sample():
    whole = of(range(40), sample_size=1000)
    gone = whole.without_documents(DATA[3][:1])
    assert DATA[3][0] in whole.candidates.keys
    assert DATA[3][0] not in gone.candidates.keys
    assert len(gone.candidates.keys) == len(whole.candidates.keys) - SLOTS
    assert np.array_equal(gone.sums, whole.sums)


def test_bytes_round_trip_and_do_not_vary():
    whole = of(range(40))
    again = BatchStatistics.from_bytes(whole.to_bytes(), "here")
    assert again.to_bytes() == whole.to_bytes()
    assert (again + of([1])).to_bytes() == (whole + of([1])).to_bytes()
    assert {of(range(40)).to_bytes() for _ in range(20)} == {whole.to_bytes()}
    assert len(whole.to_bytes()) < 9000, "64 candidates of 8 and 40 probes of 4 × 8 numbers"


def test_damaged_bytes_are_refused():
    whole = of(range(40)).to_bytes()
    with pytest.raises(DamagedFile, match="the file pending/a cannot be read"):
        BatchStatistics.from_bytes(whole[:-9], "pending/a")
    with pytest.raises(DamagedFile, match="the file pending/a cannot be read"):
        BatchStatistics.from_bytes(b"", "pending/a")
    with pytest.raises(DamagedFile, match="has another format: 'mbc-codebook/1'"):
        BatchStatistics.from_bytes(DATA[0].to_bytes(), "pending/a")


def test_statistics_of_two_kinds_do_not_add():
    whole = of(range(40))
    for other in (of([1], seed=6), of([1], sample_size=3), replace(whole, codebook_version=1)):
        with pytest.raises(UsageError, match="statistics of two kinds cannot be added"):
            whole + other


def test_sums_that_would_no_longer_be_exact_are_refused():
    huge = replace(of(range(40)), sums=np.full((12, 8), (1 << 62) - 1, np.int64))
    with pytest.raises(UsageError, match="grew too large to be exact"):
        huge + of(range(40))


def test_statistics_of_another_chain_are_refused():
    with pytest.raises(UsageError, match=r"do not belong to this chain of codebooks: 'version 0, \[12, 8\]'"):
        of([1]).carried_to(four_by_five())
    with pytest.raises(UsageError, match="version 3"):
        replace(of([1]), codebook_version=3).carried_to(DATA[0])


def test_wrong_inputs_are_named():
    book, vectors, codes, keys, numbers = DATA
    with pytest.raises(UsageError, match="wrong shape or dtype of the document keys"):
        BatchStatistics.of(book, vectors, codes, keys[:-1], numbers)
    with pytest.raises(UsageError, match="wrong shape or dtype of the codes"):
        BatchStatistics.of(book, vectors, codes.astype(np.int64), keys, numbers)
    with pytest.raises(UsageError, match="a code lies beyond the codebook: 12"):
        BatchStatistics.of(book, vectors, np.full_like(codes, 12), keys, numbers)
    with pytest.raises(UsageError, match="too large, or not finite: 2000"):
        BatchStatistics.of(book, vectors * 0 + 2000, codes, keys, numbers)
    with pytest.raises(UsageError, match="too large, or not finite: nan"):
        BatchStatistics.of(book, vectors * np.float32(np.nan), codes, keys, numbers)
