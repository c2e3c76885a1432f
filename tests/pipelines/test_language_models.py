"""One bank read by two families of language models, GPT-2 and LLaMA, each with an adapter that was made for it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import tiny_reader
import torch
from prepared_data import write_prepared
from tiny import TinyEncoder, corpus, rotation, settings, write_corpus

from mbc_core.adapters import AdapterRegistry
from mbc_core.answering import Reader
from mbc_core.bank import Bank
from mbc_core.cli.app import run
from mbc_core.errors import ModelError
from mbc_core.lexicon import Lexicon
from mbc_core.memory import Memory
from mbc_core.reader.kv_lora import KVLoraConfig, adapter_base, adapter_config, add_kv_lora, save_adapter
from mbc_core.reader.language_model import LanguageModel, load_language_model
from mbc_core.training import candidate
from mbc_core.training import reader as reader_module
from mbc_core.training.adapt import AdaptRun
from mbc_core.training.gate import Decision, GateRule
from pipelines.adapt import _FRESH_LR, run_adapt
from pipelines.ingest import run_ingest
from pipelines.main import build

FAMILIES = {"llama": tiny_reader.llama, "gpt2": tiny_reader.gpt2}


@pytest.fixture(autouse=True)
def single_thread():
    """On a busy machine torch's threads make tiny models many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def folders(work) -> dict[str, Path]:
    """Model folders as they are on a hub: config, safetensors, tokenizer."""
    for kind, make in FAMILIES.items():
        make().save_pretrained(work / kind)
        tiny_reader.tokenizer().save_pretrained(work / kind)
    return {kind: work / kind for kind in FAMILIES}


@pytest.fixture(scope="module")
def bank(work) -> Bank:
    given = settings(work / "pieces", replay_per_window=64)
    run_ingest([write_corpus(work / "a.jsonl", corpus(60))], str(work / "bank"), given, show_progress=False)
    return Bank.open(work / "bank")


@pytest.fixture
def mbc(monkeypatch):
    """`mbc …` on the tiny encoder's pieces; everything else is the release's own."""
    opened = Memory.open

    def open_tiny(bank, encoder=None, **options):
        return opened(bank, TinyEncoder(), **{**options, "lexicon": Lexicon([]), "rotation": rotation()})

    monkeypatch.setattr(Memory, "open", open_tiny)
    decision = Decision(True, "promoted", "better by decree", {}, {}, GateRule())
    monkeypatch.setattr(candidate, "decide", lambda *scores: decision)
    return lambda *words: run(build(), [str(word) for word in words])


def train(mbc, work: Path, folder: Path, out: Path) -> int:
    """`mbc train reader --lm FOLDER`, two steps."""
    turn, codebook = tiny_reader.pieces()
    tiny_reader.lexicon().save(work / "lexicon.json")
    turn.save(work / "rotation.safetensors")
    (work / "codebook.safetensors").write_bytes(codebook.to_bytes())
    return mbc(
        "train", "reader", write_prepared(work / "prepared", 16), "--lm", folder, "--lexicon", work / "lexicon.json",
        "--codebook", work / "codebook.safetensors", "--rotation", work / "rotation.safetensors", "--out", out,
        "--steps", 2, "--minutes", 0, "--batch", 4, "--rank", 2, "--evaluate-questions", 2, "--device", "cpu",
    )  # fmt: skip


def test_one_bank_two_families(mbc, work, folders, bank, monkeypatch, capsys):
    """Train for each base, adapt in the bank, ask: each base answers with its own live adapter, from the same lines."""
    monkeypatch.setattr(reader_module, "_POOL_STEPS", 1)
    live, answers = {}, {}
    for kind, folder in folders.items():
        assert train(mbc, work, folder, work / f"{kind}-adapter") == 0
        card = json.loads(capsys.readouterr().out)
        base = load_language_model(folder)
        assert card["base"] == {"name": kind, "digest": base.digest}
        assert adapter_base(work / f"{kind}-adapter") == base.digest
        adapting = ("adapt", "--bank", bank.uri, "--lm", folder, "--adapter", work / f"{kind}-adapter", "--steps", 1)
        assert mbc(*adapting, "--device", "cpu", "--json") == 0
        live[kind] = json.loads(capsys.readouterr().out)["candidate"]
    registry = AdapterRegistry(bank)
    for kind, folder in folders.items():
        assert registry.live(load_language_model(folder).digest) == live[kind]
        card = registry.info(live[kind]).card
        assert card["started_from"].endswith(f"{kind}-adapter")
        assert card["run"]["lr"] < _FRESH_LR, "an adapter that was trained is only refined"
        assert mbc("ask", "Word3 Word12?", "--bank", bank.uri, "--lm", folder, "--device", "cpu", "--json") == 0
        answers[kind] = json.loads(capsys.readouterr().out)
    assert live["llama"] != live["gpt2"]
    assert answers["llama"]["sources"] == answers["gpt2"]["sources"] != []
    assert answers["llama"]["sources"][0]["words"]
    readers = {kind: Reader(Memory.open(bank), language_model=load_language_model(folders[kind])) for kind in folders}
    assert {kind: reader.adapter for kind, reader in readers.items()} == live
    assert {adapter_config(reader.language_model.model).r for reader in readers.values()} == {2}


def test_an_adapter_of_the_other_family_is_refused(mbc, work, folders, bank, capsys):
    llama, folder, config = load_language_model(folders["llama"]), work / "other", KVLoraConfig(r=2, alpha=4)
    save_adapter(add_kv_lora(llama.model, config), folder, config, base_digest=llama.digest, base_name="llama")
    with pytest.raises(ModelError, match="trained for another base model"):
        _ = Reader(
            Memory.open(bank), language_model=load_language_model(folders["gpt2"]), adapter=folder
        ).language_model
    words = ("adapt", "--bank", bank.uri, "--lm", folders["gpt2"], "--adapter", folder, "--steps", 1)
    assert mbc(*words, "--device", "cpu") == 1
    assert "trained for another base model" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_without_adapter_starts_fresh_at_the_first_trainings_rate(mbc, bank, kind):
    base = tiny_reader.language_model(kind, seed=5)
    said: list[str] = []
    result = run_adapt(bank, AdaptRun(steps=1, batch=4), language_model=base, say=said.append)
    card = AdapterRegistry(bank).info(result["candidate"]).card
    assert (card["started_from"], card["run"]["lr"]) == (None, _FRESH_LR)
    assert any("fresh weights, learning rate 0.0007" in line for line in said)
    assert isinstance(Reader(Memory.open(bank), language_model=tiny_reader.language_model(kind, seed=5)).language_model,
                      LanguageModel)  # fmt: skip


def test_a_model_that_is_not_there(mbc, bank, capsys, monkeypatch):
    assert mbc("adapt", "--bank", bank.uri, "--lm", "no/such-model", "--steps", 1, "--device", "cpu") == 1
    assert "there is no such language model: 'no/such-model'" in capsys.readouterr().err


def test_lm_and_model_are_one_option():
    ask = build().get_command(click.Context(build()), "ask")
    (option,) = [one for one in ask.params if one.name == "model"]
    assert option.opts == ["--lm", "--model"]
