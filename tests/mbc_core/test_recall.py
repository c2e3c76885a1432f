"""Recall searches packed codes as stored, and finds what a float64 computation over decoded codes finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from codebook_data import codebook_of, topical_embeddings
from hypothesis import given
from hypothesis import strategies as st

from mbc_core import recall
from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, pack, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.recall import RecallIndex, exhaustive_scores

ROTATION = Rotation.random(96, seed=2)
PASSAGES, QUESTIONS = topical_embeddings(700, 96, seed=1), topical_embeddings(9, 96, seed=2)
ENGINES = pytest.mark.parametrize("engine", ["faiss", "exact"])


def other_version(book: Codebook) -> Codebook:
    """Another version with other words, so that its codes mean something else."""
    return replace(book, version=1, parent=0, codewords=np.roll(book.codewords, 3, axis=0) * np.float32(0.97))


def stored(slots: int, size: int = 512):
    """(codebook, codes, packed addresses) of PASSAGES."""
    vectors = to_slots(PASSAGES, ROTATION, slots)
    book = codebook_of(vectors, size)
    codes = quantize(vectors, book.codewords)
    return book, codes, pack(codes)


def ordered(scores: np.ndarray, rows: np.ndarray, k: int):
    """The best ``k`` by a plain sort: score, then the smaller row id."""
    best = [sorted(zip(-line, rows, strict=True))[:k] for line in scores]
    return np.array([[-score for score, _ in line] for line in best]), np.array(
        [[row for _, row in line] for line in best]
    )


@ENGINES
@pytest.mark.parametrize("slots", [12, 24])
def test_equals_the_float64_computation_over_decoded_codes(engine, slots):
    book, codes, packed = stored(slots)
    rows = np.random.default_rng(0).permutation(10_000)[:700].astype(np.int64)
    found, where = RecallIndex.build([(book, packed, rows)], ROTATION, slots, engine=engine).search(QUESTIONS, 10)
    assert (found.dtype, where.dtype, found.shape) == (np.float32, np.int64, (9, 10))
    oracle = exhaustive_scores(QUESTIONS, ROTATION, codes, book.codewords)
    scores, ids = ordered(oracle, rows, 10)
    assert found == pytest.approx(scores, abs=4e-7)
    clear = np.abs(np.diff(ordered(oracle, rows, 11)[0], axis=1)).min(axis=1) > 1e-6
    assert clear.sum() >= 7, "nearly all questions have no tie to float32, so their order is certain"
    assert np.array_equal(where[clear], ids[clear])


@ENGINES
def test_versions_are_searched_with_their_own_words_and_merged(engine):
    book, codes, packed = stored(12)
    newer = other_version(book)
    newer_codes = quantize(to_slots(PASSAGES, ROTATION, 12), newer.codewords)
    half = np.arange(700) % 2 == 0
    rows = np.arange(700, dtype=np.int64) * 7 - 300
    parts = [(book, packed[half], rows[half]), (newer, pack(newer_codes)[~half], rows[~half])]
    index = RecallIndex.build(parts, ROTATION, 12, engine=engine)
    assert len(index) == 700
    oracle = np.where(
        half,
        exhaustive_scores(QUESTIONS, ROTATION, codes, book.codewords),
        exhaustive_scores(QUESTIONS, ROTATION, newer_codes, newer.codewords),
    )
    found, where = index.search(QUESTIONS, 20)
    assert found == pytest.approx(ordered(oracle, rows, 20)[0], abs=4e-7)
    by_row = dict(zip(rows.tolist(), oracle.T, strict=True))
    for question, line in enumerate(where):
        assert found[question] == pytest.approx([by_row[row][question] for row in line.tolist()], abs=4e-7)
    assert {row % 2 for row in ((where + 300) // 7).ravel().tolist()} == {0, 1}, "both versions are found"


def test_codes_are_searched_packed_as_they_are_stored(monkeypatch):
    book, _, packed = stored(24)

    def unpack(*args):
        raise AssertionError("the search unpacked the codes")

    monkeypatch.setattr(recall, "unpack", unpack)
    index = RecallIndex.build([(book, packed, np.arange(700))], ROTATION, 24, engine="faiss")
    index.search(QUESTIONS, 5)
    import faiss

    held = faiss.vector_to_array(index._engines[0].index.codes)
    assert held.tobytes() == packed.tobytes()


@ENGINES
def test_ties_are_broken_by_the_smaller_row_id_however_many_there_are(engine):
    """300 equal passages (the same boilerplate everywhere): the first ids win, in any order of storage."""
    book, _, packed = stored(12)
    same = np.repeat(packed[:1], 300, axis=0)
    rows = np.random.default_rng(1).permutation(300).astype(np.int64)
    index = RecallIndex.build(
        [(book, same, rows), (book, packed[1:50], np.arange(1000, 1049))], ROTATION, 12, engine=engine
    )
    question = PASSAGES[:1]
    _, where = index.search(question, 5)
    assert where.tolist() == [[0, 1, 2, 3, 4]]


@ENGINES
@given(st.integers(0, 30), st.integers(1, 40))
def test_never_more_rows_than_there_are_and_no_placeholders(engine, count, k):
    book, _, packed = stored(12, 64)
    rows = np.arange(count, dtype=np.int64) + 100
    index = RecallIndex.build([(book, packed[:count], rows)], ROTATION, 12, engine=engine)
    found, where = index.search(QUESTIONS, k)
    assert found.shape == where.shape == (9, min(k, count))
    assert all(len(set(line)) == len(line) and set(line) <= set(rows.tolist()) for line in where.tolist())
    assert (np.diff(found, axis=1) <= 0).all()


@ENGINES
def test_an_empty_bank_and_no_questions(engine):
    book, _, packed = stored(12)
    empty = RecallIndex.build([], ROTATION, 12, engine=engine)
    assert len(empty) == 0
    assert [part.shape for part in empty.search(QUESTIONS, 5)] == [(9, 0), (9, 0)]
    index = RecallIndex.build([(book, packed, np.arange(700))], ROTATION, 12, engine=engine)
    assert [part.shape for part in index.search(QUESTIONS[:0], 5)] == [(0, 5), (0, 5)]


@ENGINES
def test_blocks_of_questions_and_rows_change_nothing(engine, monkeypatch):
    book, _, packed = stored(12)
    index = RecallIndex.build([(book, packed, np.arange(700))], ROTATION, 12, engine=engine)
    whole = index.search(QUESTIONS, 6)
    monkeypatch.setattr(recall, "_BLOCK_QUESTIONS", 2)
    monkeypatch.setattr(recall, "_BLOCK_ROWS", 13)
    for one, other in zip(whole, index.search(QUESTIONS, 6), strict=True):
        assert np.array_equal(one, other)


def test_auto_takes_what_is_installed(monkeypatch):
    assert recall._choose("auto") in ("faiss", "exact")
    monkeypatch.setattr(recall.sys, "platform", "darwin")
    assert recall._choose("auto") == "exact"
    monkeypatch.setattr(recall.sys, "platform", "linux")
    assert recall._choose("auto") == "faiss"
    monkeypatch.setattr(recall.importlib.util, "find_spec", lambda name: None)
    assert recall._choose("auto") == "exact"
    with pytest.raises(UsageError, match="FAISS is not installed"):
        recall._choose("faiss")
    with pytest.raises(UsageError, match="no such search engine: 'fais'"):
        recall._choose("fais")


def test_wrong_inputs_are_named():
    book, _, packed = stored(12)
    rows = np.arange(700)
    index = RecallIndex.build([(book, packed, rows)], ROTATION, 12)
    with pytest.raises(UsageError, match=r"embeddings: '\[9, 96\] float64'"):
        index.search(QUESTIONS.astype(np.float64), 5)
    with pytest.raises(UsageError, match="k is below 1: 0"):
        index.search(QUESTIONS, 0)
    with pytest.raises(UsageError, match=r"packed addresses: '\[700, 14\] uint8'.*\[any, 27\]"):
        RecallIndex.build([(book, packed, rows)], ROTATION, 24)
    with pytest.raises(UsageError, match=r"row ids: '\[700\] int32'"):
        RecallIndex.build([(book, packed, rows.astype(np.int32))], ROTATION, 12)
    with pytest.raises(UsageError, match="a row id is given twice: 700"):
        RecallIndex.build([(book, packed, rows), (other_version(book), packed, rows)], ROTATION, 12)
    with pytest.raises(UsageError, match="codebook does not fit the rotation: 'T · d_c = 12 · 8, rotation 48'"):
        RecallIndex.build([(book, packed, rows)], Rotation.random(48, seed=0), 12)
    small = stored(12, 64)[0]
    with pytest.raises(UsageError, match="a stored code lies beyond its codebook"):
        RecallIndex.build([(small, packed, rows)], ROTATION, 12)
