"""Re-ranking by word codes equals plain loops, and its weights are those of the lexicon."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.lexicon import Lexicon
from mbc_core.rerank import COMMON_BITS, WORD_WEIGHT, reranked, word_weights

LEXICON = Lexicon([])  # no merges: a word takes 16 bits a byte and for its space
ASKED = ["treaty", "Treaty", "WAR", "utrecht?", "of", "1713", "peace"]
KEPT = {0: "Treaty of Utrecht", 1: "treaty ended war", 2: "", 3: "Utrecht, 1713", 4: "(war)"}


def plain(scores, rows, questions, k):
    """The same with loops over words, one question at a time."""
    lines = []
    for line, places, question in zip(scores.tolist(), rows.tolist(), questions, strict=True):
        asked = dict.fromkeys(word.strip("?,()").casefold() for word in question.split())
        bits = {word: max(0, LEXICON.costs([word])[0] - COMMON_BITS) for word in asked if word}
        found = []
        for score, row in zip(line, places, strict=True):
            there = [word.strip("?,()").casefold() for word in KEPT[row].split()]
            gain = sum(cost for word, cost in bits.items() if word in there) / (sum(bits.values()) or 1)
            found.append((-(score + WORD_WEIGHT * gain), row))
        lines.append(sorted(found)[:k])
    return [[-score for score, _ in line] for line in lines], [[row for _, row in line] for line in lines]


@given(
    st.lists(
        st.lists(st.sampled_from(["treaty", "Treaty", "WAR", "utrecht?", "of", "1713", "peace"]), min_size=1),
        min_size=1,
    ),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_equals_plain_loops(asked, k, seed):
    draw = np.random.default_rng(seed)
    questions = [" ".join(words) for words in asked]
    rows = np.stack([draw.permutation(5) for _ in questions]).astype(np.int64)
    scores = np.sort(draw.random((len(questions), 5)).astype(np.float32), axis=1)[:, ::-1]
    found, where = reranked(scores, rows, questions, KEPT, LEXICON, k)
    expected_scores, expected_rows = plain(scores, rows, questions, k)
    assert (found.dtype, where.dtype) == (np.float32, np.int64)
    assert where.tolist() == expected_rows
    assert found == pytest.approx(np.array(expected_scores), abs=1e-6)


def test_the_passage_that_keeps_the_words_overtakes():
    scores, rows = np.array([[0.5, 0.45, 0.4]], dtype=np.float32), np.array([[2, 1, 0]])
    found, where = reranked(scores, rows, ["Which treaty was it?"], KEPT, LEXICON, 3)
    assert where.tolist() == [[1, 0, 2]]
    assert found[0, 2] == np.float32(0.5), "what keeps no word keeps its score"


def test_weights_by_hand():
    assert word_weights("ab abc Ab", LEXICON) == pytest.approx({"ab": 40 / 96, "abc": 56 / 96})
    assert word_weights("", LEXICON) == {}


def test_ties_go_to_the_smaller_row_and_nothing_is_searched_for_nothing():
    scores, rows = np.zeros((1, 3), dtype=np.float32), np.array([[4, 2, 3]])
    assert reranked(scores, rows, ["peace"], KEPT, LEXICON, 2)[1].tolist() == [[2, 3]]
    empty = reranked(np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int64), ["peace"], {}, LEXICON, 5)
    assert [part.shape for part in empty] == [(1, 0), (1, 0)]


def test_it_is_quick():
    kept = {row: " ".join(f"word{row}x{place}" for place in range(25)) for row in range(50)}
    rows = np.arange(50, dtype=np.int64)[None]
    began = time.process_time()
    for _ in range(20):
        reranked(np.zeros((1, 50), np.float32), rows, ["Which word3x4 was it in 1713?"], kept, LEXICON, 5)
    assert (time.process_time() - began) / 20 < 0.05
