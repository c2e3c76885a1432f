"""The commands of the nightly proof as they are typed, on a tiny model: tune, run, a real kill, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mbc_core.evaluation.dated_stream import save_stream
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, save_adapter, trainable
from mbc_core.reader.language_model import load_language_model
from tests.mbc_core.nightly_stream import STREAM
from tests.mbc_core.tiny_reader import llama, tokenizer

ARMS = "frozen,nightly,no-replay,gated,closed,text"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """A stream, a model folder and three adapters, as options."""
    place = tmp_path_factory.mktemp("given")
    save_stream(place / "stream.json.gz", STREAM)
    llama().save_pretrained(place / "lm")
    tokenizer().save_pretrained(place / "lm")
    for number, memory in enumerate(("reader", "text", "none")):
        base, config = load_language_model(place / "lm"), KVLoraConfig(r=2, alpha=4)
        model = add_kv_lora(base.model, config, seed=number)
        for weight in trainable(model).values():
            weight.data += weight.data.new_tensor(np.random.default_rng(number).normal(0, 0.05, tuple(weight.shape)))
        save_adapter(model, place / memory, config, base_digest=base.digest, base_name=base.name)
    return [str(place / "stream.json.gz"), "--lm", str(place / "lm"), "--reader", str(place / "reader")]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.bench_nightly", *words]


def call(*words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_proof_with_a_kill_in_the_middle(given, tmp_path):
    tuned, out, whole = str(tmp_path / "tuned"), tmp_path / "out", tmp_path / "whole"
    told = call("tune", *given, "--out", tuned, "--tries", "2", "--steps", "2", "--device", "cpu")
    assert told.count("score ") == 2 and "2 halves" in told
    rivals = [word for name in ("text", "none") for word in (f"--{name}", str(Path(given[2]).parent / name))]
    run = ["run", *given, *rivals, "--choices", tuned, "--steps", "2", "--device", "cpu", "--arms", ARMS]
    call(*run, "--out", str(whole))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command(*run, "--out", str(out)), env=environment, stderr=subprocess.DEVNULL)
    while not (out / "nightly-0" / "q00.json").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not (out / "text-1" / "q02.json").exists()
    assert "the time is up" in call(*run, "--out", str(out), "--minutes", "0")
    call(*run, "--out", str(out))
    names = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("q??.json"))
    assert len(names) == 6 * 2 * 3
    for name in names:
        ours, theirs = (json.loads((place / name).read_text()) for place in (out, whole))
        for part in ("scores", "final", "shuffled"):
            assert ours.get(part) == theirs.get(part), name
    told = call("report", str(out))
    assert "nightly against" in told and "gate decisions" in told and "goals" in told
    assert (out / "report.svg").read_text().startswith("<svg") and (out / "report.json").stat().st_size > 1000


def test_wrong_use_is_told(given, tmp_path):
    for words, told in (
        (["run", *given, "--out", str(tmp_path), "--arms", "daily"], "no such arm: ['daily']"),
        (["run", *given, "--out", str(tmp_path), "--arms", "text"], "--text or --none is needed for ['text']"),
        (["report", str(tmp_path)], "there are no results"),
    ):
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=300)
        assert done.returncode != 0 and told in done.stderr


def test_the_second_step_needs_no_bank():
    """It runs where neither FAISS nor Delta nor Beam is."""
    missing = ("faiss", "deltalake", "apache_beam", "gguf", "zstandard")
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nfrom tests.bench import bench_nightly"
    code += ", nightly_report, nightly_run, nightly_tune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
