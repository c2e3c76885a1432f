"""The gate: whether a candidate adapter may go live.

Both adapters answered the same held-out questions. Of each question's F1 the change (after − before) is taken, and its
mean gets an interval by a paired bootstrap: documents are drawn with replacement, all questions of one together, since
questions about one document fail together. The interval is two-sided at 90%, so the lower bound that the rule
compares is the 5th percentile of the resampled means. The rule, in this order:

1. ``too few``: fewer than 300 new or 300 old questions; nothing can be said of the rest then;
2. ``canary``: the mean on the canary set fell by more than one point. The mean itself is compared, not a bound: the
   set is always the same, so a fall is seen again tomorrow, and what is promoted has fallen by one point at most;
3. ``old worse``: the lower bound on old documents is not above −1 point;
4. ``new not better``: the lower bound on new documents is not above 0;
5. ``promoted``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.metrics import Interval
from schemas.results import AdaptScores

Float64 = NDArray[np.float64]
Reason = Literal["promoted", "too few", "canary", "old worse", "new not better"]
PerQuestion = Mapping[str, Float64]
"""Split (``new``, ``old``, ``canary``) → F1 of each question in points, 0 to 100: float64 [n]."""

_DRAWN_AT_ONCE = 2_000_000


@dataclass(frozen=True, slots=True)
class GateRule:
    """The gate's numbers.

    Attributes:
        min_questions: fewest new and fewest old questions.
        old_may_lose, canary_may_lose: points of F1.
        draws, share, seed: resamples, size of the two-sided interval, and the seed of the bootstrap.
    """

    min_questions: int = 300
    old_may_lose: float = 1.0
    canary_may_lose: float = 1.0
    draws: int = 10_000
    share: float = 0.90
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate says.

    Attributes:
        promote: whether the candidate may go live.
        reason: one of five words for programs; ``sentence``: the same for people, with the figures.
        intervals: split → change of F1 in points with its interval; splits without questions are left out.
        questions: split → how many were asked.
        rule: that was applied.
    """

    promote: bool
    reason: Reason
    sentence: str
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    questions: Mapping[str, int] = field(default_factory=dict)
    rule: GateRule = field(default_factory=GateRule)

    def to_json(self) -> dict[str, Any]:
        """As cards keep it; figures to three decimals."""
        shown = {
            split: {name: round(value, 3) for name, value in asdict(one).items()}
            for split, one in self.intervals.items()
        }
        return {
            "promote": self.promote,
            "reason": self.reason,
            "sentence": self.sentence,
            "intervals": shown,
            "questions": dict(self.questions),
            "rule": asdict(self.rule),
        }


def decide(
    before: PerQuestion,
    after: PerQuestion,
    documents: Mapping[str, Sequence[str]] | None = None,
    rule: GateRule | None = None,
) -> Decision:
    """Apply the rule of this module.

    Args:
        before, after: of the adapter that is live and of the candidate, question by question in one order. A split
            that is missing has no questions.
        documents: split → the document of each question; an empty name, or None for all: each has its own.

    Raises:
        UsageError: before and after are not of the same questions.
    """
    rule = rule or GateRule()
    intervals, questions = {}, {}
    for split in ("new", "old", "canary"):
        one, other = before.get(split, np.zeros(0)), after.get(split, np.zeros(0))
        questions[split] = len(one)
        if len(one) or len(other):
            intervals[split] = change_interval(one, other, (documents or {}).get(split), rule)
    promote, reason, told = _verdict(intervals, questions, rule)
    return Decision(promote, reason, f"{told}: {_figures(intervals, questions)}", intervals, questions, rule)


def mean_scores(scores: PerQuestion) -> AdaptScores:
    """Means as cards show them, to two decimals; 0 without questions."""
    new, old = (round(float(scores[one].mean()), 2) if len(scores.get(one, ())) else 0.0 for one in ("new", "old"))
    return {"new_f1": new, "old_f1": old}


def change_interval(
    before: Float64, after: Float64, documents: Sequence[str] | None = None, rule: GateRule | None = None
) -> Interval:
    """Mean of ``after − before`` [n] with its bootstrap interval over documents.

    Raises:
        UsageError: no questions, or arrays that are not of the same questions.
    """
    rule = rule or GateRule()
    names = documents if documents is not None else [""] * len(before)
    if before.ndim != 1 or before.shape != after.shape or len(names) != len(before) or not len(before):
        raise UsageError(
            "the answers before and after cannot be compared",
            value=[list(before.shape), list(after.shape), len(names)],
            cause="they are not of the same questions, or there are none",
            fix="judge both adapters on the same held-out questions",
        )
    change = after - before
    place = _clusters(names)
    sums, sizes = np.bincount(place, change).astype(np.float64), np.bincount(place).astype(np.float64)
    means = _resampled(sums, sizes, rule)
    low, high = np.quantile(means, [(1 - rule.share) / 2, (1 + rule.share) / 2])
    return Interval(float(change.mean()), float(low), float(high))


def _clusters(names: Sequence[str]) -> NDArray[np.int64]:
    """Number of each question's document, in order of first appearance; unnamed ones are alone."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name or (place,), len(numbers)) for place, name in enumerate(names)])


def _resampled(sums: Float64, sizes: Float64, rule: GateRule) -> Float64:
    """Mean over questions of ``draws`` samples of documents: float64 [draws]."""
    rng, count = np.random.default_rng(rule.seed), len(sums)
    means = np.empty(rule.draws)
    block = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, rule.draws, block):
        drawn = rng.integers(0, count, (min(block, rule.draws - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def _verdict(
    intervals: Mapping[str, Interval], questions: Mapping[str, int], rule: GateRule
) -> tuple[bool, Reason, str]:
    """(promote, reason, what it means)."""
    if min(questions["new"], questions["old"]) < rule.min_questions:
        return False, "too few", f"too few held-out questions, the gate wants {rule.min_questions} of each"
    if "canary" in intervals and intervals["canary"].mean < -rule.canary_may_lose:
        return False, "canary", f"the canary set may lose at most {rule.canary_may_lose:g} points"
    if not intervals["old"].low > -rule.old_may_lose:
        return False, "old worse", f"old documents may have lost more than {rule.old_may_lose:g} points"
    if not intervals["new"].low > 0:
        return False, "new not better", "new documents are not surely read better"
    return True, "promoted", "new documents are read better, old ones no worse"


def _figures(intervals: Mapping[str, Interval], questions: Mapping[str, int]) -> str:
    """The changes, for people."""
    told = []
    for split, count in questions.items():
        one = intervals.get(split)
        shown = "" if one is None else f"F1 {one.mean:+.2f} [{one.low:+.2f}, {one.high:+.2f}] on "
        told.append(f"{shown}{count} {split} questions" if count else f"no {split} questions")
    return ", ".join(told)
