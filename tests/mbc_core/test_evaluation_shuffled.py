"""The shuffled bank never shows the right document, nor the recalled one in its own place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import UsageError
from mbc_core.evaluation.shuffled import shuffled_rows


@given(st.integers(3, 12), st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
def test_never_the_right_document_and_never_the_document_of_the_place(documents, passages, k, seed):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(documents), passages)
    rng.shuffle(owner)
    places = [rng.permutation(len(owner))[:k].tolist() for _ in range(6)]
    right = rng.integers(-1, documents, 6)
    shown = shuffled_rows(places, owner, right, seed)
    assert shown == shuffled_rows(places, owner, right, seed)
    for recalled, instead, answering in zip(places, shown, right.tolist(), strict=True):
        assert 1 <= len(instead) <= len(recalled)
        assert len(set(instead)) == len(instead)
        assert answering not in owner[instead]
        if len(instead) == len(recalled):
            assert all(owner[one] != owner[other] for one, other in zip(recalled, instead, strict=True))


def test_a_bank_with_room_shows_as_many_lines_as_were_recalled():
    owner = np.arange(40)
    shown = shuffled_rows([[0, 1, 2, 3, 4]] * 20, owner, np.full(20, 2), seed=1)
    assert [len(one) for one in shown] == [5] * 20
    assert len({tuple(one) for one in shown}) == 20, "each question has a draw of its own"
    assert shown != shuffled_rows([[0, 1, 2, 3, 4]] * 20, owner, np.full(20, 2), seed=2)
    assert len({row for one in shown for row in one}) > 25, "and draws from the whole bank"


def test_nothing_recalled_shows_nothing():
    assert shuffled_rows([[], [0]], np.arange(4), np.array([1, 1]), 0)[0] == []


def test_two_documents_cannot_be_shuffled():
    with pytest.raises(UsageError, match=r"too small to be shuffled: '2 documents'.*leave the read `shuffled` out"):
        shuffled_rows([[0]], np.array([0, 1]), np.array([1]), 0)
