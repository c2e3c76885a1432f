"""Dated streams: quarters, halves, what was asked when, and their files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.dated_stream import half_of, load_stream, number_quarters, quarter_of, save_stream
from tests.mbc_core.nightly_stream import STREAM


def test_dates_fall_into_calendar_quarters():
    dates = ["2024-01-01", "2024-03-31", "2024-04-01", "2024-09-30T23:59:59Z", "2026-12"]
    assert [quarter_of(one) for one in dates] == ["2024Q1", "2024Q1", "2024Q2", "2024Q3", "2026Q4"]
    for wrong in ("", "2024", "24-01-01", "2024-13-01", "yesterday"):
        with pytest.raises(UsageError, match="a document has no date"):
            quarter_of(wrong)


def test_a_quarter_of_few_documents_joins_the_one_before():
    dates = ["2024-07-01"] * 4 + ["2024-10-01"] * 5 + ["2025-01-01"] * 2
    assert number_quarters(dates, 3) == (["2024Q3", "2024Q4+"], [0] * 4 + [1] * 7)
    assert number_quarters(dates, 2) == (["2024Q3", "2024Q4", "2025Q1"], [0] * 4 + [1] * 5 + [2] * 2)
    assert number_quarters(dates[::-1], 3)[1] == [1] * 7 + [0] * 4  # whatever the order
    assert number_quarters(["2024-01-01", *dates], 3)[0] == ["2024Q1+", "2024Q4+"]  # a thin first one: the one after


@given(st.lists(st.tuples(st.integers(2020, 2026), st.integers(1, 12)), min_size=1, max_size=60), st.integers(1, 9))
def test_quarters_keep_the_order_of_time_and_hold_enough(months, least):
    dates = [f"{year}-{month:02d}-05" for year, month in months]
    names, numbers = number_quarters(dates, least)
    assert sorted(set(numbers)) == list(range(len(names))) and names == sorted(names)
    by_time = [number for _, number in sorted(zip(dates, numbers, strict=True))]
    assert by_time == sorted(by_time)
    assert len(names) == 1 or min(Counter(numbers).values()) >= least


def test_halves_follow_the_key():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63, 2000)
    assert {half_of(int(key)) for key in keys} == {0, 1}
    assert 900 < sum(half_of(int(key)) for key in keys) < 1100
    assert [half_of(one) for one in (-3, -2, 0, 5)] == [1, 0, 0, 1]


def test_questions_are_selected_by_quarter_half_kind_and_hold_out():
    chosen = STREAM.select([1], ("asked", "cloze"), half=1, held_out=False)
    assert [(STREAM.questions[one].document, STREAM.questions[one].kind) for one in chosen] == [
        (document, kind) for document in (11, 13, 17, 19) for kind in ("asked", "cloze")
    ]
    halves = [set(STREAM.select(range(3), ("asked", "cloze", "gate"), half=half)) for half in (0, 1)]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == len(STREAM.questions)


def test_questions_are_not_asked_before_their_document_came():
    (question,) = STREAM.select([2], half=0)[:1]
    assert len(STREAM.rows(2, question)) == 8
    with pytest.raises(UsageError, match=r"was not asked after this quarter: '2024Q4, question \d+'"):
        STREAM.rows(1, question)
    rows, owners = STREAM.held(1)
    assert rows.tolist() == owners.tolist() == list(range(20))


def test_a_stream_comes_back_from_its_file(tmp_path):
    save_stream(tmp_path / "one.json.gz", STREAM)
    assert load_stream(tmp_path / "one.json.gz") == STREAM
    save_stream(tmp_path / "two.json.gz", STREAM)
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"owners": (99, *STREAM.owners[1:])}, "a document that it does not hold"),
        ({"words": STREAM.words[:-1]}, "different lengths"),
        ({"recalled": ({0: (0, 77)}, *STREAM.recalled[1:])}, "a row that it does not hold"),
        ({"recalled": ({9999: (0,)}, *STREAM.recalled[1:])}, "a question that it does not hold"),
    ],
)
def test_a_file_that_names_what_it_lacks_is_damaged(tmp_path, change, cause):
    save_stream(tmp_path / "s.json.gz", replace(STREAM, **change))
    with pytest.raises(DamagedFile, match=cause):
        load_stream(tmp_path / "s.json.gz")


def test_a_cut_file_is_damaged(tmp_path):
    save_stream(tmp_path / "s.json.gz", STREAM)
    (tmp_path / "s.json.gz").write_bytes((tmp_path / "s.json.gz").read_bytes()[:99])
    with pytest.raises(DamagedFile, match=r"cannot be read.*make it again"):
        load_stream(tmp_path / "s.json.gz")
