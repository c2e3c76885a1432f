"""The gate, against a plain loop and by its properties."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbc_core.errors import UsageError
from mbc_core.training.gate import GateRule, change_interval, decide, mean_scores

QUICK = GateRule(min_questions=1, draws=200)
POINTS = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def answered(draw, most: int = 30):
    """Before, after and documents of some questions."""
    count = draw(st.integers(1, most))
    before, after = (np.array(draw(st.lists(POINTS, min_size=count, max_size=count))) for _ in range(2))
    names = draw(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=count, max_size=count))
    return before, after, names


def plain_loop(before, after, names, rule):
    """The bootstrap as a person would write it: draw documents, pool their questions, average, take percentiles."""
    groups: dict[object, list[float]] = {}
    for place, (one, other, name) in enumerate(zip(before, after, names, strict=True)):
        groups.setdefault(name or place, []).append(other - one)
    pools, rng, means = list(groups.values()), np.random.default_rng(rule.seed), []
    for _ in range(rule.draws):
        drawn = [pools[number] for number in rng.integers(0, len(pools), len(pools))]
        means.append(np.mean([one for pool in drawn for one in pool]))
    tail = (1 - rule.share) / 2
    return float(np.mean(after - before)), *np.quantile(means, [tail, 1 - tail])


@settings(max_examples=40, deadline=None)
@given(answered())
def test_the_interval_is_that_of_a_plain_loop(case):
    before, after, names = case
    rule = GateRule(draws=60, seed=5)
    found = change_interval(before, after, names, rule)
    assert (found.mean, found.low, found.high) == pytest.approx(plain_loop(before, after, names, rule), abs=1e-9)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0, 100, 40), rng.uniform(0, 100, 40)
    whole = change_interval(before, after, None, QUICK)
    monkeypatch.setattr("mbc_core.training.gate._DRAWN_AT_ONCE", 100)
    assert change_interval(before, after, None, QUICK) == whole


def test_the_lower_bound_is_the_fifth_percentile():
    """Of 10,000 means of one coin of 400: the normal approximation says −1.645 standard errors."""
    after = np.where(np.arange(400) % 2 == 0, 100.0, 0.0)
    found = change_interval(np.zeros(400), after, None, GateRule())
    assert found.mean == 50.0 and found.low == pytest.approx(50 - 1.645 * 2.5, abs=0.3)
    assert found.high == pytest.approx(50 + 1.645 * 2.5, abs=0.3)


def test_questions_of_one_document_fail_together():
    """Twenty copies of a question are no more proof than one."""
    rng = np.random.default_rng(1)
    after = rng.uniform(-50, 60, 30)
    alone = change_interval(np.zeros(30), after, [f"d{one}" for one in range(30)], QUICK)
    names = [f"d{one}" for one in range(30) for _ in range(20)]
    copied = change_interval(np.zeros(600), np.repeat(after, 20), names, QUICK)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    independent = change_interval(np.zeros(600), np.repeat(after, 20), None, QUICK)
    assert independent.high - independent.low < 0.5 * (alone.high - alone.low)


@settings(max_examples=40, deadline=None)
@given(answered(), st.floats(0, 20))
def test_a_better_candidate_never_fares_worse(case, more):
    before, after, names = case
    worse, better = (change_interval(before, one, names, QUICK) for one in (after, after + more))
    assert better.low >= worse.low - 1e-9
    split = {"new": before, "old": before, "canary": before}
    named = dict.fromkeys(split, names)
    first = decide(split, dict.fromkeys(split, after), named, QUICK)
    second = decide(split, dict.fromkeys(split, after + more), named, QUICK)
    assert not first.promote or second.promote


def scores(new: float, old: float, canary: float | None = None, count: int = 300):
    """Every question of a split changes alike, so every bound is that change."""
    before = {"new": np.full(count, 40.0), "old": np.full(count, 40.0), "canary": np.full(count, 40.0)}
    after = {"new": before["new"] + new, "old": before["old"] + old, "canary": before["canary"] + (canary or 0.0)}
    if canary is None:
        before["canary"] = after["canary"] = np.zeros(0)
    return before, after


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ((5.0, 0.0), "promoted"),
        ((5.0, -0.999), "promoted"),
        ((5.0, -1.0), "old worse"),  # > −1, not ≥
        ((0.0, 5.0), "new not better"),  # > 0
        ((0.001, 5.0), "promoted"),
        ((-3.0, -3.0), "old worse"),
        ((5.0, 0.0, -0.999), "promoted"),
        ((5.0, 0.0, -1.0), "promoted"),  # by more than a point
        ((5.0, 0.0, -1.001), "canary"),
        ((-5.0, -5.0, -1.001), "canary"),
    ],
)
def test_the_rule(changes, reason):
    found = decide(*scores(*changes))
    assert (found.reason, found.promote) == (reason, reason == "promoted")
    assert found.questions == {"new": 300, "old": 300, "canary": 300 if len(changes) > 2 else 0}
    assert f"{changes[0]:+.2f}" in found.sentence and ("no canary" in found.sentence) is (len(changes) == 2)


@pytest.mark.parametrize("short", ["new", "old"])
def test_too_few_questions_prove_nothing(short):
    before, after = scores(50.0, 50.0, -50.0)
    before[short], after[short] = before[short][:299], after[short][:299]
    found = decide(before, after)
    assert (found.promote, found.reason) == (False, "too few") and "299" in found.sentence
    lower = decide(before, after, rule=GateRule(min_questions=299))
    assert lower.reason == "canary" and lower.rule.min_questions == 299


def test_a_few_lucky_questions_do_not_promote():
    """One question in fifty right instead of wrong: the mean is up by 2, and the bound says nothing is proven."""
    before = {"new": np.zeros(300), "old": np.full(300, 50.0)}
    after = {"new": np.where(np.arange(300) < 2, 100.0, 0.0), "old": before["old"]}
    found = decide(before, after)
    assert found.intervals["new"].mean == pytest.approx(2 / 3) and found.reason == "new not better"


def test_no_split_at_all_is_too_few():
    assert decide({}, {}).reason == "too few"


def test_the_seed_decides_the_draws_and_nothing_else():
    rng = np.random.default_rng(2)
    before, after = rng.uniform(0, 100, 50), rng.uniform(0, 100, 50)
    assert change_interval(before, after, None, QUICK) == change_interval(before, after, None, QUICK)
    assert change_interval(before, after, None, replace(QUICK, seed=1)) != change_interval(before, after, None, QUICK)


def test_answers_that_do_not_belong_together_are_told():
    for before, after, names in (
        (np.zeros(3), np.zeros(2), None),
        (np.zeros(0), np.zeros(0), None),
        (np.zeros(2), np.zeros(2), ["a"]),
    ):
        with pytest.raises(UsageError, match="the answers before and after cannot be compared"):
            change_interval(before, after, names)
    with pytest.raises(UsageError, match="cannot be compared"):
        decide({"new": np.zeros(300)}, {})


def test_the_card_keeps_the_decision_as_json():
    told = json.loads(json.dumps(decide(*scores(5.0, 0.0, 0.0)).to_json()))
    assert told["reason"] == "promoted" and told["promote"] is True
    assert told["intervals"]["new"] == {"mean": 5.0, "low": 5.0, "high": 5.0}
    assert told["rule"] == {
        "min_questions": 300, "old_may_lose": 1.0, "canary_may_lose": 1.0, "draws": 10000, "share": 0.9, "seed": 0,
    }  # fmt: skip


def test_mean_scores():
    assert mean_scores({"new": np.array([10.0, 20.005]), "old": np.zeros(0)}) == {"new_f1": 15.0, "old_f1": 0.0}
