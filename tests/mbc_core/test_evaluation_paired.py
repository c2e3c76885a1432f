"""Paired bootstrap against a plain loop, and against the bootstrap of one read."""

from __future__ import annotations

import numpy as np
import pytest

from mbc_core.errors import UsageError
from mbc_core.evaluation.metrics import bootstrap
from mbc_core.evaluation.paired import Resampled

VALUES = np.random.default_rng(5).integers(0, 2, (3, 40)) * 100.0
VALUES[1] = np.maximum(VALUES[0], VALUES[1])  # never worse than the first


def plain_loop(statistic, seed=9, draws=1000):
    """Resample questions one draw at a time; statistic: (means of the reads) → number."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, VALUES.shape[1], VALUES.shape[1])
        found.append(statistic([float(np.mean([row[one] for one in chosen])) for row in VALUES]))
    return np.quantile(found, [0.025, 0.975])


@pytest.fixture(scope="module")
def drawn() -> Resampled:
    return Resampled.of(VALUES, seed=9)


def test_one_read_has_the_interval_of_the_plain_bootstrap(drawn):
    for read in range(3):
        assert drawn.interval(read) == bootstrap(VALUES[read], seed=9)


def test_difference_share_and_ratio_are_those_of_a_plain_loop(drawn):
    found = drawn.difference(1, 0)
    assert found.mean == pytest.approx(VALUES[1].mean() - VALUES[0].mean())
    assert [found.low, found.high] == pytest.approx(plain_loop(lambda mean: mean[1] - mean[0]))
    share = drawn.share(0, 1)
    assert share.mean == pytest.approx(100 * VALUES[0].mean() / VALUES[1].mean())
    assert [share.low, share.high] == pytest.approx(plain_loop(lambda mean: 100 * mean[0] / mean[1]))
    ratio = drawn.ratio((0, None), (1, None))
    assert ratio == share


def test_pairing_sees_what_is_common(drawn):
    """A read that is never worse is never below 0 in any draw."""
    assert drawn.difference(1, 0).low > 0
    assert drawn.interval(0).high >= drawn.interval(1).low, "though the intervals by themselves touch"
    assert drawn.difference(2, 2) == type(drawn.difference(0, 0))(0.0, 0.0, 0.0)


def test_a_ratio_of_differences_is_that_of_a_plain_loop():
    values = np.stack([np.full(40, 10.0), np.linspace(30, 60, 40), np.linspace(50, 90, 40)])
    drawn = Resampled.of(values, seed=2)
    found = drawn.ratio((1, 0), (2, 0))
    assert found.mean == pytest.approx(100 * (45 - 10) / (70 - 10))
    rng, loop = np.random.default_rng(2), []
    for _ in range(1000):
        chosen = rng.integers(0, 40, 40)
        loop.append(100 * (values[1, chosen].mean() - 10) / (values[2, chosen].mean() - 10))
    assert [found.low, found.high] == pytest.approx(np.quantile(loop, [0.025, 0.975]))


def test_a_ratio_to_next_to_nothing_says_nothing():
    nothing = Resampled.of(np.array([[100.0] * 8, [0.0] * 8, [100.0] + [0.0] * 7]))
    assert nothing.share(0, 1) is None
    assert nothing.share(0, 2) is None, "one question in eight is missed by a third of the draws"
    assert nothing.ratio((0, None), (1, 0)) is None, "a negative denominator"
    assert nothing.share(1, 0).mean == 0.0


def test_the_seed_decides(drawn):
    again, other = Resampled.of(VALUES, seed=9), Resampled.of(VALUES, seed=10)
    assert (again.draws == drawn.draws).all() and (other.draws != drawn.draws).any()


@pytest.mark.parametrize("values", [np.zeros((2, 0)), np.zeros(4)])
def test_nothing_to_average(values):
    with pytest.raises(UsageError, match="there is nothing to average"):
        Resampled.of(values)
