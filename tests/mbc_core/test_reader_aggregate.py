"""The aggregate read of a bank: exact over its histogram, on every profile, as of any moment; what does not fit is
named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mbc_core import defaults, weights
from mbc_core.answering import Reader
from mbc_core.bank.codebooks import register_codebook
from mbc_core.cli import cli, run
from mbc_core.codes import unpack
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError, UsageError
from mbc_core.memory import Memory
from mbc_core.paper.aggregation import Memory as Vectors
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.files import WEIGHTS_FILE, save_paper_model
from mbc_core.paper.model import PaperModel
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import (
    CODEWORDS,
    SLOTS,
    WIDTH,
    BagOfWords,
    Doc,
    add_documents,
    documents,
    language_model,
    lexicon,
    make_bank,
    pieces,
    tokenizer,
)

pytestmark = pytest.mark.usefixtures("single_thread")
ASKED = ["Who founded Avalon00?", "Which goods leave Gotham06?", "When?"]


@pytest.fixture(autouse=True)
def tiny_pieces(monkeypatch):
    monkeypatch.setattr(defaults, "rotation", lambda: pieces()[0])
    monkeypatch.setattr(defaults, "lexicon_for", lambda manifest: lexicon())
    monkeypatch.setattr(defaults, "encoder_for", lambda manifest, **options: BagOfWords())
    monkeypatch.setattr(defaults, "language_model", lambda *given, **options: language_model())
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)


@pytest.fixture
def folder(tmp_path):
    return write_weights(tmp_path / "paper")


def write_weights(where: Path, slots: int = SLOTS, **card: str) -> Path:
    """Weights whose answers depend on what they read, with their card."""
    config = PaperConfig.address(
        slots, WIDTH, codewords=CODEWORDS, heads=4, blocks=2, lora_r=2, lora_alpha=4, prefix_hidden=16
    )
    words = torch.zeros(CODEWORDS, WIDTH // slots)
    built = PaperModel(config, language_model(), codewords=words)
    with torch.no_grad():
        for name, one in built.named_parameters():
            if name.startswith("prefix.") and ("outer" in name or "skip" in name):
                one *= 6
            if name.startswith("aggregator.") and name.endswith(("query.weight", "key.weight", "value.weight")):
                one *= 6
    save_paper_model(built, where)
    told = {"encoder": "0123456789ab", "rotation": pieces()[0].digest, **card}
    (where / "card.json").write_text(json.dumps({"data": told}))
    return where


def oracle(bank, folder, as_of=None) -> list[str]:
    """Every code vector of every live passage, looked up one at a time; questions one at a time."""
    reader = Reader(bank, paper=folder, language_model=language_model(), encoder=BagOfWords())
    model, vectors = reader.aggregate.model, []
    for row in bank.passages(as_of).to_pylist():
        codes = unpack(np.frombuffer(row["address"], np.uint8)[None], SLOTS)[0]
        vectors += [bank.codebook(row["codebook_version"]).codewords[code] for code in codes]
    memory = Vectors(torch.from_numpy(np.stack(vectors))) if vectors else None
    form = PromptFormat(tokenizer())
    answers = []
    for question in ASKED:
        embedding = torch.from_numpy(BagOfWords().encode_questions([question]))
        with torch.no_grad():
            pairs = model.read(model.queries(embeddings=embedding), memory)
        prompt = form.build([], question, 512).ids
        answers += answer_prompts(model.language_model, form, [prompt], prefixes=lambda places, pairs=pairs: pairs)
    return answers


def said(bank, folder, **options) -> list[str]:
    return [one.answer for one in Reader(bank, paper=folder, **options).ask_many(ASKED, read="aggregate")]


@pytest.mark.parametrize("words", [24, 0])
def test_answers_are_those_of_every_code_vector_read_one_by_one(tmp_path, folder, words):
    bank = make_bank(tmp_path / "b", documents(10), words=words)
    answers = said(bank, folder)
    assert answers == oracle(bank, folder)
    half = make_bank(tmp_path / "half", documents(10)[:3], words=words)
    assert said(half, folder) == oracle(half, folder) != answers  # so the bank matters


def test_codebook_versions_are_read_together(tmp_path, folder):
    bank = make_bank(tmp_path / "b", documents(10)[:5])
    first = pieces()[1]
    second = replace(
        first, version=1, parent=0, codewords=(first.codewords * 3)[::-1].copy(), sum=(first.sum * 3)[::-1].copy(),
        built_from=("2024-07-01T00:00:00Z",), last_window="2024-07-01T00:00:00Z",
    )  # fmt: skip
    register_codebook(bank, second)
    add_documents(bank, documents(10)[5:], "second", second)
    assert said(bank, folder) == oracle(bank, folder)


def test_as_of_reads_the_codes_of_then(tmp_path, folder):
    bank = make_bank(tmp_path / "b", documents(4))
    then = max(bank.passages()["added_at"].to_pylist())
    before = said(bank, folder)
    add_documents(bank, [Doc("more", "A colossal lighthouse burns at Zanzibar nightly. " * 3)], "more")
    assert said(bank, folder, as_of=then) == before
    assert Reader(bank, paper=folder, as_of=then).histogram.passages == 4
    assert Reader(bank, paper=folder).histogram.passages > 4


def test_an_answer_names_no_source_and_needs_no_index(tmp_path, folder, monkeypatch):
    bank = make_bank(tmp_path / "b", documents(4), words=0)
    monkeypatch.setattr(Memory, "open", lambda *given, **options: pytest.fail("no index is needed"))
    told = Reader(bank, paper=folder).ask(ASKED[0], read="aggregate").to_json()
    assert told["sources"] == [] and told["read"] == "aggregate" and told["milliseconds"]["recall"] > 0


def test_other_reads_are_as_they_were_beside_it(tmp_path, folder):
    bank = make_bank(tmp_path / "b", documents(6))
    alone = [one.answer for one in Reader(bank).ask_many(ASKED, k=2)]
    shared = language_model()
    reader = Reader(bank, paper=folder, language_model=shared)
    whole = [one.answer for one in reader.ask_many(ASKED, read="aggregate")]
    assert [one.answer for one in reader.ask_many(ASKED, k=2)] == alone
    assert [one.answer for one in reader.ask_many(ASKED, read="aggregate")] == whole
    assert not hasattr(shared.model, "peft_config")


def test_the_command_prints_it_and_tells_of_an_empty_bank(tmp_path, folder, capsys):
    make_bank(tmp_path / "b", documents(4), words=0)
    make_bank(tmp_path / "none", [])
    arguments = ["ask", ASKED[0], "--read", "aggregate", "--paper", str(folder), "--json", "--bank"]
    assert run(cli, [*arguments, str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["sources"] == [] and "holds no documents" not in shown.err
    assert run(cli, [*arguments, str(tmp_path / "none")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answer"] is not None and "the bank holds no documents" in shown.err


def test_missing_weights_are_named(tmp_path, monkeypatch, capsys):
    make_bank(tmp_path / "b", documents(4))
    monkeypatch.setattr(weights, "path", lambda name: tmp_path / "weights" / name)
    with pytest.raises(ModelError, match="no weights of the aggregate read for T = 24"):
        Reader(tmp_path / "b").ask("Who?", read="aggregate")
    assert run(cli, ["ask", "Who?", "--read", "aggregate", "--bank", str(tmp_path / "b")]) == 1
    assert "--paper" in capsys.readouterr().err


def test_shipped_weights_must_match_their_card(tmp_path, monkeypatch):
    where = write_weights(tmp_path / "weights" / "paper_t24")
    monkeypatch.setattr(weights, "path", lambda name: tmp_path / "weights" / name)
    card = json.loads((where / "card.json").read_text())
    (where / "card.json").write_text(json.dumps({**card, "file_sha256": "0" * 64}))
    with pytest.raises(DamagedFile, match="does not match its card"):
        defaults.paper_weights(24)


@pytest.mark.parametrize(
    ("slots", "card", "what"),
    [(12, {}, "another T"), (24, {"encoder": "ba98" * 3}, "another encoder"), (24, {"rotation": "f" * 64}, "rotation")],
)
def test_a_bank_that_the_weights_cannot_read_is_refused_by_name(tmp_path, slots, card, what):
    bank = make_bank(tmp_path / "b", documents(4))
    folder = write_weights(tmp_path / "other", slots, **card)
    with pytest.raises(IncompatibleBank, match=what):
        Reader(bank, paper=folder).ask("Who?", read="aggregate")


def test_damaged_weights_and_cards_are_told(tmp_path, folder):
    bank = make_bank(tmp_path / "b", documents(4))
    (folder / "card.json").write_text("{}")
    with pytest.raises(DamagedFile, match="card"):
        Reader(bank, paper=folder).ask("Who?", read="aggregate")
    other = write_weights(tmp_path / "cut")
    (other / WEIGHTS_FILE).write_bytes((other / WEIGHTS_FILE).read_bytes()[:-9])
    with pytest.raises(DamagedFile, match="mbc train paper"):
        Reader(bank, paper=other).ask("Who?", read="aggregate")
    with pytest.raises(UsageError, match="no such read"):
        Reader(bank).ask("Who?", read="agregate")
