"""`mbc train attend` end to end on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mbc_core.answering import Reader
from mbc_core.cli.train import train
from mbc_core.encoder import PassageEncoder
from mbc_core.errors import DamagedFile, UsageError
from mbc_core.reader.attend import PROJECTOR_FILE, load_projector
from mbc_core.reader.kv_lora import KVLoraConfig, load_adapter
from mbc_core.reader.language_model import load_language_model
from mbc_core.training import attend as attend_module
from mbc_core.training import attend_setup
from mbc_core.training.attend import train_attend
from mbc_core.training.attend_naming import NamingPhase
from mbc_core.training.attend_run import ATTEND_MIXTURE, AttendRun
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.qa_bank import open_bank
from tests.mbc_core.tiny_reader import (
    BagOfWords,
    documents,
    language_model,
    lexicon,
    llama,
    make_bank,
    pieces,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("single_thread")

RUN = AttendRun(
    steps=6, minutes=None, batch=8, rows=4, lr=3e-3, evaluate_questions=4, evaluate_every=0.9, words=60, answers=3,
    topics=2, hidden=32, variants=(0.8, 0.2), naming=NamingPhase(steps=4, batch=8),
    kv_lora=KVLoraConfig(r=2, alpha=4), mixture=ATTEND_MIXTURE,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prepared"), 16)


@pytest.fixture(autouse=True)
def short_pools(monkeypatch):
    monkeypatch.setattr(attend_module, "_POOL_STEPS", 2)


def run(prepared, out, changes=RUN, kind="llama", **options):
    rotation, codebook = pieces()
    options.setdefault("encoder", BagOfWords())
    return train_attend([prepared], lexicon(), [codebook], rotation, language_model(kind), out, changes, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_projector_adapter_card_and_curve_are_written(prepared, tmp_path, kind):
    said: list[str] = []
    card = run(prepared, tmp_path, kind=kind, evaluate={"again": prepared}, say=said.append)
    assert card["finished"] is True and card["progress"]["step"] == 6
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(card))
    assert [(row["read"], row["k"]) for row in card["results"]["again"]] == [
        ("closed", 0), ("attend-shuffled", 1), ("attend-shuffled", 5),
        ("attend", 1), ("attend", 3), ("attend", 5), ("attend-right", 1),
    ]  # fmt: skip
    base = language_model(kind)
    found = load_projector(tmp_path / PROJECTOR_FILE, base_digest=base.digest)
    assert found.projector.config.soft_tokens == 5 and found.projector.config.words == 60
    load_adapter(base.model, tmp_path, base_digest=base.digest)


def test_a_run_in_several_calls_ends_where_one_call_does(prepared, tmp_path):
    cards = []
    while not cards or not cards[-1]["finished"]:
        cards.append(run(prepared, tmp_path / "parts", replace(RUN, call_minutes=1e-9)))
        assert len(cards) < 6
    run(prepared, tmp_path / "whole")
    assert len(cards) > 1 and cards[0]["results"] == {}
    for name in ("adapter_model.safetensors", PROJECTOR_FILE):
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("parts", "whole"))
        assert all(torch.equal(ours[one], theirs[one]) for one in theirs)


def test_the_closed_rival_is_trained_on_the_same_questions_without_a_projector(prepared, tmp_path):
    card = run(prepared, tmp_path, replace(RUN, closed=True))
    assert not (tmp_path / PROJECTOR_FILE).exists() and card["parameters"]["projector"] == 0
    assert [row["read"] for row in card["results"]["held_out"]] == ["closed"]


def test_held_out_passages_are_never_shown_and_every_prepared_set_is(prepared, tmp_path, monkeypatch):
    seen: list[list[str]] = []
    real = attend_setup.attend_source

    def noting(data, *arguments, **options):
        seen.append(data.table["split"].to_pylist())
        return real(data, *arguments, **options)

    monkeypatch.setattr(attend_setup, "attend_source", noting)
    more = write_prepared(tmp_path / "more", 8, questions=False)
    rotation, codebook = pieces()
    train_attend(
        [prepared, more], lexicon(), [codebook], rotation, language_model(), tmp_path, replace(RUN, steps=1),
        encoder=BagOfWords(),
    )  # fmt: skip
    assert [set(one) for one in seen] == [{"train"}, {"dev"}] and [len(one) for one in seen] == [18 + 36, 6]


def test_a_finished_run_called_again_only_evaluates(prepared, tmp_path):
    run(prepared, tmp_path)
    before = (tmp_path / PROJECTOR_FILE).read_bytes()
    card = run(prepared, tmp_path, evaluate={"more": prepared})
    assert card["progress"]["step"] == 6 and set(card["results"]) == {"held_out", "more"}
    assert (tmp_path / PROJECTOR_FILE).read_bytes() == before


def test_shares_that_do_not_fit_the_codebooks_are_refused(prepared, tmp_path):
    with pytest.raises(UsageError, match="do not fit the codebooks"):
        run(prepared, tmp_path, replace(RUN, variants=(1.0,)))


def test_the_command_writes_weights_that_can_be_attended_with(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(PassageEncoder, "load", lambda *given, **options: BagOfWords())
    rotation, codebook = pieces()
    rotation.save(tmp_path / "rotation.safetensors")
    (tmp_path / "codebook.safetensors").write_bytes(codebook.to_bytes())
    lexicon().save(tmp_path / "lexicon.json")
    llama().save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    told = [
        "attend", str(prepared), "--lm", str(tmp_path / "lm"), "--lexicon", str(tmp_path / "lexicon.json"),
        "--codebook", str(tmp_path / "codebook.safetensors"), "--rotation", str(tmp_path / "rotation.safetensors"),
        "--out", str(tmp_path / "out"), "--steps", "2", "--minutes", "0", "--batch", "4", "--hidden", "16",
        "--words", "50", "--naming-steps", "2", "--naming-batch", "4",
        "--rank", "2", "--device", "cpu", "--evaluate-questions", "2", "--variants", "0.6,0.4",
        "--encoder", str(tmp_path), "--encoder-id", BagOfWords.encoder_id,
    ]  # fmt: skip
    result = CliRunner().invoke(train, told)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert card["progress"]["step"] == 2 and card["run"]["variants"] == [0.6, 0.4]
    base = load_language_model(tmp_path / "lm")
    memory = open_bank(make_bank(tmp_path / "bank", documents(8)))
    reader = Reader(memory, language_model=base, attend=tmp_path / "out")
    assert len(reader.ask_many([doc.question for doc in documents(3)], read="attend")) == 3
    wrong = CliRunner().invoke(train, [*told, "--variants", "much"])
    assert wrong.exit_code == 2 and "'much' is not a list of numbers" in wrong.stderr


def test_projectors_are_taken_up_and_a_damaged_one_is_told(prepared, tmp_path):
    run(prepared, tmp_path, replace(RUN, steps=1))
    kept = sorted((tmp_path / "naming").glob("*.safetensors"))
    assert [one.name.rpartition("-")[0] for one in kept] == ["half-0", "half-1", "whole"]
    said: list[str] = []
    run(prepared, tmp_path, replace(RUN, steps=2), say=said.append)
    assert not any(line.startswith("naming") for line in said)
    kept[0].write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match="a projector that had learnt to name words cannot be taken up"):
        run(prepared, tmp_path, replace(RUN, steps=3))


def test_no_steps_leave_the_adapter_as_it_is_and_train_one_projector(prepared, tmp_path):
    run(prepared, tmp_path / "start", replace(RUN, steps=2))
    card = run(prepared, tmp_path / "named", replace(RUN, steps=0), start=tmp_path / "start")
    assert card["finished"] and card["progress"]["step"] == 0 and card["started_from"] == "start"
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("named", "start"))
    assert all(torch.equal(ours[one], theirs[one]) for one in theirs)
    assert len(list((tmp_path / "named" / "naming").iterdir())) == 1
    projector = load_projector(tmp_path / "named" / PROJECTOR_FILE).projector
    assert projector.likely.abs().sum() == 0 and projector.bias.abs().sum() > 0
