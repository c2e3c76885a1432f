"""The scored set: questions from the documents themselves, read by recall, closed book and full text."""

from __future__ import annotations

import pytest

from mbc_core import defaults
from mbc_core.answering import Reader
from mbc_core.errors import UsageError
from mbc_core.evaluation.scored_set import Document, held_out_first, score_reads, scored_questions
from mbc_core.memory import Memory
from schemas.results import EvalRow
from tests.mbc_core.tiny_reader import BagOfWords, documents, language_model, lexicon, make_bank, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

DOCS = documents(16)
ENCODER = BagOfWords()
TEXTS = {one.doc_id: one.text for one in DOCS}


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Reader:
    monkeypatch.setattr(defaults, "reader_adapter", lambda: None)
    bank = make_bank(tmp_path / "bank", DOCS)
    memory = Memory.open(bank, ENCODER, lexicon=lexicon(), rotation=pieces()[0])
    return Reader(memory, language_model=language_model())


def questions(count: int = 6, seed: int = 0):
    return scored_questions(
        [Document(one.doc_id, one.text, one.doc_id) for one in DOCS], ENCODER, count=count, seed=seed
    )


def test_questions_are_of_their_documents_and_seeded():
    made = questions()
    assert len(made) == 6 and made == questions() and made != questions(seed=3)
    for one in made:
        assert one.answer in TEXTS[one.doc_id] and one.answer not in one.question
    assert [one.doc_id for one in made] == [one.doc_id for one in DOCS[:6]]


def test_documents_that_offer_no_blank_are_passed_over():
    short = [Document("short", "Too short."), *(Document(one.doc_id, one.text) for one in DOCS)]
    assert [one.doc_id for one in scored_questions(short, ENCODER, count=3)] == ["doc-00", "doc-01", "doc-02"]
    assert scored_questions([Document("short", "Too short.")], ENCODER, count=3) == []


def test_held_out_documents_come_first(reader):
    ids = [one.doc_id for one in DOCS]
    held = [one.doc_id for one in DOCS if one.split == "heldout"]
    assert held_out_first(reader, ids) == [*held, *(one for one in ids if one not in held)]


def test_three_reads_are_scored_on_the_same_questions(reader):
    said: list[str] = []
    scored = score_reads(reader, questions(), TEXTS, ENCODER.count_pieces, k=2, say=said.append)
    assert [(row["read"], row["k"], row["questions"]) for row in scored.rows] == [
        ("recall", 2, 6),
        ("closed", 0, 6),
        ("text", 2, 6),
    ]
    assert set(scored.rows[0]) == set(EvalRow.__annotations__) and len(said) == 3
    assert {name: len(found) for name, found in scored.predictions.items()} == {"recall": 6, "closed": 6, "text": 6}
    recall, closed, text = scored.rows
    assert recall["bytes_per_passage"] == pytest.approx(reader.memory.payload_bytes)
    assert closed["bytes_per_passage"] == 0 < recall["bytes_per_passage"] < text["bytes_per_passage"]
    assert closed["prompt_tokens"] < recall["prompt_tokens"] < text["prompt_tokens"]


def test_each_read_is_shown_its_own_memory(reader, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Reader,
        "answer",
        lambda self, memory, asked: [seen.append(list(lines)) or lines[0] if lines else "" for lines in memory],
    )
    monkeypatch.setattr(Reader, "prompt_tokens", lambda self, memory, asked: [1])
    score_reads(reader, questions(3), TEXTS, ENCODER.count_pieces, k=2)
    recalled = reader.memory.recall([one.question for one in questions(3)], 2)
    assert seen[:3] == [[one.words for one in found] for found in recalled]
    assert seen[3:] == [[TEXTS[one.doc_id] for one in found] for found in recalled]


def test_missing_texts_and_questions_are_told(reader):
    with pytest.raises(UsageError, match=r"the text of a recalled document is not given: 'doc-\d\d'"):
        score_reads(reader, questions(3), {"doc-00": TEXTS["doc-00"]}, ENCODER.count_pieces)
    with pytest.raises(UsageError, match=r"there are no questions to score"):
        score_reads(reader, [], TEXTS, ENCODER.count_pieces)
