"""First step of the nightly proof through the real pipeline, on a tiny encoder: what a growing bank recalled when."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_reader
from tiny import POISON, settings

from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from schemas.document import document_key
from tests.bench.nightly_prepare import GATE_CLOZE, SALT, GrowingBank, prepare

TOWNS = tiny_reader.documents(24)


def qa_set() -> QaSet:
    """Eight towns a quarter, latest first, and one that the encoder refuses."""
    months = ("2025-01-03", "2024-11-20", "2024-08-01")
    documents = [
        QaDocument(one.doc_id, f"{one.text} Nobody knew it before.", months[place // 8])
        for place, one in enumerate(TOWNS)
    ]
    documents.append(QaDocument("bad", f"This text holds {POISON} and six more words.", "2024-08-02"))
    questions = [QaQuestion(one.question, (one.answer,), place) for place, one in enumerate(TOWNS)]
    return QaSet.of(tuple(documents), (*questions, QaQuestion("What is bad?", ("this",), len(TOWNS))))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def made(pieces):
    return prepare(qa_set(), settings=pieces, least=2)


def test_quarters_come_in_order_of_time(made):
    assert made.quarters == ("2024Q3", "2024Q4", "2025Q1")
    assert [one.quarter for one in made.documents] == [2] * 8 + [1] * 8 + [0] * 8 + [0]
    assert [one["documents"] for one in made.figures["ingested"]] == [8, 8, 8]
    salt = SALT.digest()
    assert [one.half for one in made.documents] == [document_key(one.doc_id, salt) & 1 for one in made.documents]
    assert {one.half for one in made.documents} == {0, 1}


def test_a_bank_recalls_only_what_it_held_then(made):
    came = np.array([one.quarter for one in made.documents])[list(made.owners)]
    for quarter, asked in enumerate(made.recalled):
        for question, rows in asked.items():
            assert len(rows) == 8 and len(set(rows)) == 8
            assert max(came[list(rows)]) <= quarter
            own = made.documents[made.questions[question].document].quarter
            assert own <= quarter and (made.questions[question].kind != "gate" or own == quarter)
    asked = set(made.select(range(3), ("asked", "cloze")))
    assert set(made.recalled[2]) == asked | set(made.select([2], ("gate",)))


def test_the_row_that_answers_belongs_to_the_document_and_holds_the_answer(made):
    for one in made.questions:
        assert made.owners[one.true] == one.document
        if one.kind != "asked":
            assert one.answers[0] in made.texts[one.true]
    assert all(" ".join(made.words[row].split()) for row in range(len(made.words)))


def test_cloze_questions_are_those_of_the_replay_and_a_few_more(made, pieces, tmp_path):
    qa = qa_set()
    bank = GrowingBank(tmp_path, pieces)
    bank.add(qa.documents)
    rows = bank.open().bank.replay().to_pylist()
    assert {one.question for one in made.questions if one.kind == "cloze"} == {row["question"] for row in rows}
    held = {row["key"] for row in rows if row["split"] != "train"}
    keys = [document_key(one.doc_id, SALT.digest()) for one in made.documents]
    assert [one.held_out for one in made.documents] == [key in held for key in keys]
    gate = [one.document for one in made.questions if one.kind == "gate"]
    assert gate and max(np.bincount(gate)) <= GATE_CLOZE
    every = [(one.question, one.document) for one in made.questions]
    assert len(set(every)) == len(every)


def test_questions_about_refused_documents_are_left_out_and_counted(made):
    assert made.figures["missing"] >= 1 and "What is bad?" not in {one.question for one in made.questions}
    assert sum(one.kind == "asked" for one in made.questions) == len(TOWNS)


def test_recall_is_that_of_the_bank(made, pieces, tmp_path):
    qa = qa_set()
    bank = GrowingBank(tmp_path, pieces)
    bank.add([one for one, told in zip(qa.documents, made.documents, strict=True) if told.quarter == 0])
    memory = bank.open()
    for number in made.select([0])[:4]:
        recalled = memory.recall([made.questions[number].question], 8)[0]
        assert [made.words[row] for row in made.rows(0, number)] == [one.words for one in recalled]
        names = [made.documents[made.owners[row]].doc_id for row in made.rows(0, number)]
        assert names == [one.doc_id for one in recalled]
