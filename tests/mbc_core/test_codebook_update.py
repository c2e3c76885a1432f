"""The update of the codebook, in numbers typed out by hand; and what a reset writes, seen by stepping again.

The typed-out case: a 4×5 codebook with N = 4 and codewords on the first four axes; eight vectors; τ = 8 / ln 2, so
that λ = exp(−8/τ) = 1/2 and w = (1 − λ) τ / 8 = 1 / ln 4 = 0.72134752….
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from codebook_data import four_by_five, topical_embeddings

from mbc_core.codebook.files import Codebook
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import UpdateRule, perplexity, update
from mbc_core.codes import quantize
from mbc_core.errors import UsageError

W1, W2, W3 = "2024-07-01T00:00:00Z", "2024-07-02T00:00:00Z", "2024-07-03T00:00:00Z"
HALVING = 8 / math.log(2)
VECTORS = [[2, 0, 0, 0, 1]] * 4 + [[0, 1, 0, 0, 0]] * 3 + [[0, 0, 4, 0, 0]]
CODES = [0, 0, 0, 0, 1, 1, 1, 2]


def statistics(book: Codebook, vectors=VECTORS, codes=CODES, documents=None) -> BatchStatistics:
    """One slot vector a document, unless ``documents`` says otherwise."""
    keys = np.arange(len(vectors)) if documents is None else np.array(documents)
    return BatchStatistics.of(
        book,
        np.array(vectors, dtype=np.float32)[:, None, :],
        np.array(codes, dtype=np.uint16)[:, None],
        keys.astype(np.int64),
        np.arange(len(vectors), dtype=np.int32),
    )


def test_one_step_typed_out():
    head = four_by_five()
    result = update(head, statistics(head), UpdateRule(judged=False, tau=HALVING), [W1])
    book = result.codebook
    assert book.count == pytest.approx([4.8853900817779268, 4.1640425613334451, 2.7213475204444817, 2.0], rel=1e-11)
    assert book.sum[0] == pytest.approx([7.7707801635558536, 0, 0, 0, 2.8853900817779268], rel=1e-11)
    assert book.sum[1] == pytest.approx([0, 4.1640425613334451, 0, 0, 0], rel=1e-11)
    assert book.codewords[0] == pytest.approx([1.5906161091496412, 0, 0, 0, 0.5906161091496412], rel=1e-7)
    assert book.codewords[1].tolist() == [0, 1, 0, 0, 0]
    assert book.codewords[2] == pytest.approx([0, 0, 1.7952099263603014, 0, 0], rel=1e-7)
    assert book.codewords[3].tolist() == [0, 0, 0, 1, 0], "an unused code decays, but its word stays"
    assert (book.version, book.parent, book.built_from, book.last_window) == (1, 0, (W1,), W1)
    assert book.vectors_seen == 8
    assert (result.vectors, result.used, result.resets, result.starved) == (8, 3, 0, 0)
    # Usage 4, 3, 1 of 8: the entropy is ½ ln 2 + ⅜ ln 8/3 + ⅛ ln 8 = 0.97431475… and the perplexity its exp.
    assert result.perplexity == pytest.approx(2.649351128562104)
    # ‖z − E‖² = 4·(1 + 1) + 0 + 9 = 17; ‖z‖² = 4·5 + 3 + 16 = 39.
    assert result.error == pytest.approx(17 / 39)


def test_the_head_is_not_touched():
    head = four_by_five()
    before = head.to_bytes()
    update(head, statistics(head), RESETTING, [W1])
    assert head.to_bytes() == before


RESETTING = UpdateRule(judged=False, tau=HALVING, dead_share=0.7)
"""Code 3 ends at N = 2.0, below 0.7 times the mean of 3.44: dead."""


def test_reset_writes_word_count_and_sum_together_typed_out():
    """The worst-served vector is (0,0,4,0,0); its nearest of other documents are three (0,1,0,0,0), one (2,0,0,0,1)."""
    head = four_by_five()
    result = update(head, statistics(head), RESETTING, [W1])
    book = result.codebook
    assert (result.resets, result.starved) == (1, 0)
    assert book.reset_at.tolist() == [0, 0, 0, 1]
    assert book.codewords[3] == pytest.approx([0.4, 0.6, 0.8, 0, 0.2], rel=1e-7)
    assert book.count[3] == pytest.approx(3.4426950408889634, rel=1e-11), "the mean count before the reset"
    sums = [1.3770780163555854, 2.0656170245333780, 2.7541560327111707, 0, 0.6885390081777927]
    assert book.sum[3] == pytest.approx(sums, rel=1e-7)
    assert book.count[0] == pytest.approx(4.8853900817779268, rel=1e-11), "living codes are as without a reset"


def test_stepping_again_after_a_reset_goes_on_from_what_it_wrote():
    """Eight vectors (0,0,0,2,0), all quantized to the reset code: its old mean must be the reset's, not the dead's."""
    first = update(four_by_five(), statistics(four_by_five()), RESETTING, [W1]).codebook
    step = statistics(first, [[0, 0, 0, 2, 0]] * 8, [3] * 8)
    again = update(first, step, UpdateRule(judged=False, tau=HALVING), [W2]).codebook
    assert again.count[3] == pytest.approx(7.4921276840003353, rel=1e-11)
    sums = [0.6885390081777927, 1.0328085122666890, 1.3770780163555854, 11.541560327111707, 0.3442695040888963]
    assert again.sum[3] == pytest.approx(sums, rel=1e-7)
    words = [0.0919016649500233, 0.1378524974250349, 0.1838033299000466, 1.5404916752498836, 0.0459508324750116]
    assert again.codewords[3] == pytest.approx(words, rel=1e-6)
    assert again.count[:3] == pytest.approx(first.count[:3] / 2, rel=1e-12)
    assert again.codewords[:3] == pytest.approx(first.codewords[:3], rel=1e-7)
    assert again.reset_at.tolist() == [0, 0, 0, 1], "a later update does not forget who was reset when"


def test_statistics_older_than_a_reset_do_not_pull_the_reset_code():
    """They counted vectors near the dead word, which no longer exists; the other codes take them as usual."""
    head = four_by_five()
    late = statistics(head, [[0, 0, 0, 9, 0]] * 4 + [[2, 0, 0, 0, 1]] * 4, [3] * 4 + [0] * 4)
    first = update(head, statistics(head), RESETTING, [W1]).codebook
    second = update(first, late, UpdateRule(judged=False, tau=HALVING), [W2]).codebook
    assert second.codewords[3] == pytest.approx([0.4, 0.6, 0.8, 0, 0.2], rel=1e-7)
    assert second.count[3] == pytest.approx(first.count[3] / 2, rel=1e-12)
    assert second.count[0] == pytest.approx(first.count[0] / 2 + 4 / math.log(4), rel=1e-11)


def test_a_reset_word_is_never_one_documents_vector():
    """All candidates come from four documents: no five to average, so the dead code keeps its word and says so."""
    head = four_by_five()
    result = update(head, statistics(head, documents=[0, 0, 1, 1, 2, 2, 3, 3]), RESETTING, [W1])
    assert (result.resets, result.starved) == (0, 1)
    assert result.codebook.codewords[3].tolist() == [0, 0, 0, 1, 0]
    assert result.codebook.reset_at.tolist() == [0, 0, 0, 0]


def test_one_document_gives_at_most_one_vector_to_a_reset_word():
    """Document 7 has many vectors near the worst one; the mean still takes one each of five documents."""
    far = [[0, 0, 4, 0, 0]] * 9
    head = four_by_five()
    gathered = statistics(head, far + VECTORS[:4], [2] * 9 + [0] * 4, documents=[7] * 9 + [1, 2, 3, 4])
    book = update(head, gathered, RESETTING, [W1]).codebook
    assert 1 in book.reset_at
    word = book.codewords[int(book.reset_at.argmax())]
    assert word == pytest.approx([8 / 5, 0, 4 / 5, 0, 4 / 5], rel=1e-7)


def test_two_dead_codes_get_different_words():
    vectors = [[3, 0, 0, 0, 0]] * 6 + [[-3, 0, 0, 0, 0]] * 6 + [[0, 1, 0, 0, 0]] * 40
    head = four_by_five((400.0, 400.0, 1.0, 1.0))
    result = update(head, statistics(head, vectors, [0] * 12 + [1] * 40), UpdateRule(judged=False, tau=1e4), [W1])
    assert result.resets == 2
    # The worst-served pole is drawn first; the other word goes to what is then served worst.
    assert {tuple(word) for word in result.codebook.codewords[[2, 3]].tolist()} == {(-3, 0, 0, 0, 0), (3, 0, 0, 0, 0)}


def test_unreachable_codes_come_alive_and_stay_alive():
    """16 codes of which 8 start out of reach, 50 steps: a reset that the next step overwrites would leave 8 in use."""
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((16, 6)) * 3
    start = np.concatenate([centres[:8], np.full((8, 6), 500.0)]).astype(np.float32)
    book, rule = Codebook.first(start, np.full(16, 100.0)), UpdateRule(judged=False, tau=800, dead_share=0.1)
    for step in range(50):
        rows = (centres[draw.integers(16, size=256)] + 0.3 * draw.standard_normal((256, 6))).astype(np.float32)
        codes = quantize(rows[:, None], book.codewords)
        passages = np.arange(256, dtype=np.int32)
        gathered = BatchStatistics.of(book, rows[:, None], codes, passages.astype(np.int64) + 256 * step, passages)
        book = update(book, gathered, rule, [W1]).codebook
    assert len(np.unique(codes)) == 16
    assert np.linalg.norm(book.codewords, axis=1).max() < 20, "no word is left out of reach"
    assert book.sum / book.count[:, None] == pytest.approx(book.codewords, rel=1e-5, abs=1e-6)
    assert book.count.sum() == pytest.approx(800, rel=0.1), "the total count rests at τ"


def test_cutting_the_same_stream_into_other_windows_changes_nothing_to_speak_of():
    head = four_by_five((25.0, 25.0, 25.0, 25.0))
    rule = UpdateRule(judged=False, tau=100.0, dead_share=0.0)
    once = update(head, statistics(head, VECTORS * 6, CODES * 6), rule, [W1, W2, W3]).codebook
    book = head
    for window in (W1, W2, W3):
        step = statistics(book, VECTORS * 2, CODES * 2)
        book = update(book, step, rule, [window]).codebook
    assert book.count == pytest.approx(once.count, rel=1e-9)
    assert book.codewords == pytest.approx(once.codewords, rel=1e-6, abs=1e-9)
    assert once.count.sum() == pytest.approx(100.0, rel=1e-9)


def test_a_code_that_decayed_to_nothing_keeps_its_word_and_stays_finite():
    head = four_by_five()
    book = update(head, statistics(head), UpdateRule(judged=False, tau=0.01, dead_share=0.0), [W1]).codebook
    assert book.codewords[3].tolist() == [0, 0, 0, 1, 0]
    assert book.count[3] > 0
    assert np.isfinite(book.codewords).all()


def test_equal_statistics_give_equal_bytes():
    vectors = topical_embeddings(300, 5, seed=4) * np.array([1, 1, -0.01, 1, 1])  # nothing near code 2
    head = four_by_five((2000.0, 2000.0, 1.0, 2000.0))
    codes = quantize(vectors[:, None].astype(np.float32), head.codewords).ravel().tolist()
    one = update(head, statistics(head, vectors, codes), UpdateRule(), [W2, W1, W2])
    two = update(head, statistics(head, vectors, codes), UpdateRule(), [W1, W2])
    assert one.resets == 1
    assert one.codebook.to_bytes() == two.codebook.to_bytes()
    assert one.codebook.built_from == (W1, W2)


def test_last_window_never_goes_back():
    first = update(four_by_five(), statistics(four_by_five()), UpdateRule(), [W3]).codebook
    assert update(first, statistics(first), UpdateRule(), [W1]).codebook.last_window == W3


def test_perplexity_is_between_one_and_the_number_of_codes():
    assert perplexity(np.array([7, 7, 7, 7])) == pytest.approx(4)
    assert perplexity(np.array([0, 9, 0, 0])) == pytest.approx(1)
    assert perplexity(np.array([0, 0])) == 0


def test_wrong_use_is_refused():
    head = four_by_five()
    with pytest.raises(UsageError, match="cannot be updated from nothing: '0 vectors, 1 windows'"):
        update(head, BatchStatistics.zero(4, 5, 0), UpdateRule(), [W1])
    with pytest.raises(UsageError, match="cannot be updated from nothing: '8 vectors, 0 windows'"):
        update(head, statistics(head), UpdateRule(), [])
    with pytest.raises(UsageError, match=r"update rule is impossible: \{'tau': 0.0, 'reset_pool': 4\}"):
        UpdateRule(tau=0.0, reset_pool=4)


def test_the_publication_threshold_grows_with_the_bank():
    rule = UpdateRule(min_vectors=100, growth=0.1)
    assert rule.vectors_needed(four_by_five()) == 100
    grown = update(four_by_five(), statistics(four_by_five(), VECTORS * 500, CODES * 500), rule, [W1]).codebook
    assert grown.vectors_seen == 4000
    assert rule.vectors_needed(grown) == 400


def test_a_candidate_serves_one_reset_only():
    """Seven documents are enough for one word of five; the second dead code must wait."""
    vectors = [[3, 0, 0, 0, 0]] * 3 + [[-3, 0, 0, 0, 0]] * 4
    head = four_by_five((400.0, 400.0, 1.0, 1.0))
    result = update(head, statistics(head, vectors, [0] * 7), UpdateRule(judged=False, tau=1e4), [W1])
    assert (result.resets, result.starved) == (1, 1)


def test_a_dead_word_does_not_count_as_serving_anyone():
    """Code 3 lies on the worst-served vector, but it is dead and about to be replaced: the vector still leads."""
    words = np.eye(4, 5, dtype=np.float32)
    words[3] = 0, 0, 4, 0, 0
    head = Codebook.first(words, np.full(4, 4.0))
    book = update(head, statistics(head), RESETTING, [W1]).codebook
    assert book.reset_at.tolist() == [0, 0, 0, 1]
    assert book.codewords[3] == pytest.approx([0.4, 0.6, 0.8, 0, 0.2], rel=1e-7)
