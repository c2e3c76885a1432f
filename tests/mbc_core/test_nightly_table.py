"""Figures of the nightly proof from hand-made results: tables, goals, losses, and the plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.line_plot import Panel, lines_svg, ticks
from mbc_core.evaluation.nightly_table import goals, largest_loss, last_half, load_results, new_change, table_rows
from tests.bench.nightly_report import report

QUARTERS = ["2024Q3", "2024Q4", "2025Q1", "2025Q2"]
EACH = 40  # questions a quarter: even ones are scored in half 0, odd ones in half 1
MADE_OF = {"stream": "x", "base": "b", "choices": {"steps": 1}, "seed": 0}


def write(
    folder: Path, arm: str, half: int, f1, *, final=None, seconds: float | None = 10.0, quarters: int = 4
) -> None:
    """``f1(quarter, question's quarter, question)`` → points."""
    place = folder / f"{arm}-{half}"
    place.mkdir(parents=True)
    for quarter in range(quarters):
        asked = [one for one in range((quarter + 1) * EACH) if one % 2 == half]
        values = [float(f1(quarter, one // EACH, one)) for one in asked]
        told = MADE_OF | {"half": half, "scores": {"questions": asked, "f1": values, "em": [v / 2 for v in values]}}
        if seconds is not None:
            told |= {"adapt_seconds": seconds + half}
            told["gate"] = {"reason": "too few", "sentence": "too few held-out questions", "promote": False}
        if final is not None and quarter < 3:
            told["final"] = told["scores"] | {"f1": [float(final(quarter, one // EACH, one)) for one in asked]}
        if quarter == 3:
            told["shuffled"] = told["scores"] | {"f1": [v / 10 for v in values]}
        (place / f"q{quarter:02d}.json").write_text(json.dumps(told))


@pytest.fixture
def folder(tmp_path) -> Path:
    facts = {
        "quarters": QUARTERS,
        "document": [one // 2 for one in range(160)],  # two questions a document
        "quarter": [one // EACH for one in range(160)],
        "device": "a device",
    }
    (tmp_path / "stream.json").write_text(json.dumps(facts))
    return tmp_path


def base(quarter: int, came: int, question: int) -> float:
    return 40 + question % 5


def test_rows_are_means_of_both_halves(folder):
    for half in (0, 1):
        write(folder, "nightly", half, lambda q, came, one: one if one // EACH == q else 10 * q)
    rows = table_rows(load_results(folder))
    assert [row["quarter"] for row in rows] == QUARTERS and {row["arm"] for row in rows} == {"nightly"}
    assert [row["new_f1"] for row in rows] == [19.5, 59.5, 99.5, 139.5]
    assert [row["new_em"] for row in rows] == [9.75, 29.75, 49.75, 69.75]
    assert [row["old_f1"] for row in rows] == [None, 10.0, 20.0, 30.0]
    assert [(row["new_questions"], row["old_questions"]) for row in rows] == [(40, 0), (40, 40), (40, 80), (40, 120)]
    assert [row["adapt_seconds"] for row in rows] == [11.0] * 4  # of the slower half


def test_the_change_on_new_questions_is_of_the_last_half_and_paired(folder):
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None)
        write(folder, "nightly", half, lambda q, came, one: base(q, came, one) + (3 if q >= 2 and came == q else 50))
    results = load_results(folder)
    assert last_half(results, "nightly", "frozen") == [2, 3] and last_half(results, "nightly", "text") == []
    found = new_change(results, "nightly", "frozen")
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3, 3))  # however much questions differ
    assert new_change(results, "nightly", "text") is None


def test_intervals_draw_documents_not_questions(folder):
    """Two equal questions a document hold no more than one: half the questions give as wide an interval."""
    gain = np.random.default_rng(0).normal(0, 10, 80)
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None)
        write(folder, "nightly", half, lambda q, came, one: base(q, came, one) + gain[one // 2])
    results = load_results(folder)
    ours = new_change(results, "nightly", "frozen")
    expected = 1.96 * gain[40:].std() / np.sqrt(40)
    assert (ours.high - ours.low) / 2 == pytest.approx(expected, rel=0.1)
    assert ours.mean == pytest.approx(gain[40:].mean())


def test_loss_from_the_best_compares_the_same_questions(folder):
    def falling(quarter: int, came: int, one: int) -> float:
        return 50 - 2 * (quarter - came)  # every quarter since costs two points

    for half in (0, 1):
        write(folder, "nightly", half, falling, final=lambda q, came, one: 44.5 + came)
    results = load_results(folder)
    loss, since = largest_loss(results, "nightly", same_bank=False)
    assert (since, loss.mean) == (0, pytest.approx(6.0))
    # same bank: after quarter t 44.5 + came, at the end 50 − 2 · (3 − came)
    own, when = largest_loss(results, "nightly", same_bank=True)
    assert (when, own.mean) == (0, pytest.approx(44.5 - 44))
    assert largest_loss(results, "frozen", same_bank=False) is None


def test_forgetting_is_not_told_before_the_end(folder):
    write(folder, "nightly", 0, base, final=base, quarters=3)
    results = load_results(folder)
    assert largest_loss(results, "nightly", same_bank=True) is None
    assert largest_loss(results, "nightly", same_bank=False)[0].mean == 0


@pytest.mark.parametrize(
    ("gain", "text", "forgets", "seconds", "met"),
    [
        (2.5, 6.0, 0.5, 10, [True, True, True, True, True]),
        (1.5, 6.0, 0.5, 10, [False, True, True, True, True]),
        (2.5, 8.0, 0.5, 10, [True, True, True, False, True]),
        (2.5, 6.0, 1.5, 10, [True, False, True, True, True]),
        (2.5, 6.0, 0.5, 119.5, [True, True, True, True, False]),
    ],
)
def test_goals(folder, gain, text, forgets, seconds, met):
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None)
        write(folder, "text", half, lambda q, came, one: base(q, came, one) + text)
        write(
            folder, "nightly", half, lambda q, came, one: base(q, came, one) + gain, seconds=seconds,
            final=lambda q, came, one: base(q, came, one) + gain + forgets,
        )  # fmt: skip
    assert [one.met for one in goals(load_results(folder))] == met


def test_a_gain_whose_interval_holds_nothing_is_not_met(folder):
    noise = np.random.default_rng(1).normal(0, 60, 80)
    noise[40:] += 2.5 - noise[40:].mean()
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None)
        write(folder, "nightly", half, lambda q, came, one: base(q, came, one) + noise[one // 2])
    found = goals(load_results(folder))[0]
    assert found.found.mean > 2 and found.found.low < 0 and found.met is False


def test_there_is_no_verdict_before_the_last_quarter(folder):
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None, quarters=3)
        write(folder, "nightly", half, lambda q, came, one: base(q, came, one) + 9, quarters=3)
    found = goals(load_results(folder))
    assert found[0].found.mean == pytest.approx(9) and found[0].met is None and "1 of 2 quarters" in found[0].detail
    assert [one.met for one in found] == [None, None, None, None, True]


def test_missing_arms_leave_goals_unmeasured(folder):
    write(folder, "frozen", 0, base, seconds=None)
    assert [one.met for one in goals(load_results(folder))] == [None] * 5


def test_the_report_is_printed_and_written(folder):
    for half in (0, 1):
        write(folder, "frozen", half, base, seconds=None)
        write(folder, "nightly", half, lambda q, came, one: base(q, came, one) + 3, final=base)
    told = report(folder)
    for part in ("2025Q2   nightly", "too few", "from a shuffled bank 4.5", "goals", "not measured", "met  ", "+3.00"):
        assert part in told, part
    written = json.loads((folder / "report.json").read_text())
    assert written["goals"][0]["met"] is True and written["changes"][0]["against"] == "frozen"
    picture = ET.fromstring((folder / "report.svg").read_text())
    assert len(picture.findall(".//{*}polyline")) == 4  # two arms, two panels


def test_a_run_that_has_begun_is_reported_as_far_as_it_went(folder):
    write(folder, "frozen", 0, base, seconds=None, quarters=3)
    write(folder, "nightly", 0, base, quarters=1)
    told = report(folder)
    assert "2024Q3   nightly" in told and "0 of 2 quarters are done" in told and told.count("  met  ") == 1


def test_folders_without_results_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="there are no results"):
        load_results(folder)
    with pytest.raises(UsageError, match="there are no results"):
        load_results(tmp_path / "nowhere")
    write(folder, "nightly", 0, base)
    (folder / "nightly-0" / "q01.json").write_text("{")
    with pytest.raises(DamagedFile, match="a result cannot be read"):
        load_results(folder)


# ------------------------------------------------------------------------------------------------------------- plots


def test_ticks_are_round_and_cover_the_values():
    assert ticks(41.3, 48.9) == [40.0, 42.0, 44.0, 46.0, 48.0, 50.0]
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(7, 7)[0] <= 7 <= ticks(7, 7)[-1] and len(ticks(7, 7)) > 1
    for low, high in ((-3, 17), (0.01, 0.02), (99, 1001)):
        marks = ticks(low, high)
        assert marks[0] <= low and high <= marks[-1] and len(marks) <= 11


def test_lines_stand_where_their_values_are():
    svg = lines_svg([Panel("one & two", "F1", {"a<b": [0.0, 10.0, None], "c": [5.0, None, 5.0]})], ["x", "y", "z"])
    picture = ET.fromstring(svg)  # well formed, names escaped
    points = [one.get("points").split() for one in picture.findall(".//{*}polyline")]
    assert [len(one) for one in points] == [2, 2]
    (x0, y0), (x1, y1) = (map(float, one.split(",")) for one in points[0])
    (_, y5), (x2, _) = (map(float, one.split(",")) for one in points[1])
    assert x0 < x1 < x2 and y0 > y5 > y1 and (y0 + y1) / 2 == pytest.approx(y5, abs=0.2)
    texts = [one.text for one in picture.iter() if one.text]
    assert "one & two" in texts and "a<b" in texts and "z" in texts


def test_a_dashed_line_has_the_colour_of_its_own_and_an_empty_label_is_not_drawn():
    series = {"a": [0.0, 1.0], "a, other": [1.0, 2.0], "b": [2.0, 3.0]}
    picture = ET.fromstring(lines_svg([Panel("t", "y", series, {"a, other": "a"})], ["", "2"]))
    first, other, second = picture.findall(".//{*}polyline")
    assert first.get("stroke") == other.get("stroke") != second.get("stroke")
    assert [one.get("stroke-dasharray") for one in (first, other, second)] == [None, "6 3", None]
    turned = [one.text for one in picture.findall(".//{*}text") if "rotate(-35" in one.get("transform", "")]
    assert turned == ["2"]
    with pytest.raises(UsageError, match="takes its colour from a series that is not there"):
        lines_svg([Panel("t", "y", series, {"a, other": "c"})], ["1", "2"])


def test_nothing_to_plot_is_refused():
    for panel, labels in ((Panel("t", "y", {"a": [None]}), ["x"]), (Panel("t", "y", {"a": [1.0]}), ["x", "y"])):
        with pytest.raises(UsageError, match="there is nothing to plot"):
            lines_svg([panel], labels)
