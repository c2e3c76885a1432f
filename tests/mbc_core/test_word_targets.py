from __future__ import annotations

import numpy as np

from mbc_core.lexicon import Lexicon
from mbc_core.training.data import TrainingPassage
from mbc_core.training.word_targets import share_kept_whole, word_targets
from mbc_core.words import split_words


def targets(text: str, *questions: tuple[str, str]):
    passage = TrainingPassage("p", "s", text, tuple((question, (answer,)) for question, answer in questions), "train")
    words = split_words(text)
    found = word_targets(passage, words)
    answer = [word.text for word, target in zip(words, found.targets, strict=True) if target[0]]
    question = [word.text for word, target in zip(words, found.targets, strict=True) if target[1]]
    return answer, question, found.answers


def test_answer_words_and_words_shared_with_the_question():
    text = 'In 1858 the "Virgin Mary" appeared to Saint Bernadette, at Lourdes.'
    answer, question, places = targets(text, ("To whom did the Virgin appear in Lourdes, 1858?", "saint bernadette"))
    assert answer == ["Saint", "Bernadette"]
    assert question == ["1858", "Virgin", "Lourdes"]
    assert places == (((7, 8),),)


def test_every_occurrence_at_word_boundaries_counts():
    answer, _, places = targets("Rome, not Romeo, is old. ROME!", ("Which city?", "Rome"))
    assert answer == ["Rome", "ROME"]
    assert places == (((0,), (5,)),)


def test_a_word_that_holds_the_answer_counts_whole():
    answer, _, _ = targets("Tesla's rival had $5 at Levi's Stadium.", ("Who?", "Tesla"), ("How much?", "5"))
    assert answer == ["Tesla's", "$5"]


def test_an_answer_across_a_line_break():
    answer, _, _ = targets("He went to New\n York.", ("Where?", "New York"))
    assert answer == ["New", "York"]


def test_an_answer_that_stands_nowhere_marks_its_content_words_but_is_not_measured():
    answer, _, places = targets("The president of France spoke.", ("Who spoke?", "the President's wife of Spain"))
    assert answer == ["president"]
    assert places == ()


def test_an_answer_of_punctuation_marks_nothing():
    assert targets("One (two).", ("What?", "(")) == ([], [], ())


def test_possessives_are_the_same_word_to_a_question():
    _, question, _ = targets("Obama’s plan was Ann's.", ("What did Obama plan with Ann’s help?", "no"))
    assert question == ["Obama’s", "plan", "Ann's"]


def test_a_passage_without_questions_or_words():
    assert targets("...") == ([], [], ())


def test_share_kept_whole_by_budget():
    lexicon = Lexicon([])  # a word costs its letters and a space
    texts = [["aa", "bb", "AA"], ["cc", "dd"], ["ee"]]
    scores = [np.array(values, np.float32) for values in ([0.1, 0.9, 0.8], [0.2, 0.7], [0.5])]
    answers = [
        [[[0]], [[0, 1]]],  # "aa" also as "AA"; "aa bb"
        [[[0], [1]]],  # either occurrence
        [],
    ]
    found = share_kept_whole(texts, scores, answers, lexicon, (2, 3, 6))
    assert found == {2: 0.0, 3: 1 / 3, 6: 1.0}


def test_no_answers_no_share():
    assert share_kept_whole([["a"]], [np.ones(1, np.float32)], [[]], Lexicon([]), (5,)) == {5: 0.0}
