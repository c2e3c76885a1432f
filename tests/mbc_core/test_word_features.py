"""Word features, typed out."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.encoder import word_features as module
from mbc_core.encoder.word_features import SIZES, word_features
from mbc_core.words import split_words


def features(text: str) -> list[list[int]]:
    return word_features(text, split_words(text)).tolist()


def test_a_sentence_typed_out():
    found = features("The NATO base (built 1999) is old. The base")
    assert found == [
        [3, 1, 1, 2, 2, 3, 1],  # The: capitalised, no marks, first in its sentence, first of two, 3 letters
        [4, 1, 1, 3, 1, 4, 2],  # NATO: capitals, second
        [1, 1, 6, 4, 2, 4, 3],  # base: a bracket after it, first of two
        [1, 6, 1, 4, 1, 5, 4],  # built: a bracket before it
        [5, 1, 6, 5, 1, 4, 5],  # 1999: digits
        [1, 6, 1, 5, 1, 2, 6],  # is
        [1, 1, 3, 5, 1, 3, 7],  # old: a full stop after it
        [3, 3, 1, 2, 5, 3, 8],  # The: again, first in its sentence
        [1, 1, 1, 3, 5, 4, 9],  # base: again
        [0] * 7,
    ]


@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("house", 1),
        ("iPhone", 2),
        ("McDonald", 2),
        ("House", 3),
        ("I", 3),
        ("USA", 4),
        ("1,999", 5),
        ("3rd", 6),
        ("A4", 7),
        ("&", 8),
    ],
)
def test_shapes(word, shape):
    assert features(word)[0][0] == shape


@given(st.text(max_size=200))
def test_every_category_is_in_range(text):
    found = word_features(text, split_words(text))
    assert found.dtype == np.uint8 and found.shape == (len(split_words(text)) + 1, len(SIZES))
    assert (found < np.array(SIZES)).all() and (found[:-1] > 0).all() and (found[-1] == 0).all()


def test_the_example_in_the_docstring():
    found = doctest.testmod(module, extraglobs={"split_words": split_words})
    assert found.attempted and not found.failed
