"""`mbc train reader` end to end on a tiny model: files, card, curve, resuming, further sets, another architecture."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mbc_core.cli.train import train
from mbc_core.errors import ModelError
from mbc_core.reader.kv_lora import KVLoraConfig, load_adapter
from mbc_core.training import reader as reader_module
from mbc_core.training.reader import ReaderRun, train_reader
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import gpt2, language_model, lexicon, llama, pieces, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

RUN = ReaderRun(
    steps=6, minutes=None, batch=8, batch_tokens=4096, lr=3e-3, evaluate_questions=4, evaluate_every=0.9,
    kv_lora=KVLoraConfig(r=2, alpha=4),
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared"), 16)


@pytest.fixture(autouse=True)
def two_reads(monkeypatch):
    """The full table asks every question eight times; two reads show the same."""
    monkeypatch.setattr(reader_module, "DEFAULT_READS", reader_module._QUICK_READS)
    monkeypatch.setattr(reader_module, "_POOL_STEPS", 2)


def run(prepared, out, changes=RUN, kind="llama", **options):
    rotation, codebook = pieces()
    return train_reader(prepared, lexicon(), codebook, rotation, language_model(kind), out, changes, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_a_card_and_a_curve_are_written(prepared, tmp_path, kind):
    said: list[str] = []
    card = run(prepared, tmp_path, kind=kind, evaluate={"again": prepared}, say=said.append)
    assert card["finished"] is True and card["progress"]["step"] == 6
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    assert card["data"]["passages"] == {"others": 6, "towns": 10} and card["data"]["questions"] == 16
    assert card["base"]["digest"] == language_model(kind).digest
    steps = [json.loads(line)["step"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 6
    assert {name: [row["read"] for row in rows] for name, rows in card["results"].items()} == {
        "held_out": ["closed", "recall"],
        "again": ["closed", "recall"],
    }
    assert [row["questions"] for row in card["results"]["held_out"]] == [4, 4]
    _, config = load_adapter(language_model(kind).model, tmp_path, base_digest=language_model(kind).digest)
    assert config == RUN.kv_lora
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert any(one.abs().max() > 0 for name, one in state.items() if "lora_B" in name)
    assert any("--- again: 16 passages" in line for line in said)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(prepared, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run(prepared, tmp_path / name, replace(RUN, steps=2, seed=seed))
    one, same, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_run_in_several_calls_ends_where_one_call_does(prepared, tmp_path):
    parts = replace(RUN, call_minutes=1e-9)  # every call stops after its first pool
    cards = []
    while not cards or not cards[-1]["finished"]:
        cards.append(run(prepared, tmp_path / "parts", parts))
        assert len(cards) < 6
    whole = run(prepared, tmp_path / "whole")
    assert len(cards) > 1 and cards[0]["results"] == {}
    assert cards[-1]["progress"]["samples"] == whole["progress"]["samples"]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_restarting_forgets_the_checkpoint(prepared, tmp_path):
    run(prepared, tmp_path, replace(RUN, call_minutes=1e-9))
    card = run(prepared, tmp_path, replace(RUN, steps=1), resume=False)
    assert card["progress"]["step"] == 1


def test_held_out_passages_are_never_shown_in_training(prepared, tmp_path, monkeypatch):
    seen = []
    real = reader_module.build_source

    def noting(data, *arguments, **options):
        seen.extend(data.table["split"].to_pylist())
        return real(data, *arguments, **options)

    monkeypatch.setattr(reader_module, "build_source", noting)
    run(prepared, tmp_path, replace(RUN, steps=1))
    assert set(seen) == {"train"} and len(seen) == 12


def test_a_looked_at_model_goes_on_learning(prepared, tmp_path):
    run(prepared, tmp_path, replace(RUN, evaluate_every=0.3))
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    looked = [line for line in curve if "recall_f1" in line]
    assert looked and 0 <= looked[0]["closed_em"] <= 100 and curve[-1]["step"] == 6


def test_a_failing_compiler_is_said_and_training_goes_on(prepared, tmp_path, monkeypatch):
    def broken(self, batch):
        if self.compiled:
            raise RuntimeError("no compiler on this machine")
        return real(self, batch)

    real = reader_module.Trainer._forward
    monkeypatch.setattr(reader_module.Trainer, "_forward", broken)
    monkeypatch.setattr("mbc_core.training.loop._compile_layers", lambda decoder: True)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: nullcontext())  # it would outlive the test
    said: list[str] = []
    rotation, codebook = pieces()
    made = reader_module.Trainer
    monkeypatch.setattr(reader_module, "Trainer", lambda *a, **o: made(*a, **{**o, "compile_layers": True}))
    card = train_reader(prepared, lexicon(), codebook, rotation, language_model(), tmp_path, RUN, say=said.append)
    assert any("compiling failed (RuntimeError: no compiler on this machine)" in line for line in said)
    assert card["finished"] and card["compiled"] is False


def test_misspelt_targets_stop_the_run_by_name(prepared, tmp_path):
    with pytest.raises(ModelError, match=r"`v_porj` does not name one projection"):
        run(prepared, tmp_path, targets=["k_proj", "v_porj"])


@pytest.fixture
def files(tmp_path):
    """Everything the command takes, as files."""
    rotation, codebook = pieces()
    rotation.save(tmp_path / "rotation.safetensors")
    (tmp_path / "codebook.safetensors").write_bytes(codebook.to_bytes())
    lexicon().save(tmp_path / "lexicon.json")
    for name, model in (("llama", llama()), ("gpt2", gpt2())):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_command_makes_an_adapter_for_any_base(prepared, files, name):
    arguments = [
        "reader", str(prepared), "--lm", str(files / name), "--lexicon", str(files / "lexicon.json"),
        "--codebook", str(files / "codebook.safetensors"), "--rotation", str(files / "rotation.safetensors"),
        "--out", str(files / "out"), "--steps", "2", "--minutes", "0", "--batch", "4", "--rank", "2", "--device", "cpu",
        "--evaluate", f"same={prepared}", "--evaluate-questions", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert card["progress"]["step"] == 2 and set(card["results"]) == {"held_out", "same"}
    load_adapter(llama() if name == "llama" else gpt2(), files / "out")


def test_wrong_use_of_the_command_is_told(prepared, files):
    shared = ["reader", str(prepared), "--lm", "x", "--out", str(files / "out")]
    missing = CliRunner().invoke(train, shared)
    assert missing.exit_code == 2 and "Missing option '--lexicon'" in missing.stderr
    wrong = CliRunner().invoke(train, [*shared, "--evaluate", "nothing"])
    assert wrong.exit_code == 2 and "'nothing' is not NAME=FOLDER" in wrong.stderr
