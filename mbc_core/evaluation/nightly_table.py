"""Figures of the nightly proof: per quarter and arm, and its goals, with intervals by document.

Every figure pools both halves where both were run: a question is always answered by an adapter that was never trained
on its document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.metrics import Interval
from mbc_core.training.gate import GateRule, change_interval

SURE = GateRule(share=0.95)
BETTER, MAY_LOSE, NEAR_TEXT, MAX_SECONDS = 2.0, 1.0, 5.0, 120.0
"""The goals: F1 above the frozen adapter, F1 lost from the best, F1 below full text, seconds a quarter."""

Scores = Mapping[int, float]
"""Question → points."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One arm after one quarter, its halves together.

    Attributes:
        f1, em: of each question, in points, from the bank as it was.
        final: F1 of the same questions from the bank as it is at the end, read by the adapter of this quarter.
        shuffled: F1 from a shuffled bank, where it was asked.
        seconds: of the slowest half's adaptation; None for arms that do not learn.
        gates: half → what the gate said.
    """

    f1: Scores
    em: Scores
    final: Scores
    shuffled: Scores
    seconds: float | None
    gates: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Results:
    """Everything a run wrote.

    Attributes:
        quarters: their names. document, quarter: of each question.
        arms: arm → its quarters, as many as all its halves have done.
        halves: arm → halves that were run.
        made_of: what the results have in common.
    """

    quarters: Sequence[str]
    document: Sequence[int]
    quarter: Sequence[int]
    device: str
    arms: Mapping[str, Sequence[Evaluated]]
    halves: Mapping[str, Sequence[str]]
    made_of: Mapping[str, Any] = field(default_factory=dict)

    def new(self, arm: str, quarters: Sequence[int]) -> dict[int, float]:
        """F1 of each question right after its own quarter."""
        return {
            question: value
            for quarter in quarters
            for question, value in self.arms[arm][quarter].f1.items()
            if self.quarter[question] == quarter
        }

    def old(self, arm: str, quarter: int) -> dict[int, float]:
        """F1 after ``quarter`` of each question of the quarters before."""
        return {
            question: value
            for question, value in self.arms[arm][quarter].f1.items()
            if self.quarter[question] < quarter
        }

    def change(self, one: Scores, other: Scores) -> Interval:
        """Mean of ``one − other`` over the questions that both hold, 95% interval by document.

        Raises:
            UsageError: they share no question.
        """
        both = sorted(set(one) & set(other))
        if not both:
            raise UsageError("nothing can be compared", value="0 questions", fix="run both arms on the same halves")
        before, after = (np.array([side[question] for question in both], dtype=np.float64) for side in (other, one))
        return change_interval(before, after, [f"{self.document[question]}" for question in both], SURE)


def load_results(folder: Path) -> Results:
    """Read what a run wrote so far.

    Raises:
        UsageError: there is nothing.
        DamagedFile: a file cannot be read.
    """
    try:
        facts = json.loads((folder / "stream.json").read_text("utf-8"))
        told: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for path in sorted(folder.glob("*-[01]")):
            name, _, half = path.name.rpartition("-")
            rows = [json.loads(one.read_text("utf-8")) for one in sorted(path.glob("q[0-9][0-9].json"))]
            if rows:
                told.setdefault(name, {})[half] = rows
    except FileNotFoundError as error:
        raise UsageError("there are no results", value=str(folder), fix="name the --out of `run`") from error
    except (OSError, ValueError) as error:
        raise DamagedFile("a result cannot be read", value=str(folder), cause=str(error), fix="run again") from error
    if not told:
        raise UsageError("there are no results", value=str(folder), cause="no quarter is done", fix="run an arm")
    first = next(iter(next(iter(told.values())).values()))[0]
    return Results(
        facts["quarters"], facts["document"], facts["quarter"], facts["device"],
        {name: [_pooled([rows[number] for rows in halves.values()])
                for number in range(min(len(rows) for rows in halves.values()))] for name, halves in told.items()},
        {name: sorted(halves) for name, halves in told.items()},
        {name: first[name] for name in ("stream", "base", "choices", "seed")},
    )  # fmt: skip


def _pooled(halves: Sequence[Mapping[str, Any]]) -> Evaluated:
    def joined(part: str, metric: str) -> dict[int, float]:
        scored = [one[part] for one in halves if part in one]
        return {
            question: value for one in scored for question, value in zip(one["questions"], one[metric], strict=True)
        }

    seconds = [float(one["adapt_seconds"]) for one in halves if "adapt_seconds" in one]
    return Evaluated(
        joined("scores", "f1"),
        joined("scores", "em"),
        joined("final", "f1"),
        joined("shuffled", "f1"),
        max(seconds) if seconds else None,
        {str(one["half"]): one["gate"] for one in halves if "gate" in one},
    )


def table_rows(results: Results) -> list[dict[str, Any]]:
    """EM and F1 of every arm after every quarter: on its own questions and on all earlier ones."""
    rows = []
    for arm, evaluated in results.arms.items():
        for quarter, one in enumerate(evaluated):
            row: dict[str, Any] = {"arm": arm, "quarter": results.quarters[quarter], "adapt_seconds": one.seconds}
            of = {question: results.quarter[question] for question in one.f1}
            parts = {"new": [question for question, came in of.items() if came == quarter],
                     "old": [question for question, came in of.items() if came < quarter]}  # fmt: skip
            for part, chosen in parts.items():
                row[f"{part}_questions"] = len(chosen)
                row[f"{part}_em"] = _mean([one.em[question] for question in chosen])
                row[f"{part}_f1"] = _mean([one.f1[question] for question in chosen])
            row["gate"] = {half: told["reason"] for half, told in one.gates.items()}
            rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal: what was asked, what was found, and whether it is met; None: an arm is missing."""

    says: str
    found: Interval | None
    met: bool | None
    detail: str = ""


def goals(results: Results, arm: str = "nightly") -> list[Goal]:
    """The goals of the proof, for ``arm``, over the last half of the quarters that it and its rival have done."""
    made = [_against_frozen(results, arm), *_old_loss(results, arm), _against_text(results, arm)]
    spent = [one.seconds for one in results.arms.get(arm, ()) if one.seconds is not None]
    slowest = max(spent) if spent else None
    told = "" if slowest is None else f"slowest {slowest:.1f} s on {results.device}"
    met = None if slowest is None else slowest <= MAX_SECONDS
    return [*made, Goal(f"a quarter's adaptation takes at most {MAX_SECONDS:.0f} s", None, met, told)]


def last_half(results: Results, *arms: str) -> list[int]:
    """Numbers of the last half of the stream's quarters, as far as all of ``arms`` have done them."""
    done = min((len(results.arms.get(arm, ())) for arm in arms), default=0)
    return [quarter for quarter in range(len(results.quarters) // 2, len(results.quarters)) if quarter < done]


def new_change(results: Results, arm: str, rival: str) -> Interval | None:
    """F1 of ``arm`` − ``rival`` on new questions over the last half; None when one is missing."""
    quarters = last_half(results, arm, rival)
    return results.change(results.new(arm, quarters), results.new(rival, quarters)) if quarters else None


def largest_loss(results: Results, arm: str, *, same_bank: bool) -> tuple[Interval, int] | None:
    """How much of what it once answered an arm has lost at the end.

    For every earlier quarter t, the same questions (those of quarters up to t) are compared after t and at the end;
    the largest fall of their mean F1 counts.

    Args:
        same_bank: both adapters read the bank of the end, so that only the adapter's forgetting counts; else each
            reads the bank of its time. The bank grows meanwhile and recalls less surely, so a frozen adapter loses too.

    Returns:
        (fall in points, positive when lost, with its interval; t), or None before the second quarter, or where the
        arm was not asked so.
    """
    evaluated = results.arms.get(arm, ())
    end = len(evaluated) - 1
    if same_bank and end + 1 < len(results.quarters):
        return None
    found: list[tuple[Interval, int]] = []
    for quarter, one in enumerate(evaluated[:end]):
        then = one.final if same_bank else one.f1
        if then:
            found.append((results.change(then, evaluated[end].f1), quarter))
    return max(found, key=lambda one: one[0].mean) if found else None


def _against_frozen(results: Results, arm: str) -> Goal:
    found = new_change(results, arm, "frozen")
    met = None if found is None else found.mean >= BETTER and found.low > 0
    says = f"new questions, last half: {arm} ≥ frozen + {BETTER:g} F1, interval excludes 0"
    return _when_whole(results, Goal(says, found, met), arm, "frozen")


def _against_text(results: Results, arm: str) -> Goal:
    below = new_change(results, "text", arm)
    met = None if below is None else below.mean <= NEAR_TEXT
    says = f"new questions, last half: at most {NEAR_TEXT:g} F1 below the full-text reader"
    return _when_whole(results, Goal(says, below, met), arm, "text")


def _when_whole(results: Results, goal: Goal, *arms: str) -> Goal:
    """No verdict before every quarter is done by all of ``arms``."""
    done, total = (len(last_half(results, *arms)), len(results.quarters) - len(results.quarters) // 2)
    return goal if done == total else replace(goal, met=None, detail=f"{done} of {total} quarters are done")


def _old_loss(results: Results, arm: str) -> list[Goal]:
    goals = []
    for same_bank, bank in ((True, "same bank: the adapter's forgetting"), (False, "with the bank's growth")):
        says = f"old questions: at most {MAY_LOSE:g} F1 below their best ({bank})"
        own = largest_loss(results, arm, same_bank=same_bank)
        if own is None:
            goals.append(Goal(says, None, None))
            continue
        told = f"largest since {results.quarters[own[1]]}"
        frozen = None if same_bank else largest_loss(results, "frozen", same_bank=False)
        if frozen is not None:
            told += f"; frozen {frozen[0].mean:+.2f} since {results.quarters[frozen[1]]}"
        goals.append(_when_whole(results, Goal(says, own[0], own[0].mean <= MAY_LOSE, told), arm))
    return goals


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 2) if values else None
