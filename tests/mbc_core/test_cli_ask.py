"""`mbc ask` and `mbc recall` where the bank has little to give."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from mbc_core.answering import Answer, Reader
from mbc_core.cli import cli, run
from mbc_core.memory import Memory, Recalled


def passage(words: str) -> Recalled:
    return Recalled("doc-1", "A title", None, 0.5, words, 1, 0)


@pytest.fixture
def held(monkeypatch):
    """What the next bank that is opened recalls, and whether it has word codes."""
    held = SimpleNamespace(found=[], words=24)

    def open_memory(bank, encoder=None, **options):
        manifest = SimpleNamespace(words=held.words)
        return SimpleNamespace(bank=SimpleNamespace(manifest=manifest), recall=lambda questions, k: [held.found])

    def ask_many(self, questions, k, read):
        sources = tuple(held.found) if read == "recall" else ()
        return [Answer(question, "an answer", read, self.as_of, sources, 0.0, 0.0) for question in questions]

    monkeypatch.setattr(Memory, "open", open_memory)
    monkeypatch.setattr(Reader, "__init__", lambda self, bank, *, as_of, **options: setattr(self, "as_of", as_of))
    monkeypatch.setattr(Reader, "ask_many", ask_many)
    return held


def test_recall_prints_the_words(held, capsys):
    held.found = [passage("first words"), passage("second words")]
    assert run(cli, ["recall", "What?", "--bank", "b"]) == 0
    assert capsys.readouterr() == ("first words\nsecond words\n", "")


def test_recall_from_a_bank_without_words_prints_titles_not_blank_lines(held, capsys):
    held.found, held.words = [passage("")], 0
    assert run(cli, ["recall", "What?", "--bank", "b"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "A title\n"
    assert "the bank has no word codes" in shown.err


def test_an_empty_bank_is_named_on_standard_error(held, capsys):
    assert run(cli, ["recall", "What?", "--bank", "b", "--as-of", "2020-01-01"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "the bank holds no documents added by 2020-01-01T00:00:00Z\n")
    assert run(cli, ["ask", "What?", "--bank", "b", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answer"] == "an answer"
    assert "the bank holds no documents: what is answered comes from the language model alone" in shown.err
    assert run(cli, ["ask", "What?", "--bank", "b", "--read", "closed"]) == 0
    assert "no documents" not in capsys.readouterr().err


def test_questions_on_standard_input_must_be_utf8(held, capsys, monkeypatch):
    arguments = ["ask", "--questions", "-", "--bank", "b", "--json"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où?\n\nWhy?\n".encode())))
    assert run(cli, arguments) == 0
    assert [one["question"] for one in json.loads(capsys.readouterr().out)["answers"]] == ["Où?", "Why?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), errors="surrogateescape"))
    assert run(cli, arguments) == 2
    assert "the questions cannot be read: '-'" in capsys.readouterr().err
