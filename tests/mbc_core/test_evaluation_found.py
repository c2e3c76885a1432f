"""R@k against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mbc_core.evaluation.found import nearest_by_float, recall_at
from mbc_core.evaluation.metrics import bootstrap


def test_float_search_is_the_plain_sort():
    rng = np.random.default_rng(0)
    questions, passages = rng.standard_normal((300, 8)).astype(np.float32), rng.standard_normal((30, 8))
    passages = passages.astype(np.float32)
    found = nearest_by_float(questions, passages, 7)
    for number in range(300):
        scores = [(-float(questions[number] @ one), row) for row, one in enumerate(passages)]
        assert found[number].tolist() == [row for _, row in sorted(scores)[:7]]
    assert nearest_by_float(questions[:2], passages[:3], 10).shape == (2, 3)


def test_equal_scores_go_to_the_smaller_row():
    same = np.ones((4, 2), np.float32)
    assert nearest_by_float(same[:1], same, 3).tolist() == [[0, 1, 2]]


def test_shares_are_counted_and_missing_passages_are_misses():
    right = np.array([3, 0, -1, 2])
    by_code = np.array([[3, 1], [1, 0], [-1, 5], [4, 5]])
    by_float = np.array([[3, 1], [0, 1], [5, 6], [2, 4]])
    one, two = recall_at(right, by_code, by_float, depths=(1, 2), seed=3)
    assert (one["k"], one["by_code"], one["by_float"]) == (1, 25.0, 75.0)
    assert (two["by_code"], two["by_float"]) == (50.0, 75.0)
    expected = bootstrap(np.array([100.0, 0.0, 0.0, 0.0]), seed=3)
    assert (one["by_code_low"], one["by_code_high"]) == (expected.low, expected.high)


def test_the_share_of_float():
    right = np.zeros(50, dtype=np.int64)
    by_code = (np.arange(50) % 5 == 0).astype(np.int64)[:, None]  # one in five finds another row
    (row,) = recall_at(right, by_code, np.zeros((50, 1), dtype=np.int64), depths=(1,))
    assert (row["by_code"], row["by_float"], row["share"]) == (80.0, 100.0, 80.0)
    assert row["share_low"] < 80 < row["share_high"]


def test_without_float():
    (row,) = recall_at(np.array([0]), np.array([[0]]), None, depths=(1,))
    assert (row["by_code"], row["by_float"], row["share"]) == (100.0, None, None)
    with pytest.raises(Exception, match="nothing to average"):
        recall_at(np.zeros(0, np.int64), np.zeros((0, 1), np.int64), None)
