"""Rows with paired intervals against plain loops; retention against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mbc_core.errors import UsageError
from mbc_core.evaluation.answers import Answered
from mbc_core.evaluation.metrics import bootstrap
from mbc_core.evaluation.report import make_result, measured_rows, retention
from mbc_core.evaluation.sheet import Sheet, Shown
from schemas.results import EvalResult, EvalRow, MeasuredRow, RetentionRow

RNG = np.random.default_rng(8)
COUNT = 30


def answered(read: str, k: int = 0, profile: str = "-", documents: int | None = None, f1=None) -> Answered:
    scores = RNG.uniform(20, 100, COUNT) if f1 is None else np.asarray(f1, dtype=np.float64)
    shown = Shown(read, profile, k, list(range(len(scores))), [[]] * len(scores), 75.0, 2.0, documents)
    exact = np.where(scores > 60, 100.0, 0.0)
    return Answered(shown, ["x"] * len(scores), exact, exact, scores, 40.0, 4.5, 3.0)


READS = [
    answered("closed"), answered("closed-equal"), answered("recall", 5, "default"), answered("recall", 1, "default"),
    answered("text", 5, "text"), answered("text-equal", 5, "text"), answered("text-equal", 1, "text"),
]  # fmt: skip


def test_a_row_has_the_promised_keys_and_figures():
    rows = measured_rows(READS, seed=4)
    assert set(EvalRow.__annotations__) | set(MeasuredRow.__annotations__) == set(rows[0])
    row = rows[2]
    interval = bootstrap(READS[2].f1, seed=4)
    assert [row["f1"], row["f1_low"], row["f1_high"]] == pytest.approx([interval.mean, interval.low, interval.high])
    exact = bootstrap(READS[2].em, seed=4)
    assert (row["em"], row["em_low"], row["em_high"]) == (exact.mean, exact.low, exact.high)
    assert row["em_prefix"] == READS[2].prefix.mean()
    assert (row["name"], row["read"], row["profile"], row["k"]) == ("recall/default@5", "recall", "default", 5)
    assert (row["milliseconds"], row["milliseconds_recall"], row["milliseconds_generate"]) == (5.0, 2.0, 3.0)
    assert (row["questions"], row["bytes_per_passage"], row["prompt_tokens"]) == (COUNT, 75.0, 40.0)
    assert (row["passages_shown"], row["adapter"], rows[5]["adapter"]) == (4.5, "own", "text")


def test_rows_are_compared_with_the_equally_trained_ones_at_the_same_k():
    rows = {row["name"]: row for row in measured_rows(READS, seed=4)}
    against = {name: [one["against"] for one in row["compared"]] for name, row in rows.items()}
    assert against["recall/default@5"] == ["closed-equal", "text-equal@5"]
    assert against["recall/default@1"] == ["closed-equal", "text-equal@1"]
    assert against["closed-equal"] == ["text-equal@5"], "not with itself; the first when none has its k"
    assert against["text-equal@1"] == ["closed-equal"]
    (closed, text) = rows["recall/default@5"]["compared"]
    rng, difference, share = np.random.default_rng(4), [], []
    for _ in range(1000):
        chosen = rng.integers(0, COUNT, COUNT)
        difference.append(READS[2].f1[chosen].mean() - READS[1].f1[chosen].mean())
        share.append(100 * READS[2].f1[chosen].mean() / READS[5].f1[chosen].mean())
    assert closed["f1"] == pytest.approx(READS[2].f1.mean() - READS[1].f1.mean())
    assert [closed["f1_low"], closed["f1_high"]] == pytest.approx(np.quantile(difference, [0.025, 0.975]))
    assert text["f1_share"] == pytest.approx(100 * READS[2].f1.mean() / READS[5].f1.mean())
    assert [text["f1_share_low"], text["f1_share_high"]] == pytest.approx(np.quantile(share, [0.025, 0.975]))
    assert text["em"] == pytest.approx(READS[2].em.mean() - READS[5].em.mean())


def test_without_rivals_the_same_adapter_is_the_reference():
    rows = measured_rows([READS[0], READS[2], READS[4]])
    assert [one["against"] for one in rows[1]["compared"]] == ["closed", "text@5"]
    assert measured_rows([READS[2]])[0]["compared"] == []
    assert measured_rows([]) == []


def test_any_row_can_be_the_reference():
    rows = measured_rows(READS, ["text", "recall/default@1"])
    assert [one["against"] for one in rows[2]["compared"]] == ["text@5", "recall/default@1"]
    with pytest.raises(UsageError, match=r"no such row to compare with: \['shuffled'\].*this read was not asked"):
        measured_rows(READS, ["shuffled"])
    with pytest.raises(UsageError, match=r"\['recal'\].*misspelt.*choose among closed, closed-equal, recall"):
        measured_rows(READS, ["recal"])


def stream() -> list[Answered]:
    by_hand = {
        ("closed", None): [10.0, 10.0, 10.0, 10.0],
        ("closed-equal", None): [20.0, 20.0, 20.0, 20.0],
        ("recall", 2): [60.0, 60.0, 100.0, 60.0],
        ("shuffled", 2): [30.0, 10.0, 20.0, 20.0],
        ("recall", 4): [50.0, 60.0, 60.0, 50.0],
        ("shuffled", 4): [20.0, 10.0, 20.0, 10.0],
    }
    return [
        answered(read, 0 if count is None else 5, "-" if count is None else "default", count or 2, f1)
        for (read, count), f1 in by_hand.items()
    ]


def test_retention_by_hand():
    first, second = retention(stream(), seed=1)
    assert set(RetentionRow.__annotations__) == set(first)
    assert (first["documents"], first["questions"], first["f1"], first["shuffled_f1"]) == (2, 4, 70.0, 20.0)
    assert (first["closed"], first["closed_f1"], first["above_closed"]) == ("closed-equal", 20.0, 50.0)
    assert (first["relative"], first["f1_relative"], first["above_shuffled"]) == (100.0, 100.0, 50.0)
    assert (second["documents"], second["f1"], second["above_closed"]) == (4, 55.0, 35.0)
    assert second["relative"] == pytest.approx(100 * 35 / 50) and second["f1_relative"] == pytest.approx(100 * 55 / 70)
    assert second["above_shuffled"] == 40.0
    assert second["relative_low"] < 70 < second["relative_high"]
    assert (first["relative_low"], first["relative_high"]) == (100.0, 100.0), "paired with itself"


def test_retention_falls_back_on_the_same_adapters_closed_book_and_may_lack_a_control():
    reads = [one for one in stream() if one.shown.read not in ("closed-equal", "shuffled")]
    first, _ = retention(reads)
    assert (first["closed"], first["above_closed"]) == ("closed", 60.0)
    assert first["shuffled_f1"] is first["above_shuffled"] is first["above_shuffled_low"] is None
    assert retention([]) == retention(reads[:1]) == []


def test_retention_above_nothing_is_not_a_number():
    reads = stream()
    poor = [answered("recall", 5, "default", count, [20.0] * 4) for count in (2, 4)]
    first, second = retention([reads[1], *poor])
    assert first["above_closed"] == 0 and first["relative"] is second["relative"] is None
    assert second["f1_relative"] == 100.0


def test_the_whole_result():
    figures = {"recall": [], "bytes": [], "texts": None, "settings": {"seed": 0}, "notes": ["one"]}
    sheet = Sheet([], [], [], [], figures)
    result = make_result(sheet, [*READS, *stream()])
    assert set(EvalResult.__annotations__) == set(result)
    assert len(result["rows"]) == len(READS) and len(result["retention"]) == 2
    assert (result["notes"], result["settings"]) == (["one"], {"seed": 0})
