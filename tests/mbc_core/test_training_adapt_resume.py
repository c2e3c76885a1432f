"""The second step as a process of its own: where nothing that reads a bank is installed, killed, and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mbc_core import defaults
from mbc_core.errors import UsageError
from mbc_core.training.adapt import AdaptRun, adapt
from mbc_core.training.loop import read_checkpoint
from mbc_core.training.set_file import Example, TrainingSet, save_set
from tests.mbc_core.tiny_reader import language_model
from tests.mbc_core.tiny_reader import tokenizer as tiny_tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

STEPS, EVERY = 60, 4
RUN = AdaptRun(steps=STEPS, batch=4, lr=5e-3, evaluate_every=EVERY, patience=None)
BLOCKED = ("faiss", "deltalake", "apache_beam", "gguf", "pyarrow", "rich", "click", "zstandard")
PROGRAM = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from pipelines.adapt import main
sys.exit(main(sys.argv[1:]))
"""


def example(number: int, split: str = "train") -> Example:
    lines = tuple(f"line{number}{place} words" for place in range(8))
    return Example(f"Who is {number}?", f"Name{number % 5}", split, lines, 1, lines[1], f"{number:016x}")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A language model and a set on disk; no adapter is shipped for this model."""
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)
    language_model().model.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    examples = [*(example(number) for number in range(40)), *(example(50 + one, "new") for one in range(3))]
    save_set(tmp_path / "set.jsonl.gz", TrainingSet.of([*examples, example(60, "old"), example(61, "canary")]))
    return tmp_path


def command(machine: Path, out: str, *more: str) -> list[str]:
    words = ["--from-set", str(machine / "set.jsonl.gz"), "--out", str(machine / out), "--lm", str(machine / "lm")]
    words += [
        "--steps",
        str(STEPS),
        "--batch",
        "4",
        "--evaluate-every",
        str(EVERY),
        "--patience",
        "0",
        "--device",
        "cpu",
    ]
    return [sys.executable, "-c", PROGRAM, *words, "--json", *more]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_where_no_bank_can_be_opened(machine):
    """SIGKILL in the middle of training; float32 on a CPU: the weights and the scores agree bit for bit."""
    whole = subprocess.run(command(machine, "whole"), capture_output=True, text=True, timeout=300, check=False)
    assert whole.returncode == 0, whole.stderr[-3000:]
    told = json.loads(whole.stdout)
    assert (told["steps"], told["promoted"], told["reason"]) == (STEPS, False, "too few")
    assert f"step {STEPS}" in whole.stderr and "held back: loss" in whole.stderr and "F1" in whole.stderr

    state, wanted = machine / "work" / "state.json", command(machine, "resumed", "--checkpoint", str(machine / "work"))
    victim = subprocess.Popen(wanted, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not state.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(60) == -signal.SIGKILL, "it was over before it could be killed"
    reached = json.loads(state.read_text())["progress"]["step"]
    assert 0 < reached < STEPS and not (machine / "resumed" / "candidate.json").exists()

    again = subprocess.run(wanted, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on after step {reached}" in again.stderr
    weights = [(machine / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    assert (machine / "whole" / "scores.json").read_bytes() == (machine / "resumed" / "scores.json").read_bytes()
    cards = [json.loads((machine / name / "candidate.json").read_text())["card"] for name in ("whole", "resumed")]
    assert cards[0]["looks"] == cards[1]["looks"] and len(cards[0]["looks"]) == STEPS // EVERY + 1
    assert list((machine / "work").iterdir()) == [], "a finished run leaves nothing"


class Stop(Exception):
    """The moment at which a run is cut off."""


def cut_off(found: TrainingSet, folder: Path, after: int, run: AdaptRun = RUN) -> None:
    """Run until the look after so many steps, and no further."""

    def say(line: str) -> None:
        if f"step {after}, " in line:
            raise Stop

    with pytest.raises(Stop):
        adapt(found, language_model(), folder / "out", run, checkpoint=folder / "work", say=say)


def small_set() -> TrainingSet:
    return TrainingSet.of([*(example(number) for number in range(20)), example(60, "new"), example(61, "old")])


def test_a_run_goes_on_where_its_last_checkpoint_stands(tmp_path):
    found, run = small_set(), replace(RUN, steps=12)
    adapt(found, language_model(), tmp_path / "whole", run)
    cut_off(found, tmp_path, 8, run)  # said before the checkpoint of step 8 is written
    kept = read_checkpoint(tmp_path / "work")
    assert kept is not None and kept.progress.step == 4
    said: list[str] = []
    made = adapt(found, language_model(), tmp_path / "out", run, checkpoint=tmp_path / "work", say=said.append)
    assert said[0].startswith("going on after step 4") and made.steps == 12
    for name in ("adapter_model.safetensors", "scores.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_run_that_had_given_up_stays_so_and_keeps_its_best_weights(tmp_path):
    """A learning rate that ruins the model: the weights from before the first step are the best."""
    found, run = small_set(), replace(RUN, steps=400, lr=3.0, patience=2)
    said: list[str] = []
    made = adapt(found, language_model(), tmp_path / "whole", run, say=said.append)
    assert made.steps == made.best_step + 2 * EVERY < 400
    assert any("stopped early: 2 looks without a lower loss" in line for line in said)
    losses = [one.dev_loss for one in made.looks]
    assert losses.index(min(losses)) * EVERY == made.best_step
    cut_off(found, tmp_path, made.steps, run)
    again = adapt(found, language_model(), tmp_path / "out", run, checkpoint=tmp_path / "work")
    assert (again.steps, again.best_step) == (made.steps, made.best_step)
    assert (tmp_path / "whole" / "scores.json").read_bytes() == (tmp_path / "out" / "scores.json").read_bytes()


@pytest.mark.parametrize("change", ["run", "set", "model"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    found = small_set()
    cut_off(found, tmp_path, 8)
    run = replace(RUN, seed=1) if change == "run" else RUN
    other = TrainingSet.of([*found.examples, example(70)]) if change == "set" else found
    model = language_model(seed=1) if change == "model" else language_model()
    with pytest.raises(UsageError, match="the checkpoint belongs to another run"):
        adapt(other, model, tmp_path / "out", run, checkpoint=tmp_path / "work")


def test_only_the_runs_own_files_are_removed(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "note.txt").write_text("mine")
    adapt(small_set(), language_model(), tmp_path / "out", replace(RUN, steps=4), checkpoint=tmp_path / "work")
    assert [one.name for one in (tmp_path / "work").iterdir()] == ["note.txt"]
