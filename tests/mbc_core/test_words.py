from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import ModelError
from mbc_core.lexicon import Lexicon
from mbc_core.words import choose_words, split_words

BYTES = Lexicon([])  # a code is a byte, a word costs its letters and one space


def scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("“Hello,” she said.", ["Hello", "she", "said"]),
        ("It cost $5.5 million (+3%).", ["It", "cost", "$5.5", "million", "+3%"]),
        ("from -5 to -a", ["from", "-5", "to", "a"]),
        ("gone—and back--again…", ["gone", "and", "back", "again"]),
        ("Levi's U.S. 24–10 well-known", ["Levi's", "U.S", "24–10", "well-known"]),
        ("#1 @name AT&T … *** —", ["#1", "@name", "AT&T"]),
        ("a\u00a0b\u200b", ["a", "b"]),
        ("", []),
    ],
)
def test_split_words(text, expected):
    assert [word.text for word in split_words(text)] == expected


@given(st.text(max_size=120))
def test_words_are_slices_in_order_without_spaces(text):
    words = split_words(text)
    assert all(word.text == text[word.start : word.end] and word.text for word in words)
    assert all(first.end <= second.start for first, second in itertools.pairwise(words))
    assert not any(char.isspace() for word in words for char in word.text)


@given(st.text(max_size=120))
def test_no_letter_or_digit_is_lost(text):
    def kept(part: str) -> list[str]:
        return [char for char in part if char.isalnum()]

    assert kept("".join(word.text for word in split_words(text))) == kept(text)


def test_best_words_first_in_text_order_each_once():
    words = ["the", "cat", "saw", "Cat", "dog"]
    chosen = choose_words(words, scores(0.1, 0.5, 0.2, 0.9, 0.8), 8, BYTES)
    assert BYTES.decode(chosen) == "Cat dog"
    assert chosen.dtype == np.uint16


def test_a_word_is_whole_or_absent_and_leaves_its_room_to_shorter_ones():
    words = ["elephants", "ox", "gnu"]
    assert BYTES.decode(choose_words(words, scores(0.9, 0.2, 0.5), 7, BYTES)) == "ox gnu"


def test_another_spelling_does_not_come_in_for_a_word_that_had_no_room():
    costs_more = Lexicon([("Ġ", "a"), ("Ġa", "b")])  # " ab" is one code, " AB" three
    assert len(choose_words(["AB", "ab"], scores(0.9, 0.1), 1, costs_more)) == 0


def test_ties_go_to_the_earlier_word():
    assert BYTES.decode(choose_words(["aa", "bb", "cc"], scores(0.5, 0.5, 0.5), 6, BYTES)) == "aa bb"


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget_no_codes(budget):
    assert choose_words(["a"], scores(1.0), budget, BYTES).tolist() == []


def test_a_short_text_is_kept_word_for_word():
    words = ["the", "cat", "and", "the", "dog"]
    assert BYTES.decode(choose_words(words, scores(0.1, 0.5, 0.2, 0.1, 0.8), 20, BYTES)) == "the cat and the dog"
    assert BYTES.decode(choose_words(words, scores(0.1, 0.5, 0.2, 0.1, 0.8), 19, BYTES)) == "the cat and dog"


def test_repetitions_wait_for_words_that_had_no_room():
    assert BYTES.decode(choose_words(["ox", "elephants", "ox"], scores(0.9, 0.8, 0.1), 9, BYTES)) == "ox"


def test_a_cheap_word_goes_before_a_dear_one_of_the_same_score():
    cheap = Lexicon([("Ġ", "a"), ("Ġa", "a")])  # " aa" is one code, " bb" three
    assert cheap.decode(choose_words(["bb", "aa"], scores(0.5, 0.5), 3, cheap)) == "aa"
    assert cheap.decode(choose_words(["bb", "aa"], scores(0.5, 0.2), 3, cheap)) == "bb", "1/3^0.6 is 0.52"


@given(
    st.lists(st.tuples(st.text("abAB1", min_size=1, max_size=4), st.integers(0, 5)), max_size=20), st.integers(0, 60)
)
def test_choice_against_a_plain_loop(scored, budget):
    words, costs = [word for word, _ in scored], [16 * (len(word) + 1) for word, _ in scored]
    worth = [
        np.float32(value) / np.float32(cost) ** np.float32(0.6) for (_, value), cost in zip(scored, costs, strict=True)
    ]
    order = sorted(range(len(words)), key=lambda place: (-worth[place], place))
    first = [
        place for place in order if words[place].lower() not in {words[o].lower() for o in order[: order.index(place)]}
    ]
    taken, room = set(), 16 * budget
    for place in first:
        if costs[place] <= room:
            taken.add(place)
            room -= costs[place]
    for place in order if len(taken) == len(first) else ():
        if place not in taken and costs[place] <= room:
            taken.add(place)
            room -= costs[place]
    found = choose_words(words, scores(*(value for _, value in scored)), budget, BYTES)
    assert len(BYTES.pack(found.tolist())) <= 2 * budget
    assert BYTES.decode(found) == " ".join(words[place] for place in sorted(taken))


@pytest.mark.parametrize("bad", [scores(1.0), scores(1.0, float("nan")), scores(1.0, 2.0).reshape(2, 1)])
def test_scores_must_fit_the_words(bad):
    with pytest.raises(ModelError, match="salience scores do not fit the words: '2 words, scores of shape"):
        choose_words(["a", "b"], bad, 4, BYTES)
