"""The rivals' stores: the same bytes, whole characters, whole words, every word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.evaluation.stores import (
    cut_bytes,
    first_codes,
    first_words_store,
    text_codes,
    text_codes_store,
    text_store,
    truncated_store,
)
from mbc_core.lexicon import Lexicon
from mbc_core.words import split_words
from tests.mbc_core.tiny_reader import lexicon

TEXT = "The town of Köln — 1,234 people,\n said 'Ann' — lies on the Rhine.  The Rhine!"


@given(st.text(max_size=60), st.integers(0, 80))
def test_a_cut_text_is_the_longest_start_within_the_bytes(text, size):
    whole = text.encode("utf-8", "surrogatepass")
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # half a character cannot be stored at all
    cut = cut_bytes(text, size)
    assert text.startswith(cut) and len(cut.encode()) <= size
    if len(cut) < len(text):
        assert len(cut.encode()) + len(text[len(cut)].encode()) > size, "the next character does not fit"
    else:
        assert len(whole) <= size


def test_truncated_text_takes_the_same_bytes_as_the_words_do():
    plain = "The town of Cologne lies\non the  Rhine and sells scent."
    texts = [plain, "ü" * 30, "short", None]
    sizes = [48, 31, 48, 24]
    store = truncated_store(texts, sizes)
    kept = [len(store.line(row).encode()) for row in range(3)]
    assert kept == [48, 30, 5], "48 of many; 31 would halve an ü; a short text is there whole"
    assert store.line(0) == "The town of Cologne lies on the Rhine and sells "
    assert store.bytes_per_passage == pytest.approx(sum(kept) / 3)


def test_text_as_codes_holds_every_word_in_order():
    codes = text_codes(TEXT, lexicon())
    words = [word.text for word in split_words(TEXT)]
    assert lexicon().decode(codes) == " ".join(words)
    assert words.count("Rhine") == 2, "repetitions stay"
    store = text_codes_store([TEXT, None, "One word"], lexicon())
    assert store.line(0) == " ".join(words) and store.line(2) == "One word"
    other = text_codes("One word", lexicon())
    assert store.bytes_per_passage == pytest.approx(2 * (len(codes) + len(other)) / 2)


@pytest.mark.parametrize("most", [0, 1, 4, 5, 9, 10, 1000])
def test_first_words_are_whole_and_fit(most):
    plain = Lexicon([])  # a word costs its letters and the space before it
    words = ["The", "town", "of", "Köln"]
    costs = [4, 5, 3, 6]
    expected: list[str] = []
    for word, cost in zip(words, costs, strict=True):
        if sum(costs[: len(expected)]) + cost > most:
            break
        expected.append(word)
    assert plain.decode(first_codes("The town, of Köln!", 2 * most, plain)) == " ".join(expected)


def test_first_words_take_at_most_the_bytes_of_the_salient_ones():
    store = first_words_store([TEXT, None], [20, 20], lexicon())
    assert store.bytes_per_passage <= 20
    assert " ".join(word.text for word in split_words(TEXT)).startswith(store.line(0))
    assert store.line(0) == "The town of Köln", "19 codes of 8 or 9 bits: the next word has no room"


def test_text_is_one_line():
    store = text_store([TEXT, None], 123.0)
    assert store.line(0) == " ".join(TEXT.split()) and "\n" not in store.line(0)
    assert store.bytes_per_passage == 123.0
