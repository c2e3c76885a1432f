"""Poisoned replay on tiny models: what is falsified, and that the gate or the canary set keeps it out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mbc_core import defaults
from mbc_core.evaluation.metrics import normalise
from mbc_core.training.adapt import AdaptRun, adapt
from mbc_core.training.gate import GateRule
from mbc_core.training.set_file import Example, TrainingSet, save_set
from tests.bench import bench_poison as bench
from tests.mbc_core.tiny_reader import language_model
from tests.mbc_core.tiny_reader import tokenizer as tiny_tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")


def example(number: int, split: str = "train", answer: str = "aa") -> Example:
    lines = tuple(f"line{number}{place} words" for place in range(8))
    return Example(f"Who is {number}?", answer, split, lines, 1, lines[1], f"{number // 2:016x}")


SET = TrainingSet.of(
    [
        *(example(number, answer=("aa", "bb")[number % 2]) for number in range(200)),
        *(example(200 + number, "new", "aa") for number in range(40)),
        *(example(300 + number, "old", "aa") for number in range(40)),
        *(example(400 + number, "canary", "aa") for number in range(40)),
    ]
)


@pytest.mark.parametrize("how", ["one answer", "shuffled"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_share_of_the_documents_gets_wrong_answers_and_nothing_else_changes(how, share):
    found = bench.poisoned(SET.examples, how, share, seed=1)
    changed = [(one, other) for one, other in zip(SET.examples, found, strict=True) if one != other]
    documents = {one.document for one in SET.examples if one.split != "canary"}
    assert {one.document for one, _ in changed} <= documents
    assert len({one.document for one, _ in changed}) == round(share * len(documents))
    for one, other in changed:
        assert replace(other, answer=one.answer) == one and one.split != "canary"
        assert normalise(other.answer) != normalise(one.answer)
    wrong = {other.answer for _, other in changed}
    assert wrong == {bench.ATTACKER} if how == "one answer" else wrong <= {"aa", "bb", bench.ATTACKER}
    assert bench.poisoned(SET.examples, how, share, seed=1) == found
    assert bench.poisoned(SET.examples, how, share, seed=2) != found


def test_no_poison_changes_nothing():
    assert bench.poisoned(SET.examples, "clean", 0.0) == list(SET.examples)


@pytest.mark.slow
def test_what_poison_ruins_never_goes_live(tmp_path, monkeypatch):
    """A live adapter that knows its answers; replay that is all the attacker's would ruin it, and is refused by name.

    At 5% the candidate passes the test as issued: refused, or the canary set loses a point at most.
    """
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)
    monkeypatch.setattr(bench, "ATTACKER", "zz")  # the tiny model spells bytes, and answers with fourteen at most
    run, rule = AdaptRun(steps=60, batch=8, lr=1e-2, patience=None), GateRule(min_questions=20)
    plain = TrainingSet.of([replace(one, answer="aa") for one in SET.examples])
    model = language_model()
    live = adapt(plain, model, tmp_path / "live", run, rule=rule)
    assert live.after["old_f1"] == 100.0 and live.decision.promote

    def after(how: str, share: float):
        from mbc_core.reader.kv_lora import load_adapter

        base = language_model()
        adapted, _ = load_adapter(base.model, tmp_path / "live")
        falsified = TrainingSet.of(bench.poisoned(plain.examples, how, share))
        return adapt(falsified, replace(base, model=adapted.eval()), tmp_path / f"{share}", run, rule=rule)

    ruined = after("one answer", 1.0)
    assert ruined.scores_after["canary"].mean() < 50 and ruined.after["new_f1"] > 50, (
        "by its own questions it is better"
    )
    assert (ruined.decision.promote, ruined.decision.reason) == (False, "canary")
    few = after("one answer", 0.05)
    change = float(np.mean(few.scores_after["canary"] - few.scores_before["canary"]))
    assert not few.decision.promote or change >= -1.0


@pytest.mark.slow
def test_the_bench_runs_every_arm_once_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)
    language_model().model.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    save_set(tmp_path / "set.jsonl.gz", SET)
    words = ["--from-set", str(tmp_path / "set.jsonl.gz"), "--out", str(tmp_path / "out"), "--lm", str(tmp_path / "lm")]
    words += ["--steps", "2", "--batch", "4", "--min-questions", "10"]
    code = bench.main(words)
    rows = [json.loads((one / "arm.json").read_text()) for one in sorted((tmp_path / "out").iterdir())]
    assert len(rows) == len(bench.ARMS) and code == (0 if all(row["passes"] for row in rows) else 1)
    shown = capsys.readouterr().out
    assert shown.count("| shuffled | 5% |") == 1 and "[90%]" in shown
    monkeypatch.setattr(bench, "measure", lambda *given: pytest.fail("the arms are done"))
    assert bench.main(words) == code
    assert "| clean | 0% | 0 |" in capsys.readouterr().out


def test_a_set_without_canary_questions_measures_nothing(tmp_path, capsys):
    save_set(tmp_path / "set.jsonl.gz", TrainingSet.of([example(1)]))
    with pytest.raises(SystemExit):
        bench.main(["--from-set", str(tmp_path / "set.jsonl.gz"), "--out", str(tmp_path / "out")])
    assert "the set has no canary questions" in capsys.readouterr().err
