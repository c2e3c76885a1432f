"""The canary set: written once, the newest counts, nothing of a forgotten document stays, and the gate hears of it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mbc_core import canary as module
from mbc_core.bank import Bank
from mbc_core.canary import (
    Canary,
    CanaryRow,
    canary_files,
    draw_from_qa,
    draw_from_replay,
    load_canary,
    problems,
    read_canary,
    save_canary,
)
from mbc_core.cli.adapters import adapters
from mbc_core.cli.app import run
from mbc_core.errors import DamagedFile, StorageError, UsageError
from mbc_core.evaluation.qa_file import load_qa
from mbc_core.memory import Memory
from mbc_core.training.replay_set import build_training_set, document_name
from schemas.document import document_key
from tests.mbc_core.tiny_reader import SALT, BagOfWords, documents, lexicon, make_bank, pieces

DOCS = documents(60)  # every fourth is held out
ROTATION, _ = pieces()


def key_of(name: str) -> int:
    return document_key(name, bytes.fromhex(SALT))


def open_memory(bank: Bank) -> Memory:
    return Memory.open(bank, BagOfWords(), lexicon=lexicon(), rotation=ROTATION)


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank", DOCS)


def rows(count: int = 3, first: int = 0) -> list[CanaryRow]:
    names = [key_of(DOCS[first + number].doc_id) for number in range(count)]
    return [
        CanaryRow(f"Who is {number}?", f"N{number}", (f"words of {number}", "others"), (key, 5), 0, key)
        for number, key in enumerate(names)
    ]


def test_the_newest_set_counts_and_none_is_ever_changed(bank):
    assert load_canary(bank) is None and canary_files(bank) == []
    first = save_canary(bank, rows(3))
    before = bank.storage.read_bytes(first)
    assert save_canary(bank, rows(3)) == first, "the same again is the same file"
    second = save_canary(bank, rows(2))
    assert (
        canary_files(bank) == [first, second] and first.startswith("canary/0001-") and second.startswith("canary/0002-")
    )
    assert load_canary(bank) == Canary(second.removeprefix("canary/"), tuple(rows(2)))
    third = save_canary(bank, rows(3))
    assert third.startswith("canary/0003-") and load_canary(bank).rows == tuple(rows(3))
    assert bank.storage.read_bytes(first) == before
    with pytest.raises(StorageError, match="would be overwritten"):
        bank.storage.write_new(first, b"other")
    with pytest.raises(UsageError, match="the canary set is empty"):
        save_canary(bank, [])


def test_rows_become_examples_that_nobody_trains_on(bank):
    one, lost = rows(1)[0], replace(rows(1)[0], true=None)
    assert one.example().split == "canary" and one.example().true_line == "words of 0"
    assert one.example().document == document_name(one.document)
    assert (lost.example().true, lost.example().true_line) == (None, "")


def damage(bank: Bank, path: str, data: bytes) -> None:
    (Path(bank.uri) / path).write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "edited", "garbage"])
def test_damage_is_found(bank, how):
    path = save_canary(bank, rows())
    assert problems(bank) == [] and bank.inspect(verify=True)["ok"]
    data = bank.storage.read_bytes(path)
    edited = gzip.compress(gzip.decompress(data).replace(b"N1", b"N9"), mtime=0)
    damage(bank, path, {"cut": data[:50], "edited": edited, "garbage": b"x"}[how])
    with pytest.raises(DamagedFile, match=r"the canary set .*0001-.* cannot be read"):
        load_canary(bank)
    found = bank.inspect(verify=True)
    assert not found["ok"] and sum("the canary set" in line for line in found["problems"]) == 1


def test_its_bytes_count_with_the_adapters(bank):
    before = bank.inspect()["bytes"]
    path = save_canary(bank, rows())
    after, size = bank.inspect()["bytes"], bank.storage.size(path)
    assert (after["adapters"] - before["adapters"], after["other"]) == (size, before["other"])


def test_nothing_of_a_forgotten_document_stays(bank):
    """A row goes when its own document goes, and when the document of any of its lines goes."""
    older = save_canary(bank, rows(1))
    lines = replace(rows(1, first=7)[0], line_documents=(key_of(DOCS[7].doc_id), key_of(DOCS[0].doc_id)))
    newest = save_canary(bank, [*rows(3), lines])
    untouched = save_canary(bank, rows(1, first=9))
    save_canary(bank, [*rows(3), lines])
    found = bank.forget([DOCS[0].doc_id])
    assert found["forgotten"] == 1
    assert json.loads(Path(found["receipt"]).read_text())["removed"]["canary"] == 2
    kept = load_canary(bank)
    assert kept is not None and kept.rows == tuple(rows(3)[1:])
    files = canary_files(bank)
    assert untouched in files and older not in files and newest not in files
    for path in files:
        assert all(key_of(DOCS[0].doc_id) not in (row.document, *row.line_documents) for row in read_canary(bank, path))
    assert bank.inspect(verify=True)["ok"]


def test_a_set_of_only_forgotten_documents_is_gone(bank):
    save_canary(bank, rows(1))
    bank.forget([DOCS[0].doc_id])
    assert canary_files(bank) == [] and load_canary(bank) is None


def test_rows_do_not_count_from_the_moment_of_the_tombstone(bank, monkeypatch):
    """A forgetting that was killed before it came to the canary set."""
    save_canary(bank, rows(2))
    monkeypatch.setattr(module, "without_forgotten", lambda bank, stones: 0)
    bank.forget([DOCS[0].doc_id])
    assert [row.question for row in load_canary(bank).rows] == ["Who is 1?"]


# ------------------------------------------------------------------------------------------------- where it comes from


def test_a_share_of_the_held_out_documents_becomes_the_set_and_stays_out_of_the_gate(bank, monkeypatch):
    memory = open_memory(bank)
    assert draw_from_replay(memory) == [], "too few to say anything"
    monkeypatch.setattr(module, "FEWEST", 2)
    drawn = draw_from_replay(memory)
    held = {doc.question: doc for doc in DOCS if doc.split == "heldout"}
    assert 2 <= len(drawn) <= 14 and {row.question for row in drawn} < set(held)
    assert drawn == draw_from_replay(memory) and len(draw_from_replay(memory, most=2)) == 2
    for row in drawn:
        recalled = memory.recall([row.question], 8)[0]
        assert row.lines == tuple(one.words for one in recalled)
        assert row.line_documents == tuple(one.key for one in recalled)
        assert row.document == key_of(held[row.question].doc_id) and row.answer == held[row.question].answer
    save_canary(bank, drawn)
    found = build_training_set(memory, canary=load_canary(bank))
    asked = {split: {one.question for one in found.of_split(split)} for split in ("train", "new", "old", "canary")}
    assert asked["canary"] == {row.question for row in drawn}
    assert asked["new"] | asked["old"] == set(held) - asked["canary"]
    assert found.header.canary == load_canary(bank).name


def test_documents_of_the_set_are_not_trained_on(bank):
    train = next(doc for doc in DOCS if doc.split == "train")
    row = CanaryRow(train.question, train.answer, ("w",), (key_of(train.doc_id),), 0, key_of(train.doc_id))
    save_canary(bank, [row])
    found = build_training_set(open_memory(bank), canary=load_canary(bank))
    assert train.question not in {one.question for one in found.of_split("train")}


def qa_file(tmp_path: Path) -> Path:
    path = tmp_path / "qa.jsonl"
    lines = [{"id": doc.doc_id, "text": doc.text, "question": doc.question, "answer": doc.answer} for doc in DOCS[:12]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_trusted_questions_are_asked_with_passages_of_their_own_file(bank, tmp_path):
    made = draw_from_qa(bank, load_qa(qa_file(tmp_path)), BagOfWords(), lexicon())
    assert [(row.question, row.answer) for row in made] == [(doc.question, doc.answer) for doc in DOCS[:12]]
    names = {key_of(doc.doc_id) for doc in DOCS[:12]}
    bank_lines = dict(zip(open_memory(bank).keys().tolist(), open_memory(bank).words(range(60)), strict=True))
    for row, doc in zip(made, DOCS, strict=False):
        assert len(row.lines) == len(row.line_documents) == 8 and set(row.line_documents) <= names
        assert row.document == key_of(doc.doc_id) and row.line_documents[row.true] == row.document
        assert row.lines == tuple(bank_lines[key] for key in row.line_documents), "words as the bank keeps them"


def test_the_command_sets_and_shows_it(bank, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mbc_core.defaults.lexicon_for", lambda manifest: lexicon() if manifest.words else None)
    monkeypatch.setattr("mbc_core.defaults.encoder_for", lambda manifest, device: BagOfWords())
    words = ["canary", "--bank", bank.uri, "--device", "cpu"]
    assert run(adapters, words) == 0 and "no canary set yet" in capsys.readouterr().err
    assert run(adapters, [*words, "--qa", str(qa_file(tmp_path)), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"canary": load_canary(bank).name, "questions": 12}
    assert run(adapters, words) == 0 and f"{told['canary']}: 12 questions" in capsys.readouterr().err
    wordless = make_bank(tmp_path / "wordless", DOCS[:4], words=0)
    assert run(adapters, ["canary", "--bank", wordless.uri, "--qa", str(qa_file(tmp_path)), "--device", "cpu"]) == 2
    assert "no word codes to read" in capsys.readouterr().err
