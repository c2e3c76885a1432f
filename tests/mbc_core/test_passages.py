from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.passages import split_passages

TEXTS = st.text(st.sampled_from("ab .!?\n\t。”)'A1\u00a0é"), max_size=200)


def words(part: str) -> int:
    return len(part.split())


def letters(part: str) -> int:
    return sum(not char.isspace() for char in part)


@given(TEXTS, st.integers(1, 12), st.sampled_from([words, letters]))
def test_nothing_is_dropped_and_every_passage_fits(text, limit, count):
    passages = split_passages(text, count, limit)
    assert "".join(passages) == (text if text.strip() else "")
    assert all(count(passage) <= limit for passage in passages)


@given(TEXTS, st.integers(2, 12))
def test_pieces_that_do_not_add_up_still_fit(text, limit):
    """A tokenizer may find more pieces in a whole than in its parts."""

    def count(part: str) -> int:
        return words(part) + len(part) // 7

    assert all(count(passage) <= limit or len(passage) == 1 for passage in split_passages(text, count, limit))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.integers(8, 20))
def test_no_fewer_passages_than_greedy_packing_needs_and_no_crumbs(sizes, limit):
    text = " ".join("Word " * (size - 1) + "End." for size in sizes)
    passages = split_passages(text, words, limit)
    greedy, room = 1, limit
    for size in sizes:
        greedy, room = (greedy, room - size) if size <= room else (greedy + 1, limit - size)
    assert len(passages) == greedy
    longest = max(words(passage) for passage in passages)
    assert longest <= limit


def test_a_text_that_fits_is_one_passage():
    assert split_passages(" One. Two. ", words, 4) == [" One. Two. "]


def test_a_blank_text_has_none():
    assert split_passages(" \n\t ", words, 4) == []


def test_lengths_are_evened_out():
    text = "A b c. D e f. G h i. J k l."
    assert [words(passage) for passage in split_passages(text, words, 9)] == [6, 6]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("He met Dr. Gray at noon. She left.", "He met Dr. Gray at noon. "),
        ("The U.S. Army came in force. It left.", "The U.S. Army came in force. "),
        ("It was J. R. R. Tolkien who wrote. He died.", "It was J. R. R. Tolkien who wrote. "),
        ("He said “Go now at once.” She left.", "He said “Go now at once.” "),
        ("It rose approx. five percent overall. It fell.", "It rose approx. five percent overall. "),
        ("No end here… but it goes on. It stops.", "No end here… but it goes on. "),
        ("Line one two three\nline four five", "Line one two three\n"),
    ],
)
def test_cuts_fall_at_sentence_ends(text, first):
    assert split_passages(text, words, words(first))[0] == first


def test_cjk_sentences_end_without_a_space():
    assert split_passages("一二三。四五六。", letters, 4) == ["一二三。", "四五六。"]


def test_a_long_sentence_is_cut_at_spaces():
    assert split_passages("one two three four five", words, 2) == ["one two ", "three four ", "five"]


def test_a_giant_word_is_cut_between_characters():
    passages = split_passages("Start. " + "x" * 40 + " end.", letters, 10)
    assert [passage.strip() for passage in passages] == ["Start.", *["x" * 10] * 4, "end."]


def test_passages_of_a_giant_word_are_nearly_full():
    passages = split_passages("y" * 1000, letters, 40)
    assert len(passages) == 25
    assert "".join(passages) == "y" * 1000


def test_a_text_too_long_to_count_whole_is_cut_all_the_same():
    text = "One two three. " * 4_000  # 60,000 characters
    passages = split_passages(text, words, 100_000)
    assert passages == [text]
