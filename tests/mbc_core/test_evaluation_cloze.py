"""Cloze questions: the blank hides a salient span that its sentence shows nowhere else, the same every time."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.evaluation.cloze import BLANK, PROMPT, make_cloze
from mbc_core.words import split_words

TEXT = (
    "The Battle of Agincourt was an English victory in the Hundred Years' War. It took place on 25 October 1415 near "
    "Azincourt, in northern France. The unexpected English victory against the numerically superior French army "
    "boosted English morale and prestige."
)


def cloze(text: str, seed: int | str = 0, salient: tuple[str, ...] = ()):
    words = [one.text for one in split_words(text)]
    scores = np.array([float(word in salient) + 0.01 * word[0].isupper() for word in words], dtype=np.float32)
    return make_cloze(text, words, scores, seed)


def test_a_date_is_taken_whole():
    assert cloze(TEXT, salient=("1415",)) is not None
    found = {cloze(TEXT, seed, ("25", "October", "1415")) for seed in range(40)}
    dates = {one for one in found if one and one[1] == "25 October 1415"}
    assert dates == {(f"{PROMPT}It took place on {BLANK} near Azincourt, in northern France.", "25 October 1415")}


def test_punctuation_around_the_answer_stays_in_the_question():
    found = {
        cloze("We met in the old city of (Prague), capital of the republic, long ago.", seed, ("Prague",))
        for seed in range(20)
    }
    assert (f"{PROMPT}We met in the old city of ({BLANK}), capital of the republic, long ago.", "Prague") in found


def test_the_same_arguments_give_the_same_question_and_another_seed_another():
    assert cloze(TEXT, 3) == cloze(TEXT, 3)
    assert len({cloze(TEXT, seed) for seed in range(30)}) > 3


def test_a_word_that_its_sentence_repeats_is_not_asked_for():
    text = "In Oslo the people of Oslo call their own city by the name Oslo every day."
    assert cloze(text, salient=("Oslo",)) is None or cloze(text, salient=("Oslo",))[1] != "Oslo"


def test_too_short_too_long_and_nothing_salient_give_none():
    assert cloze("Paris is nice.") is None
    assert cloze("Paris " + "very " * 60 + "nice.") is None
    assert cloze("it is as it was and so it will be for us") is None
    assert cloze("") is None


def test_the_first_word_of_a_sentence_is_no_answer_unless_it_is_a_number():
    found = {cloze("Agincourt is remembered by the English people to this very day.", seed) for seed in range(20)}
    assert all(one is None or one[1] != "Agincourt" for one in found)


def normal(text: str) -> str:
    return " ".join(text.split())


@given(
    st.lists(st.sampled_from([*TEXT.split(), "U.S.", "(1999),", "naïve", '"Oh!"', "\n", "3.5"]), max_size=60).map(
        " ".join
    ),
    st.integers(0, 5),
)
def test_filled_in_it_is_a_sentence_of_the_text_and_the_answer_stands_nowhere_else_in_it(text, seed):
    found = cloze(text, seed)
    if found is None:
        return
    question, answer = found
    assert question.startswith(PROMPT) and question.count(BLANK) == 1 and answer.strip() == answer != ""
    body = question.removeprefix(PROMPT)
    assert normal(body.replace(BLANK, answer)) in normal(text)
    assert not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", body.replace(BLANK, " "), re.IGNORECASE)
    assert len(answer.split()) <= 5
