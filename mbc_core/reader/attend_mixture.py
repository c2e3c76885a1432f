"""Several passages read each in a prompt of its own: how much every one has to say.

The prompts of one question are tied (:func:`mbc_core.reader.generate.greedy`): every step's distribution is the mean of
theirs, weighted by p(passage | question) = softmax(score / temperature) of the scores that the search ranked by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbc_core.errors import UsageError

TEMPERATURE = 0.02
"""Where the passage that answers was likeliest among the five best of held-out SQuAD-like questions, by the scores that
the query map of T = 24 gives (0.005 to 0.3 were tried). News was likeliest at 0.04; 0.05 reads it as well as 0.02, and
the others worse."""


def passage_weights(scores: Sequence[float]) -> list[float]:
    """p(passage | question) of one question's passages, which sum to 1; none for none.

    Args:
        scores: of the search, any number of them, higher is better; only their differences matter.

    Raises:
        UsageError: a score is no finite number.
    """
    if not len(scores):
        return []
    exact = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(exact).all():
        raise UsageError(
            "a passage's score is not a number",
            value=exact.tolist(),
            cause="the scores did not come from a search",
            fix="give the scores that the passages were found with",
        )
    likely = np.exp((exact - exact.max()) / TEMPERATURE)
    weights: list[float] = (likely / likely.sum()).tolist()
    return weights
