"""Paired bootstrap: many reads of the same questions, resampled together.

Every read is drawn with the same questions, so an interval of a difference or of a ratio knows that a hard question
is hard for both. The draws are those of :func:`mbc_core.evaluation.metrics.bootstrap`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.metrics import Interval

Float64 = NDArray[np.float64]
DRAWS = 1000
SHARE = 0.95


@dataclass(frozen=True, eq=False)
class Resampled:
    """Means of m reads over n questions, as they are and over resampled questions.

    Attributes:
        means: float64 [m].
        draws: float64 [draws, m].
    """

    means: Float64
    draws: Float64

    @classmethod
    def of(cls, values: Float64, *, seed: int = 0, draws: int = DRAWS) -> Resampled:
        """Resample the questions of ``values`` [m, n] with replacement, all reads alike.

        Raises:
            UsageError: there are no questions.
        """
        if values.ndim != 2 or not values.shape[1]:
            raise UsageError("there is nothing to average", value=list(values.shape), fix="give at least one question")
        rng = np.random.default_rng(seed)
        total = values.shape[1]
        means = np.empty((draws, len(values)))
        for draw in range(draws):
            means[draw] = values[:, rng.integers(0, total, total)].mean(axis=1)
        return cls(values.mean(axis=1), means)

    def interval(self, read: int) -> Interval:
        """Mean of one read with its percentile interval."""
        return _interval(float(self.means[read]), self.draws[:, read])

    def difference(self, read: int, reference: int) -> Interval:
        """Read minus reference."""
        return _interval(
            float(self.means[read] - self.means[reference]), self.draws[:, read] - self.draws[:, reference]
        )

    def share(self, read: int, reference: int) -> Interval | None:
        """100 · read / reference; None when the reference is next to nothing (see :meth:`ratio`)."""
        return self.ratio((read, None), (reference, None))

    def ratio(self, above: tuple[int, int | None], below: tuple[int, int | None]) -> Interval | None:
        """100 · (a − b) / (c − d) for ``above`` = (a, b) and ``below`` = (c, d); a None is 0.

        Returns:
            None where the denominator is not positive in the data, or in more than 1 in 100 draws: a ratio to
            next to nothing says nothing.
        """
        top, top_draws = self._minus(*above)
        bottom, bottom_draws = self._minus(*below)
        usable = bottom_draws > 0
        if bottom <= 0 or usable.mean() < 0.99:
            return None
        return _interval(100 * top / bottom, 100 * top_draws[usable] / bottom_draws[usable])

    def _minus(self, read: int, other: int | None) -> tuple[float, Float64]:
        if other is None:
            return float(self.means[read]), self.draws[:, read]
        return float(self.means[read] - self.means[other]), self.draws[:, read] - self.draws[:, other]


def _interval(mean: float, draws: Float64) -> Interval:
    tail = (1 - SHARE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))
