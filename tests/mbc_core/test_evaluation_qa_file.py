"""QA files: what a row may say, documents taken once, rows chosen by field, seeded draws, errors with the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, load_qa

ROWS = [
    {"id": "a", "text": "Ann lives in Rome.", "question": "Where?", "answer": "Rome", "split": "test", "year": 1},
    {"doc_id": 7, "text": "Bob is 9.", "timestamp": "2024-07-01", "question": "How old?", "answers": ["9", "nine"]},
    {"id": "a", "text": "Ann lives in Rome.", "question": "Who?", "answer": "Ann", "answers": ["Ann", "she"],
     "split": "dev"},
]  # fmt: skip


def write(path: Path, rows, *, pack=False) -> Path:
    data = b"\n".join(json.dumps(row).encode() if isinstance(row, dict) else row for row in rows) + b"\n"
    path.write_bytes(gzip.compress(data) if pack else data)
    return path


@pytest.mark.parametrize("pack", [False, True])
def test_documents_once_by_id_and_questions_in_order(tmp_path, pack):
    found = load_qa(write(tmp_path / "qa.jsonl", [ROWS[0], b"", *ROWS[1:]], pack=pack))
    assert found.documents == (QaDocument("a", "Ann lives in Rome."), QaDocument("7", "Bob is 9.", "2024-07-01"))
    assert found.questions == (
        QaQuestion("Where?", ("Rome",), 0),
        QaQuestion("How old?", ("9", "nine"), 1),
        QaQuestion("Who?", ("Ann", "she"), 0),
    )


def test_a_document_that_is_dated_again_keeps_its_first_time(tmp_path):
    found = load_qa(write(tmp_path / "qa.jsonl", [ROWS[1], {**ROWS[1], "timestamp": "2025-01-01"}]))
    assert found.documents == (QaDocument("7", "Bob is 9.", "2024-07-01"),) and len(found.questions) == 2


def test_the_digest_is_of_the_content_alone(tmp_path):
    plain = load_qa(write(tmp_path / "a.jsonl", ROWS))
    assert load_qa(write(tmp_path / "b.gz", ROWS, pack=True)).digest == plain.digest
    assert load_qa(write(tmp_path / "c.jsonl", ROWS[:2])).digest != plain.digest == plain.first_documents(5).digest
    other = [{**ROWS[0], "answer": "Milan"}, *ROWS[1:]]
    assert load_qa(write(tmp_path / "d.jsonl", other)).digest != plain.digest


def test_rows_are_chosen_by_field(tmp_path):
    path = write(tmp_path / "qa.jsonl", ROWS)
    assert [one.question for one in load_qa(path, {"split": frozenset({"test", "dev"})}).questions] == [
        "Where?",
        "Who?",
    ]
    only = {"split": frozenset({"test", "dev"}), "year": frozenset({"1"})}
    assert [one.question for one in load_qa(path, only).questions] == ["Where?"]
    with pytest.raises(UsageError, match=r"offers no question: .*no row has split = nowhere\. Fix: check --only"):
        load_qa(path, {"split": frozenset({"nowhere"})})


def test_the_first_documents_keep_their_questions(tmp_path):
    found = load_qa(write(tmp_path / "qa.jsonl", ROWS))
    assert [one.question for one in found.first_documents(1).questions] == ["Where?", "Who?"]
    assert len(found.first_documents(1).documents) == 1
    assert found.first_documents(None) is found is found.first_documents(2)


def test_draws_are_seeded_ascending_and_without_repeats(tmp_path):
    rows = [{"id": n % 10, "text": f"t{n % 10}", "question": f"q{n}", "answer": "x"} for n in range(50)]
    found = load_qa(write(tmp_path / "qa.jsonl", rows))
    assert found.drawn(None, 0) == list(range(50)) == found.drawn(50, 3)
    some = found.drawn(12, 1)
    assert some == sorted(set(some)) == found.drawn(12, 1)
    assert len(some) == 12 and some != found.drawn(12, 2)
    assert found.drawn(None, 0, documents=3) == [n for n in range(50) if n % 10 < 3]
    assert set(found.drawn(4, 0, documents=3)) <= {n for n in range(50) if n % 10 < 3}
    spread = np.mean([found.drawn(5, seed) for seed in range(60)])
    assert 18 < spread < 31, "a draw takes questions from everywhere"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{", r"line 2 of the QA file cannot be used"),
        (b"\xff", r"line 2 .*can't decode byte"),
        (b"[1]", r"line 2 .*not a JSON object"),
        ({"text": "x", "question": "q", "answer": "a"}, r"line 2 .*the document has no id"),
        ({"id": 1, "question": "q", "answer": "a"}, r"line 2 .*the document has no text"),
        ({"id": 1, "text": "x", "timestamp": "soon", "question": "q", "answer": "a"}, r"not a date"),
        ({"id": 1, "text": "x", "answer": "a"}, r"`question` is missing"),
        ({"id": 1, "text": "x", "question": " ", "answer": "a"}, r"`question` is missing, empty"),
        ({"id": 1, "text": "x", "question": "q"}, r"neither `answer` is a string"),
        ({"id": 1, "text": "x", "question": "q", "answers": ["", "b"]}, r"none of them empty"),
        ({"id": 1, "text": "x", "question": "q", "answers": [3]}, r"`answers` a list of strings"),
        ({**ROWS[0], "text": "Ann moved."}, r"line 2 .*'a' had another text on an earlier line"),
    ],
)
def test_a_bad_row_names_its_line(tmp_path, row, told):
    with pytest.raises(DamagedFile, match=told):
        load_qa(write(tmp_path / "qa.jsonl", [ROWS[0], row]))


def test_bad_files(tmp_path):
    with pytest.raises(UsageError, match=r"the QA file cannot be read: .*No such file"):
        load_qa(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"offers no question: .*it is empty"):
        load_qa(write(tmp_path / "empty.jsonl", []))
    cut = write(tmp_path / "cut.gz", ROWS, pack=True)
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(DamagedFile, match="the gzip stream is damaged"):
        load_qa(cut)
