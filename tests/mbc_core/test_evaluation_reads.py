"""Every way of reading puts the right lines before the question; answers are scored against the right references."""

from __future__ import annotations

import numpy as np
import pytest

from mbc_core.errors import UsageError
from mbc_core.evaluation import reads as reads_module
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.reads import Read, ReadSet, evaluate_reads
from mbc_core.recall import exhaustive_scores
from mbc_core.words import choose_words
from tests.mbc_core.tiny_reader import SLOTS, BagOfWords, documents, language_model, lexicon, pieces

pytestmark = pytest.mark.usefixtures("single_thread")

DOCS = documents(12)
ENCODER = BagOfWords()
ROTATION, CODEBOOK = pieces()


@pytest.fixture(scope="module")
def questions() -> ReadSet:
    encoded = ENCODER.encode([one.text for one in DOCS])
    return ReadSet(
        [one.text for one in DOCS],
        [one.words for one in encoded],
        [one.scores for one in encoded],
        [one.question for one in DOCS],
        [[one.answer, "another"] for one in DOCS],
        np.arange(len(DOCS)),
        ENCODER.encode_questions([one.question for one in DOCS]),
    )


@pytest.fixture(scope="module")
def search() -> AddressIndex:
    vectors = ENCODER.encode_questions([one.text for one in DOCS])
    return AddressIndex(vectors, ROTATION, CODEBOOK.codewords, SLOTS)


@pytest.fixture
def seen(monkeypatch):
    """Prompts as text; every question is answered with the first line of its memory."""
    prompts: list[str] = []

    def answer(language_model, form, ids, **options):
        made = [language_model.tokenizer.decode(one) for one in ids]
        prompts.extend(made)
        return [one.splitlines()[0] for one in made]

    monkeypatch.setattr(reads_module, "answer_prompts", answer)
    return prompts


def run(questions, search, *chosen: Read, **options):
    return evaluate_reads(language_model(), questions, chosen, search=search, lexicon=lexicon(), **options)


def test_the_index_finds_what_the_plain_float_computation_finds(questions, search):
    found = search.nearest(questions.question_embeddings, 4)
    codes = search._codes.numpy().astype(np.uint16)
    scores = exhaustive_scores(questions.question_embeddings, ROTATION, codes, CODEBOOK.codewords)
    assert (found == np.argsort(-scores, axis=1)[:, :4]).all()
    told, rows = search.nearest_scored(questions.question_embeddings, 4)
    assert np.array_equal(rows, found) and told == pytest.approx(np.take_along_axis(scores, rows, 1), abs=1e-5)
    assert search.nearest_scored(questions.question_embeddings[:0], 4)[0].shape == (0, 4)
    assert search.nearest(questions.question_embeddings[:0], 4).shape == (0, 4)
    assert search.nearest(questions.question_embeddings, 99).shape == (12, 12)


def words_line(questions, row: int, budget: int) -> str:
    codes = choose_words(questions.words[row], questions.scores[row], budget, lexicon())
    return lexicon().decode(codes.tolist())


def test_recall_shows_the_words_of_the_passages_found_best_first(questions, search, seen):
    (row,) = run(questions, search, Read("recall", 3, 40))
    found = search.nearest(questions.question_embeddings, 3)
    for number, prompt in enumerate(seen):
        lines = [f" {words_line(questions, one, 40)}" for one in found[number].tolist()]
        assert prompt == "\n".join([*lines, f"Question: {DOCS[number].question}", "Answer:"])
    assert (row["read"], row["profile"], row["k"], row["questions"]) == ("recall", "40 words", 3, 12)
    shown = np.unique(found)
    chosen = [choose_words(questions.words[one], questions.scores[one], 40, lexicon()) for one in shown]
    packed = [len(lexicon().pack(codes.tolist())) for codes in chosen]
    assert row["bytes_per_passage"] == pytest.approx(27 + np.mean(packed))
    assert row["prompt_tokens"] == pytest.approx(np.mean([len(one.encode()) for one in seen]))


def test_closed_book_shows_nothing_and_costs_nothing(questions, search, seen):
    (row,) = run(questions, search, Read("closed", 0, None))
    assert seen == [f"Question: {one.question}\nAnswer:" for one in DOCS]
    assert row["bytes_per_passage"] == 0 and row["profile"] == "-"


def test_text_and_right_passage(questions, search, seen):
    text, right, right_text = run(
        questions, search, Read("text", 2, None), Read("right", 1, 24), Read("right_text", 1, None)
    )
    best = search.nearest(questions.question_embeddings, 2)
    assert seen[0].splitlines()[:2] == [f" {DOCS[row].text}" for row in best[0].tolist()]
    assert [one.splitlines()[0] for one in seen[12:24]] == [f" {words_line(questions, row, 24)}" for row in range(12)]
    assert [one.splitlines()[0] for one in seen[24:]] == [f" {one.text}" for one in DOCS]
    assert text["bytes_per_passage"] == pytest.approx(np.mean([len(one.text.encode()) for one in DOCS]))
    assert [text["profile"], right["profile"], right_text["profile"]] == ["text", "default", "text"]


def test_the_shuffled_read_shows_what_was_found_for_another_question(questions, search, seen):
    run(questions, search, Read("recall", 1, 24), Read("shuffled", 1, 24))
    own, other = [one.splitlines()[0] for one in seen[:12]], [one.splitlines()[0] for one in seen[12:]]
    assert sorted(own) == sorted(other)
    assert sum(left != right for left, right in zip(own, other, strict=True)) >= 11


def test_scores_are_against_each_questions_own_answers(questions, search, seen):
    asked = ReadSet(
        questions.texts, questions.words, questions.scores, questions.questions,
        [["nothing", words_line(questions, row, 24) if row < 3 else "else"] for row in range(12)],
        questions.rows, questions.question_embeddings,
    )  # fmt: skip
    (row,) = run(asked, search, Read("right", 1, 24))
    assert row["em"] == pytest.approx(100 * 3 / 12)


def test_a_seeded_sample_keeps_every_passage(questions):
    some = questions.sample(5, seed=1)
    assert len(some.questions) == 5 and len(some.texts) == 12
    assert some.questions == questions.sample(5, seed=1).questions
    assert some.questions != questions.sample(5, seed=2).questions
    for number, row in enumerate(some.rows.tolist()):
        assert some.questions[number] == DOCS[row].question
        assert (some.question_embeddings[number] == questions.question_embeddings[row]).all()
    assert questions.sample(None, 0) is questions is questions.sample(12, 0)


def test_the_question_survives_a_limit_that_leaves_no_room_for_memory(questions, search, seen):
    run(questions, search, Read("recall", 5, 40), max_tokens=60)
    assert all(one.endswith("?\nAnswer:") and one.startswith("Question:") for one in seen)


def test_no_questions_is_an_error(questions, search):
    with pytest.raises(UsageError, match=r"there are no questions to read for"):
        run(questions.sample(0, 0), search, Read("closed", 0, None))


def test_the_real_loop_runs_on_a_tiny_model(questions, search):
    told: list[str] = []
    chosen = (Read("closed", 0, None), Read("recall", 2, 12))
    rows = run(questions.sample(3, 0), search, *chosen, progress=told.append)
    again = run(questions.sample(3, 0), search, *chosen)
    assert [{**one, "milliseconds": 0} for one in rows] == [{**one, "milliseconds": 0} for one in again]
    assert len(told) == 2 and all(one["milliseconds"] > 0 for one in rows)
