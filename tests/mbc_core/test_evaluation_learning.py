"""Learning beside frozen on the same stream: the same passages, the chain's own versions, recall by hand."""

from __future__ import annotations

import numpy as np
import pytest
from codebook_data import codebook_of, topical_embeddings

from mbc_core.codebook.update import UpdateRule
from mbc_core.codes import Rotation, decode, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.evaluation.learning import Stream, compare, cut_windows
from mbc_core.recall import exhaustive_scores

SLOTS, WIDTH, COUNT = 4, 32, 240
ROTATION = Rotation.random(WIDTH, seed=1)
EAGER = UpdateRule(tau=200.0, anchor=200.0, dead_share=0.0, min_vectors=1, growth=0, judged=False)


def stream() -> Stream:
    embeddings = topical_embeddings(COUNT, WIDTH)
    rows = np.arange(0, COUNT, 3)
    noise = 0.1 * np.random.default_rng(5).standard_normal((len(rows), WIDTH)).astype(np.float32)
    keys = np.repeat(np.arange(COUNT // 2), 2)  # two passages a document
    return Stream(embeddings, keys, np.tile(np.array([0, 1], np.int32), COUNT // 2), embeddings[rows] + noise, rows)


BOOK = codebook_of(to_slots(stream().embeddings, ROTATION, SLOTS)[:60], 12)
WINDOWS = cut_windows(stream().keys, 40)


def test_windows_are_whole_documents_and_the_rest_joins_the_last():
    keys = np.array([1, 1, 1, 2, 3, 3, 4, 5], np.int64)
    assert cut_windows(keys, 2) == [(0, 3), (3, 6), (6, 8)]
    assert cut_windows(keys, 3) == [(0, 3), (3, 8)]
    assert cut_windows(keys, 5) == [(0, 8)]
    assert cut_windows(keys[:1], 5) == [(0, 1)]
    assert cut_windows(keys[:0], 5) == []


def test_versions_lag_two_windows_and_frozen_never_moves():
    steps = list(compare(stream(), BOOK, ROTATION, SLOTS, WINDOWS, [EAGER, None]))
    assert [one.sides[0].version for one in steps] == [0, 0, 1, 2, 3, 4]
    assert [one.sides[0].published for one in steps] == [1, 2, 3, 4, 5, 6]
    assert {one.sides[1].version for one in steps} == {0}
    assert {one.sides[1].published for one in steps} == {None}
    assert [(one.start, one.end) for one in steps] == WINDOWS


def test_frozen_figures_are_those_of_a_plain_computation():
    given = stream()
    vectors = to_slots(given.embeddings, ROTATION, SLOTS)
    codes = quantize(vectors, BOOK.codewords)
    stored = decode(codes, BOOK.codewords)
    for one in compare(given, BOOK, ROTATION, SLOTS, WINDOWS, [EAGER, None]):
        here = slice(one.start, one.end)
        counts = np.bincount(codes[here].ravel(), minlength=12)
        share = counts[counts > 0] / counts.sum()
        assert one.sides[1].used == pytest.approx((counts > 0).mean())
        assert one.sides[1].perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()) / 12)
        wrong = ((vectors[here].reshape(-1, WIDTH) - stored[here]) ** 2).sum() / (vectors[here] ** 2).sum()
        assert one.sides[1].error == pytest.approx(wrong, rel=1e-4)
        assert one.asked.tolist() == [number for number, row in enumerate(given.rows) if row < one.end]
        scores = exhaustive_scores(given.questions[one.asked], ROTATION, codes[: one.end], BOOK.codewords)
        for question, (first, fifth) in enumerate(one.sides[1].hits):
            row = given.rows[one.asked[question]]
            above = int((scores[question] > scores[question, row] + 1e-5).sum())
            tied = int((np.abs(scores[question] - scores[question, row]) <= 1e-5).sum())
            if tied == 1:  # equal codes tie, and the search breaks ties by the row
                assert (first, fifth) == (above < 1, above < 5)


def test_learning_changes_what_is_found():
    last = list(compare(stream(), BOOK, ROTATION, SLOTS, WINDOWS, [EAGER, None]))[-1]
    assert last.sides[0].error < last.sides[1].error
    assert (last.sides[0].hits != last.sides[1].hits).any()


def test_wrong_windows_are_refused():
    for windows in ([(0, 10)], [(0, 200), (201, COUNT)], [(0, 0), (0, COUNT)]):
        with pytest.raises(UsageError, match="windows do not cut the stream"):
            list(compare(stream(), BOOK, ROTATION, SLOTS, windows, [None]))


def test_a_stream_that_does_not_fit_is_refused():
    one = stream()
    with pytest.raises(UsageError, match="wrong shape or dtype of the questions' passages"):
        Stream(one.embeddings, one.keys, one.passages, one.questions, one.rows[1:])
