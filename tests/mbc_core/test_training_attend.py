"""`mbc train attend` end to end on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mbc_core.reader.attend import PROJECTOR_FILE, load_projector
from mbc_core.reader.kv_lora import KVLoraConfig, load_adapter
from mbc_core.training import attend as attend_module
from mbc_core.training.attend import ATTEND_MIXTURE, AttendRun, train_attend
from tests.mbc_core.prepared_data import write_prepared
from tests.mbc_core.tiny_reader import BagOfWords, language_model, lexicon, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

RUN = AttendRun(
    steps=6, minutes=None, batch=8, rows=4, lr=3e-3, evaluate_questions=4, evaluate_every=0.9, soft_tokens=3,
    hidden=32, rank=8, variants=(0.8, 0.2), kv_lora=KVLoraConfig(r=2, alpha=4), mixture=ATTEND_MIXTURE,
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
        ("closed", 0), ("attend-shuffled", 5), ("attend", 1), ("attend", 3), ("attend", 5), ("attend-right", 1)
    ]  # fmt: skip
    base = language_model(kind)
    found = load_projector(tmp_path / PROJECTOR_FILE, base_digest=base.digest)
    assert found.projector.config.soft_tokens == 3
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
