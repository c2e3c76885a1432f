from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import ModelError
from mbc_core.lexicon import Lexicon
from mbc_core.words import BRIDGED, OPENING_SHARE, choose_places, choose_words, keeping_order, split_words, word_worth
from tests.mbc_core.class_lexicon import class_lexicon, follow_lexicon

BYTES = Lexicon([])  # a code is a byte, a word costs its letters and one space
# A word's bits depend on the kept word before it.
CLASSED = [*(class_lexicon(seed) for seed in range(3)), *(follow_lexicon(seed) for seed in range(3))]


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


def test_best_words_in_text_order_each_once():
    words = ["the", "cat", "saw", "Cat", "dog"]
    worth = scores(0.1, 0.5, 0.2, 0.9, 0.8)
    assert choose_places(words, worth, [4] * 5, 8, opening=0, bridged=0) == [3, 4]
    assert choose_words(words, worth, 8, BYTES).dtype == np.uint16


def test_first_words_and_best_words_take_turns_and_a_bridge_comes_with_the_best():
    words = ["An", "old", "man", "of", "the", "sea", "met", "Ernest", "Hemingway"]
    worth = scores(0, 0, 0, 0, 0, 5, 0, 8, 9)
    order, repetitions = keeping_order(words, worth, [10] * 9, opening=0.5, bridged=1)
    # An | Hemingway | old | Ernest | man | sea, and with it `met` to Ernest | of | then nothing but the rest
    assert [words[place] for place in order] == ["An", "Hemingway", "old", "Ernest", "man", "sea", "met", "of", "the"]
    assert repetitions == []
    alone, _ = keeping_order(words, worth, [10] * 9, opening=0, bridged=0)
    assert alone == [8, 7, 5, 0, 1, 2, 3, 4, 6]
    assert keeping_order(words, worth, [10] * 9, opening=1)[0] == list(range(9))


def test_turns_go_by_the_bits_spent_not_by_words():
    order, _ = keeping_order(["a", "b", "c", "rare"], scores(0, 0, 0, 1), [1, 1, 1, 30], bridged=0)
    assert order == [0, 3, 1, 2], "30 bits of a rare word are a long turn"


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
    costs = np.array(cheap.costs(["bb", "aa"]), dtype=np.int64)
    for score, first in ((0.5, 1), (0.2, 0)):  # 1/3^0.6 is 0.52
        worth = word_worth(scores(0.5, score), costs)
        assert choose_places(["bb", "aa"], worth, costs.tolist(), 48, opening=0)[0] == first


def plain_order(words, worth, costs):
    """The order of keeping, with every rule written out and nothing remembered but what is kept."""
    order, bits = [], {"first": 0, "best": 0}
    while True:
        known = {words[place].lower() for place in order}
        fresh = [place for place in range(len(words)) if place not in order and words[place].lower() not in known]
        if not fresh:
            left = [place for place in range(len(words)) if place not in order]
            return order, sorted(left, key=lambda place: (-worth[place], place))
        if bits["first"] * (1 - OPENING_SHARE) <= bits["best"] * OPENING_SHARE:
            come, whose = [next(place for place in range(len(words)) if place not in order)], "first"
        else:
            best = min(fresh, key=lambda place: (-worth[place], place))
            come, whose = [best], "best"
            for step in (-1, 1):
                for length in range(1, BRIDGED + 1):
                    gap = [best + step * one for one in range(1, length + 1)]
                    far = best + step * (length + 1)
                    if 0 <= far < len(words) and far in order and not {*gap} & {*order}:
                        come += gap
        order += come
        bits[whose] += sum(costs[place] for place in come)


@given(
    st.lists(st.tuples(st.text("abAB1", min_size=1, max_size=4), st.integers(0, 5)), max_size=20), st.integers(0, 60)
)
def test_choice_against_a_plain_loop(scored, budget):
    words, costs = [word for word, _ in scored], [16 * (len(word) + 1) for word, _ in scored]
    worth = [
        np.float32(value) / np.float32(cost) ** np.float32(0.6) for (_, value), cost in zip(scored, costs, strict=True)
    ]
    order, repetitions = plain_order(words, worth, costs)
    assert sorted(order + repetitions) == list(range(len(words)))
    taken, room = set(), 16 * budget
    for place in order:
        if costs[place] <= room:
            taken.add(place)
            room -= costs[place]
    for place in repetitions if len(taken) == len(order) else ():
        if costs[place] <= room:
            taken.add(place)
            room -= costs[place]
    found = choose_words(words, scores(*(value for _, value in scored)), budget, BYTES)
    assert len(BYTES.pack(found.tolist())) <= 2 * budget
    assert BYTES.decode(found) == " ".join(words[place] for place in sorted(taken))


SCORED = st.lists(st.tuples(st.text("abAB1", max_size=4), st.integers(0, 5)), max_size=14)


def bits_together(lexicon, words, places) -> int:
    """Bits of the words at ``places``, in text order, told code by code."""
    codes = [code for place in sorted(places) for code in lexicon.encode_words([words[place]])[0]]
    return sum(lexicon.code.after(before, one) for before, one in zip([None, *codes], codes, strict=False))


@given(SCORED, st.integers(-1, 20), st.sampled_from(CLASSED))
def test_choice_with_classes_against_packing_the_whole_choice_anew(scored, budget, lexicon):
    words = [word for word, _ in scored]
    given_scores = scores(*(value for _, value in scored))
    costs = np.array(lexicon.costs(words), dtype=np.int64)
    order, repetitions = keeping_order(words, word_worth(given_scores, costs), costs.tolist())
    taken, all_had_room = set(), True
    for place in order:
        if bits_together(lexicon, words, taken | {place}) <= 16 * budget:
            taken.add(place)
        elif words[place]:
            all_had_room = False
    for place in repetitions if all_had_room else ():
        if bits_together(lexicon, words, taken | {place}) <= 16 * budget:
            taken.add(place)
    found = choose_words(words, given_scores, budget, lexicon)
    stored = lexicon.pack(found.tolist())
    assert len(stored) <= 2 * max(budget, 0)
    assert lexicon.read(stored) == " ".join(words[place] for place in sorted(taken) if words[place])


def test_words_that_cost_less_together_leave_room_for_more():
    """The opposite of what the costs by and large say may be had."""
    lexicon = CLASSED[0]
    singles = sorted(lexicon.code.after(None, code) for code in range(len(lexicon)))
    pairs = [lexicon.code.after(0, code) for code in range(len(lexicon))]
    assert singles != sorted(pairs), "or this lexicon would test nothing"
    texts = [list(one) for one in itertools.product(["a", "b", "ab", "1"], repeat=3)]
    spent = {bits_together(lexicon, words, range(3)) - sum(lexicon.costs(words)) for words in texts}
    assert min(spent) < 0 < max(spent)


@pytest.mark.parametrize("lexicon", [BYTES, CLASSED[1], CLASSED[4]])
def test_empty_words_are_passed_over(lexicon):
    words = ["", "ab", "", "b", ""]
    assert lexicon.decode(choose_words(words, scores(5, 1, 4, 2, 3), 40, lexicon)) == "ab b"
    assert choose_words(["", ""], scores(1, 2), 4, lexicon).tolist() == []


@pytest.mark.parametrize("bad", [scores(1.0), scores(1.0, float("nan")), scores(1.0, 2.0).reshape(2, 1)])
def test_scores_must_fit_the_words(bad):
    with pytest.raises(ModelError, match="salience scores do not fit the words: '2 words, scores of shape"):
        choose_words(["a", "b"], bad, 4, BYTES)
