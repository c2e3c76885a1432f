"""Answer metrics against typed-out cases, SQuAD's published rule, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import UsageError
from mbc_core.evaluation.metrics import bootstrap, exact_match, f1, normalise, prefix_match
from mbc_core.evaluation.table import format_row, measured_row

WORDS = st.lists(st.sampled_from(["the", "a", "red", "Red", "fox", "fox.", "1,900", "été", "-"]), max_size=6).map(
    " ".join
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel-Tower, Paris!", "eiffeltower paris"),
        ("an  apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.", "us"),
        ("1,900", "1900"),
        ("the", ""),
        ("Été — été", "été — été"),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("said", "accepted", "em", "prefix", "overlap"),
    [
        ("Paris", ["Paris"], 1, 1, 1.0),
        ("paris.", ["Paris"], 1, 1, 1.0),
        ("Parisian", ["Paris"], 0, 1, 0.0),  # the paper's rule calls this right
        ("in Paris", ["Paris"], 0, 0, 2 / 3),
        ("the red fox", ["red fox jumps"], 0, 0, 2 * 2 / (2 + 3)),
        ("fox fox", ["fox"], 0, 1, 2 * 1 / (2 + 1)),
        ("", ["Paris"], 0, 0, 0.0),
        ("", ["the"], 1, 1, 1.0),
        ("anything", ["the"], 0, 0, 0.0),
        ("The anything", ["the"], 0, 1, 0.0),  # "The" normalises to nothing, as the reference does
        ("Rome", ["Paris", "Rome"], 1, 1, 1.0),
    ],
)
def test_cases_worked_out_by_hand(said, accepted, em, prefix, overlap):
    assert exact_match(said, accepted) == em
    assert prefix_match(said, accepted) == prefix
    assert f1(said, accepted) == pytest.approx(overlap)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_bounds_order_and_more_answers_never_hurt(said, answers):
    assert exact_match(said, answers) <= f1(said, answers) <= 1
    for score in (exact_match, prefix_match, f1):
        assert score(said, answers) == max(score(said, [one]) for one in answers)
        assert score(said, [*answers, said]) == 1


@given(WORDS, WORDS)
def test_f1_is_symmetric_and_that_of_a_plain_loop(one, other):
    left, right = normalise(one).split(), normalise(other).split()
    common, rest = 0, list(right)
    for word in left:
        if word in rest:
            rest.remove(word)
            common += 1
    expected = float(left == right) if not left or not right else 0.0
    if common:
        precision, recall = common / len(left), common / len(right)
        expected = 2 * precision * recall / (precision + recall)
    assert f1(one, [other]) == pytest.approx(expected)
    assert f1(one, [other]) == f1(other, [one])


def test_a_question_without_answer_is_an_error():
    with pytest.raises(UsageError, match=r"the question has no answer to compare with"):
        f1("Paris", [])


def test_bootstrap_is_seeded_and_brackets_the_mean():
    values = np.random.default_rng(3).random(200)
    found = bootstrap(values, seed=1)
    assert found == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert found.mean == values.mean() and found.low < found.mean < found.high


def test_bootstrap_has_the_width_that_theory_says():
    values = (np.arange(400) % 2).astype(float)
    found = bootstrap(values, draws=4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(400), rel=0.06)


def test_bootstrap_of_equal_values_has_no_width_and_of_none_is_an_error():
    assert bootstrap(np.full(5, 0.25)) == bootstrap(np.full(5, 0.25), seed=9)
    assert bootstrap(np.full(5, 0.25)).low == bootstrap(np.full(5, 0.25)).high == 0.25
    with pytest.raises(UsageError, match=r"there is nothing to average: \[0\]"):
        bootstrap(np.zeros(0))


def test_two_reads_are_resampled_alike_so_their_difference_is_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # what both reads share
    one, other = hard + 0.1, hard
    paired = bootstrap(one - other)
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)
    assert bootstrap(one).low - bootstrap(other).low == pytest.approx(0.1)


def test_a_row_has_the_keys_of_the_command_line_in_per_cent():
    row = measured_row(
        "recall", "default", 5, ["Paris", "Roman"], [["Paris"], ["Rome", "Roma"]],
        bytes_per_passage=75.0, prompt_tokens=180.0, milliseconds=12.0,
    )  # fmt: skip
    assert (row["em"], row["em_prefix"], row["f1"], row["questions"]) == (50.0, 100.0, 50.0, 2)
    assert row["em_low"] <= row["em"] <= row["em_high"] and row["f1_low"] <= row["f1"] <= row["f1_high"]
    assert "EM  50.0" in format_row(row) and "75.0 B" in format_row(row)
