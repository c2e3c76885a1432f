"""The nightly proof: what a step sees, runs that go on after a kill, the gate's questions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbc_core.errors import UsageError
from mbc_core.reader.kv_lora import KVLoraConfig, adapter_state, add_kv_lora, load_adapter, save_adapter, trainable
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.nightly import ARMS, TEXT_TOKENS, Choices, Spelling, compose, plan, shown_rows
from tests.bench import nightly_run
from tests.bench.nightly_run import Deadline, Job, Stopped, gate_questions, run_arm, write_stream_facts
from tests.bench.nightly_tune import choose, tune, tuned, tuning_quarters
from tests.mbc_core.nightly_stream import QUARTERS, STREAM
from tests.mbc_core.tiny_reader import language_model
from tests.mbc_core.tiny_reader import tokenizer as tiny_tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

FEW = Choices(steps=2, batch=4, lr=1e-2)


# ---------------------------------------------------------------------------------------------------- what a step sees


@pytest.mark.parametrize("room", [1000, 90])
def test_prompts_are_those_of_the_reader(room):
    form = PromptFormat(tiny_tokenizer())
    spelling = Spelling(STREAM, form, "words", room)
    for question in range(0, 60, 7):
        rows = STREAM.rows(2, question)[:5] if question in STREAM.recalled[2] else (1, 2)
        built = form.build([STREAM.words[row] for row in rows], STREAM.questions[question].question, room)
        assert spelling.prompt(question, rows) == built.ids
    assert room > 90 or built.lines < 5


def test_texts_are_one_line_and_cut_and_closed_books_show_nothing():
    long = replace(STREAM, texts=("x" * 1000, *STREAM.texts[1:]))
    form = PromptFormat(tiny_tokenizer())
    shown = form.tokenizer.decode(Spelling(long, form, "text", 4000).prompt(3, [0, 1]))
    first, second, asked, last = shown.split("\n")
    assert len(first) == TEXT_TOKENS and second == " The town of town1 was founded by Name1."
    assert (asked, last) == (f"Question: {STREAM.questions[3].question}", "Answer:")
    assert form.tokenizer.decode(Spelling(long, form, "none", 4000).prompt(3, [0, 1])) == f"{asked}\nAnswer:"


@pytest.mark.parametrize("half", [0, 1])
def test_a_step_sees_only_what_may_be_trained_on(half):
    choices = Choices(steps=6, batch=8)
    steps = plan(STREAM, 2, half, ARMS["nightly"], choices, 0)
    assert [len(one) for one in steps] == [8] * 6
    seen = [STREAM.questions[one] for step in steps for one in step]
    documents = [STREAM.documents[one.document] for one in seen]
    assert {one.half for one in documents} == {half} and not any(one.held_out for one in documents)
    assert {one.kind for one in seen} == {"asked", "cloze"}
    assert {one.quarter for one in documents} == {0, 1, 2}
    alone = [one for step in plan(STREAM, 2, half, ARMS["no-replay"], choices, 0) for one in step]
    assert {STREAM.documents[STREAM.questions[one].document].quarter for one in alone} == {2}
    scored = set(STREAM.select(range(3), half=1 - half))
    assert not scored & {one for step in steps for one in step}


def test_equal_arms_see_equal_questions_and_shares_are_kept():
    choices = Choices(steps=40, batch=50, old_share=0.3, cloze_share=0.2)
    made = {name: plan(STREAM, 2, 0, ARMS[name], choices, 0) for name in ("nightly", "closed", "text")}
    assert made["nightly"] == made["closed"] == made["text"] != plan(STREAM, 2, 0, ARMS["nightly"], choices, 1)
    seen = [STREAM.questions[one] for step in made["nightly"] for one in step]
    old = np.mean([STREAM.documents[one.document].quarter < 2 for one in seen])
    cloze = np.mean([one.kind == "cloze" for one in seen])
    assert abs(old - 0.3) < 0.04 and abs(cloze - 0.2) < 0.04
    none = plan(STREAM, 2, 0, ARMS["nightly"], replace(choices, cloze_share=0.0), 0)
    assert {STREAM.questions[one].kind for step in none for one in step} == {"asked"}


def test_every_question_comes_once_before_any_comes_again():
    choices = Choices(steps=5, batch=4, cloze_share=0.0)
    steps = plan(STREAM, 0, 1, ARMS["no-replay"], choices, 0)
    pool = STREAM.select([0], half=1, held_out=False)
    assert len(pool) == 4  # documents 1, 3, 7, 9
    assert all(sorted(one) == pool for one in steps) and len({tuple(one) for one in steps}) > 1


def test_a_half_without_questions_is_refused():
    empty = replace(STREAM, documents=tuple(replace(one, held_out=True) for one in STREAM.documents))
    with pytest.raises(UsageError, match="there is no question to adapt to"):
        plan(empty, 1, 0, ARMS["nightly"], FEW, 0)


def test_the_row_that_answers_always_stands_among_those_shown():
    rng = np.random.default_rng(0)
    sizes = Counter()
    for _ in range(400):
        rows = shown_rows((9, 8, 7, 6, 5, 4, 3, 2), 4, "words", Choices(as_read=0.0), rng)
        sizes[len(rows)] += 1
        assert not rows or (4 in rows and len(set(rows)) == len(rows))
    assert set(sizes) == {0, 1, 3, 5, 8} and 2 < sizes[0] < 40
    as_read = [shown_rows((9, 8, 7, 6, 5, 4), 1, "words", Choices(as_read=1.0, no_memory=0.0), rng) for _ in range(9)]
    assert as_read == [[9, 8, 7, 6, 1]] * 9  # in the bank's order, the missing one last
    assert all(shown_rows((9, 8), 8, "none", Choices(), rng) == [] for _ in range(9))
    assert max(len(shown_rows(range(8), 0, "text", Choices(as_read=0.0), rng)) for _ in range(99)) == 5


def test_composed_prompts_end_with_their_answers():
    form = PromptFormat(tiny_tokenizer())
    spelling = Spelling(STREAM, form, "words", 1000)
    asked = STREAM.select([0, 1])[:6]
    made = compose(STREAM, spelling, 1, asked, Choices(), np.random.default_rng(0))
    for question, start, length, answer in zip(
        asked, made.tokens.starts, made.tokens.lengths, made.answer_lengths, strict=True
    ):
        ids = made.tokens.values[start : start + length].tolist()
        assert ids[-answer:] == form.answer(STREAM.questions[question].answers[0])
        assert form.tokenizer.decode(ids[:-answer]).endswith(f"{STREAM.questions[question].question}\nAnswer:")


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """Three adapters that do something, one for each memory."""
    folders = {}
    for number, memory in enumerate(("words", "text", "none")):
        base = language_model()
        model = add_kv_lora(base.model, KVLoraConfig(r=2, alpha=4), seed=number)
        for place, weight in enumerate(trainable(model).values()):
            rng = np.random.default_rng([number, place])
            weight.data += weight.data.new_tensor(rng.normal(0, 0.05, tuple(weight.shape)))
        folders[memory] = tmp_path_factory.mktemp("starts") / memory
        save_adapter(model, folders[memory], KVLoraConfig(r=2, alpha=4), base_digest=base.digest, base_name="tiny")
    return folders


@pytest.fixture
def job(starts, tmp_path) -> Job:
    return Job(STREAM, language_model(), starts, tmp_path / "out", FEW, batch_tokens=2000)


def results(job: Job, name: str) -> list[dict]:
    rows = [json.loads(path.read_text()) for path in sorted((job.out / name).glob("q??.json"))]
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        | ({"adapt": {**row["adapt"], "seconds": 0}} if "adapt" in row else {})
        for row in rows
    ]


def weights(folder: Path) -> dict[str, list]:
    model, _ = load_adapter(language_model().model, folder)
    return {name: value.tolist() for name, value in adapter_state(model).items()}


def quiet(line: str) -> None:
    """Nobody listens."""


def test_an_arm_scores_the_other_half_after_every_quarter(job):
    run_arm(job, "nightly", 0, Deadline(None), quiet)
    rows = results(job, "nightly-0")
    assert [row["scores"]["questions"] for row in rows] == [STREAM.select(range(n + 1), half=1) for n in range(3)]
    assert [row["final"]["questions"] for row in rows[:2]] == [row["scores"]["questions"] for row in rows[:2]]
    assert "final" not in rows[2] and len(rows[2]["shuffled"]["f1"]) == 15
    assert {row["gate"]["reason"] for row in rows} == {"too few"}
    assert [row["adapt"]["steps"] for row in rows] == [2, 2, 2]
    kept = sorted(path.name for path in (job.out / "nightly-0").iterdir() if path.is_dir())
    assert kept == ["q02"] and weights(job.out / "nightly-0" / "q02") != weights(job.starts["words"])


def test_a_killed_run_ends_as_if_it_had_not_been(job, monkeypatch):
    """Killed between the adapter and its scores, while adapting, and while the scores are written."""
    whole = replace(job, out=job.out / "whole")
    run_arm(whole, "nightly", 1, Deadline(None), quiet)
    adapt, write, calls = nightly_run.adapt_quarter, nightly_run._write, Counter()

    def dying_adapt(*given, **named):
        calls["adapt"] += 1
        if calls["adapt"] == 2:
            raise KeyboardInterrupt
        return adapt(*given, **named)

    def dying_write(path, told):
        if path.name in ("q00.json", "q02.json") and not calls[path.name]:
            calls[path.name] = 1
            raise KeyboardInterrupt
        write(path, told)

    monkeypatch.setattr(nightly_run, "adapt_quarter", dying_adapt)
    monkeypatch.setattr(nightly_run, "_write", dying_write)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_arm(replace(job, base=language_model()), "nightly", 1, Deadline(None), quiet)
    run_arm(replace(job, base=language_model()), "nightly", 1, Deadline(None), quiet)
    assert calls["adapt"] == 4  # one of them died; what was adapted is not adapted again
    assert results(job, "nightly-1") == results(whole, "nightly-1")
    assert weights(job.out / "nightly-1" / "q02") == weights(whole.out / "nightly-1" / "q02")
    before = {path: path.stat().st_mtime_ns for path in (job.out / "nightly-1").rglob("*.json")}
    run_arm(job, "nightly", 1, Deadline(None), quiet)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (job.out / "nightly-1").rglob("*.json")} == before


def test_arms_start_from_their_own_adapter_and_the_frozen_never_moves(job, monkeypatch):
    began = []
    original = nightly_run.adapted

    def noted(base, folder):
        began.append(folder)
        return original(base, folder)

    monkeypatch.setattr(nightly_run, "adapted", noted)
    for arm in ("frozen", "closed", "text"):
        run_arm(replace(job, quarters=1), arm, 0, Deadline(None), quiet)
    assert began == [job.starts["words"], job.starts["none"], job.starts["text"]]
    assert not [path for path in (job.out / "frozen-0").iterdir() if path.is_dir()]
    assert "gate" not in results(job, "closed-0")[0] and "adapt" not in results(job, "frozen-0")[0]


def test_what_the_gate_refuses_does_not_go_live(job):
    run_arm(replace(job, quarters=2), "gated", 0, Deadline(None), quiet)
    rows = results(job, "gated-0")
    assert [row["gate"]["promote"] for row in rows] == [False, False]
    assert weights(job.out / "gated-0" / "q01") == weights(job.starts["words"])
    frozen = replace(job, out=job.out / "f", quarters=2)
    run_arm(frozen, "frozen", 0, Deadline(None), quiet)
    assert rows[1]["scores"]["predictions"] == results(frozen, "frozen-0")[1]["scores"]["predictions"]


def test_the_gate_is_neither_trained_on_nor_scored_with():
    for half in (0, 1):
        for quarter in range(3):
            asked = gate_questions(STREAM, quarter, half, 0)
            every = {one for chosen in asked.values() for one in chosen}
            trained = {one for step in plan(STREAM, quarter, half, ARMS["nightly"], Choices(), 0) for one in step}
            assert not every & trained and not every & set(STREAM.select(range(3), half=1 - half))
            came = [STREAM.documents[STREAM.questions[one].document].quarter for one in asked["new"]]
            assert set(came) == {quarter}
            assert all(STREAM.questions[one].kind != "gate" for one in asked["old"]) and (quarter == 0) == (
                not asked["old"]
            )


def test_old_questions_of_the_gate_are_bounded(monkeypatch):
    whole = gate_questions(STREAM, 2, 0, 0)["old"]
    monkeypatch.setattr(nightly_run, "OLD_GATE", 5)
    few = gate_questions(STREAM, 2, 0, 0)["old"]
    assert len(few) == 5 < len(whole) and set(few) < set(whole) and few == gate_questions(STREAM, 2, 0, 0)["old"]


def test_results_of_another_run_are_refused(job):
    run_arm(replace(job, quarters=1), "nightly", 0, Deadline(None), quiet)
    with pytest.raises(UsageError, match=r"holds results of another run.*differ in choices"):
        run_arm(replace(job, choices=replace(FEW, lr=1e-3)), "nightly", 0, Deadline(None), quiet)
    (job.out / "nightly-0" / "q00" / "told.json").unlink()
    with pytest.raises(UsageError, match="the adapter to go on from is missing"):
        run_arm(job, "nightly", 0, Deadline(None), quiet)


def test_the_deadline_stops_before_a_quarter(job, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(nightly_run.time, "monotonic", lambda: now[0])
    deadline = Deadline(1)
    deadline.took(30)
    now[0] = 29.0
    deadline.check()
    now[0] = 31.0
    with pytest.raises(Stopped):
        deadline.check()


# ------------------------------------------------------------------------------------------------------------- tuning


def test_choices_are_tuned_on_the_first_year_alone(job):
    assert tuning_quarters(QUARTERS) == 2
    for wrong in (("2025Q1",), ("2023Q4", "2024Q1")):
        with pytest.raises(UsageError, match="nothing may be tuned"):
            tuning_quarters(wrong)
    grid = (FEW, replace(FEW, steps=1))
    tune(job, (0, 1), Deadline(None), quiet, grid)
    for path in job.out.rglob("q??.json"):
        asked = json.loads(path.read_text())["scores"]["questions"]
        assert {STREAM.documents[STREAM.questions[one].document].quarter for one in asked} <= {0, 1}
    rows = tuned(job.out)
    assert [row["halves"] for row in rows] == [2, 2] and {row["questions"] for row in rows} == {20}
    assert choose(job.out).to_json() == rows[0]["choices"]
    assert rows[0]["score"] >= rows[1]["score"]


def test_the_best_choice_is_the_one_with_the_best_mean(job, tmp_path):
    facts = {"quarters": list(QUARTERS), "quarter": [0, 1]}
    for name, new, old, steps in (("a", (10, 30), 10, 5), ("b", (20, 20), 30, 9), ("c", (20, 20), 30, 3)):
        folder = tmp_path / f"tune-{name}"
        (folder / "nightly-0").mkdir(parents=True)
        (folder / "stream.json").write_text(json.dumps(facts))
        choices = Choices(steps=steps).to_json()
        for number, scores in enumerate(([(0, new[0])], [(0, old), (1, new[1])])):
            told = {"questions": [one for one, _ in scores], "f1": [value for _, value in scores]}
            (folder / "nightly-0" / f"q0{number}.json").write_text(json.dumps({"choices": choices, "scores": told}))
    rows = tuned(tmp_path)
    assert [(row["choices"]["steps"], row["score"]) for row in rows] == [(3, 25.0), (9, 25.0), (5, 15.0)]
    assert choose(tmp_path) == Choices(steps=3)
    with pytest.raises(UsageError, match="no choice was tried"):
        tuned(tmp_path / "tune-a")


def test_facts_for_the_report_are_written(job):
    write_stream_facts(job)
    facts = json.loads((job.out / "stream.json").read_text())
    assert facts["quarters"] == list(QUARTERS) and len(facts["document"]) == len(STREAM.questions) == 90
    assert facts["quarter"][::30] == [0, 1, 2] and facts["device"] == "CPU"
