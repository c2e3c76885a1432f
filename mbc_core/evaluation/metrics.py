"""Answer metrics: SQuAD's exact match and F1, the paper's prefix match, and bootstrap intervals.

All take the best over the accepted answers. Scores are 0 or 1, F1 lies in [0, 1]; tables print per cent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces.

    >>> normalise("The  Eiffel-Tower, of Paris!")
    'eiffeltower of paris'
    """
    lowered = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normal form equals that of an accepted answer (strict EM).

    Raises:
        UsageError: no answers are given.
    """
    return _best(lambda answer: float(normalise(prediction) == normalise(answer)), answers)


def prefix_match(prediction: str, answers: Sequence[str]) -> float:
    """The paper's EM: the prediction is cut to the reference's length in characters before comparing.

    "Parisian" matches "Paris", and an answer that normalises to nothing always matches: always label it.
    """
    return _best(lambda answer: float(normalise(prediction[: len(answer)]) == normalise(answer)), answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD's token F1, best over the accepted answers."""
    return _best(lambda answer: _token_f1(normalise(prediction).split(), normalise(answer).split()), answers)


def bootstrap(values: NDArray[np.float64], *, seed: int = 0, draws: int = 1000, share: float = 0.95) -> Interval:
    """Percentile interval of the mean of ``values`` [n] over questions drawn with replacement.

    The draws depend on the seed and n alone: two reads of the same questions are resampled alike, so their
    difference may be put in here too (a paired bootstrap).

    Raises:
        UsageError: there are no values.
    """
    if values.ndim != 1 or not len(values):
        raise UsageError("there is nothing to average", value=list(values.shape), fix="give at least one question")
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        means[draw] = values[rng.integers(0, len(values), len(values))].mean()
    tail = (1 - share) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def _best(score: Callable[[str], float], answers: Sequence[str]) -> float:
    if not answers:
        raise UsageError("the question has no answer to compare with", value=[], fix="give `answer` or `answers`")
    return max(score(answer) for answer in answers)


def _token_f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))
