"""The judged update: recall decides how far a codebook moves, and the passages that judge are not learned from."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from codebook_data import codebook_of, four_by_five, topical_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from mbc_core.codebook.files import Codebook, read_tensors, write_tensors
from mbc_core.codebook.judge import FEWEST_PROBES, STEPS, choose_step, log_probabilities, moved
from mbc_core.codebook.samples import PROBES, RESET_SINCE, Probes
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import UpdateRule, update
from mbc_core.codes import LENGTH_WEIGHT, Rotation, quantize, to_slots
from mbc_core.errors import UsageError

SLOTS, WIDTH = 4, 32
ROTATION = Rotation.random(WIDTH, seed=1)
W1 = "2024-07-01T00:00:00Z"


def slots_of(count: int, *, topics: int = 12, seed: int = 0) -> np.ndarray:
    return to_slots(topical_embeddings(count, WIDTH, topics=topics, seed=seed), ROTATION, SLOTS)


def gathered(book: Codebook, vectors: np.ndarray, keys=None) -> BatchStatistics:
    keys = np.arange(len(vectors)) if keys is None else np.asarray(keys)
    codes = quantize(vectors, book.codewords)
    return BatchStatistics.of(book, vectors, codes, keys.astype(np.int64), np.zeros(len(vectors), np.int32))


def fitted(vectors: np.ndarray, words: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Lloyd's algorithm, in the plainest form."""
    words, flat = words.copy(), vectors.reshape(-1, vectors.shape[2])
    for _ in range(rounds):
        codes = quantize(vectors, words).ravel()
        for code in np.unique(codes):
            words[code] = flat[codes == code].mean(axis=0)
    return words


def error(vectors: np.ndarray, words: np.ndarray) -> float:
    return float(((vectors - words[quantize(vectors, words)]) ** 2).sum() / (vectors**2).sum())


# --------------------------------------------------------------------------------------------------------- the judge


def test_log_probabilities_are_those_of_a_plain_loop():
    probes, words = slots_of(40), slots_of(16, seed=3).reshape(-1, WIDTH // SLOTS)[:16].copy()
    stored = words[quantize(probes, words)].reshape(40, -1).astype(np.float64)
    flat = probes.reshape(40, -1).astype(np.float64)
    for place, found in enumerate(log_probabilities(probes, words)):
        expected = []
        for one, other in ((1, 2), (3, 7), (9, 17), (19, 30)):
            question = flat[place] + flat[(place + one) % 40] - flat[(place + other) % 40]
            logits = (stored @ question + LENGTH_WEIGHT * (1 - (stored**2).sum(axis=1))) / 0.05
            expected.append(logits[place] - math.log(sum(math.exp(one) for one in logits)))
        assert found == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_a_better_codebook_is_moved_to():
    train, probes = slots_of(600, topics=60), slots_of(900, topics=60)[600:]
    poor = np.repeat(train.reshape(-1, 8)[:8], 8, axis=0) + 1e-3 * np.arange(64, dtype=np.float32)[:, None]
    step = choose_step(poor, fitted(train, train.reshape(-1, 8)[::37][:64].copy()), probes)
    assert step.share in STEPS and step.gain > 0.5


def test_the_trap_lower_error_and_worse_recall_is_not_walked_into():
    """A stream of four topics, and the codebook with the lowest error for it: its words are what each topic's
    passages have in common. Then nothing tells them apart; only recall sees that."""
    draw = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return to_slots((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), ROTATION, SLOTS)

    centres = draw.standard_normal((4, WIDTH))
    probes = unit(centres[draw.integers(4, size=200)] + 0.8 * draw.standard_normal((200, WIDTH)))
    anything = unit(draw.standard_normal((800, WIDTH)))
    general = fitted(anything, anything.reshape(-1, 8)[::50][:64].copy(), rounds=3)
    narrow = np.resize(unit(centres).reshape(-1, 8), general.shape).copy()
    before, after = log_probabilities(probes, general).mean(), log_probabilities(probes, narrow).mean()
    assert error(probes, narrow) < error(probes, general)
    assert after < before - 1
    step = choose_step(general, narrow, probes)
    assert step.share < 1
    assert log_probabilities(probes, moved(general, narrow, step.share)).mean() >= before


def test_nothing_moves_when_nothing_can_be_told():
    probes, new = slots_of(FEWEST_PROBES - 1), slots_of(4, seed=9).reshape(-1, 8)
    assert choose_step(np.zeros_like(new), new, probes).share == 0
    full = slots_of(FEWEST_PROBES)
    assert choose_step(new, new, full) == choose_step(new, new.copy(), full)
    assert choose_step(new, new, full).share == 0


def test_a_whole_step_is_the_new_words_to_the_bit():
    old, new = np.float32([[0.1, 0.7]]), np.float32([[0.3, 0.1]])
    assert moved(old, new, 1.0) is new
    assert moved(old, new, 0.5) == pytest.approx(np.array([[0.2, 0.4]]), rel=1e-6)
    assert moved(old, new, 0.5).dtype == np.float32


# -------------------------------------------------------------------------------------------------------- the probes


DATA = slots_of(PROBES + 90)
BOOK = codebook_of(DATA, 16)
KEYS = np.random.default_rng(4).permutation(len(DATA)).astype(np.int64)


def part(rows) -> BatchStatistics:
    rows = np.asarray(rows, dtype=np.int64)
    return gathered(BOOK, DATA[rows], KEYS[rows])


@settings(max_examples=15)
@given(order=st.permutations(range(len(DATA))), cut=st.integers(1, len(DATA) - 1))
def test_the_sample_does_not_depend_on_chunks_or_order(order, cut):
    merged = part(order[:cut]) + part(order[cut:])
    assert len(merged.probes) == PROBES < len(DATA)
    assert merged.to_bytes() == part(range(len(DATA))).to_bytes()


def test_probes_can_be_taken_out_of_the_sums_to_the_last_bit():
    whole = part(range(len(DATA)))
    held = whole.probes.smallest(50)
    counts, sums = held.sums(BOOK.size)
    rest = part(np.flatnonzero(~np.isin(KEYS, held.keys)))
    assert (whole.counts - counts).tolist() == rest.counts.tolist()
    assert (whole.sums - sums).tolist() == rest.sums.tolist()
    assert held.hashes.tolist() == sorted(whole.probes.hashes.tolist())[:50]


def test_a_code_that_was_reset_is_taken_out_only_once():
    whole = part(range(len(DATA)))
    head = replace(BOOK, version=1, parent=0, reset_at=np.array([1, *[0] * 15], np.int32))
    carried = whole.carried_to(head)
    assert (carried.probes.codes == RESET_SINCE).sum() == (whole.probes.codes == 0).sum() > 0
    counts, sums = carried.probes.sums(BOOK.size)
    assert counts[0] == 0 and not sums[0].any()
    assert (carried.counts - counts >= 0).all()
    assert carried.carried_to(head).to_bytes() == carried.to_bytes()


def test_forgotten_documents_leave_the_probes():
    whole = part(range(20))
    left = whole.without_documents(KEYS[:7])
    assert sorted(left.probes.keys.tolist()) == sorted(KEYS[7:20].tolist())
    assert left.sampled_documents.tolist() == sorted(KEYS[7:20].tolist())
    assert part([0]).without_documents(KEYS[:1]).probes.codes.shape == Probes.none(PROBES, 8).codes.shape


def test_a_document_that_only_a_probe_is_kept_of_is_named_too():
    """4,096 candidates of 24 slots come from 171 passages or more, 256 probes from others: forgetting asks for both."""
    keys, passages = np.arange(60, dtype=np.int64), np.zeros(60, np.int32)
    codes = quantize(DATA[:60], BOOK.codewords)
    found = BatchStatistics.of(BOOK, DATA[:60], codes, keys, passages, sample_size=5)
    assert len(np.unique(found.candidates.keys)) <= 5
    assert found.sampled_documents.tolist() == keys.tolist()
    gone = found.without_documents(keys[:50])
    assert gone.sampled_documents.tolist() == keys[50:].tolist()


def test_statistics_of_the_first_release_have_no_probes_and_still_count():
    whole = part(range(30))
    tensors, metadata = read_tensors(whole.to_bytes(), "here", "mbc-statistics/1")
    old = write_tensors({name: one for name, one in tensors.items() if not name.startswith("probe")}, metadata)
    read = BatchStatistics.from_bytes(old, "here")
    assert len(read.probes) == 0 and read.counts.tolist() == whole.counts.tolist()
    assert len((read + part(range(30, 60))).probes) == 30


# -------------------------------------------------------------------------------------------------------- the update


def test_evidence_is_that_of_the_passages_that_do_not_judge():
    """N, m and the words by hand: λ and w of the 7/8 that are learned from, the head's mass capped by the anchor."""
    head = Codebook.first(BOOK.codewords, np.full(16, 1_000.0))
    statistics = reduce(lambda a, b: a + b, [part(range(0, 100)), part(range(100, len(DATA)))])
    statistics = replace(statistics, codebook_version=0)
    rule = UpdateRule(tau=5_000.0, anchor=4_000.0, dead_share=0.0, min_vectors=1)
    result = update(head, statistics, rule, [W1])
    held = statistics.probes.smallest(len(DATA) // 8)
    counts, sums = held.sums(16)
    learned = SLOTS * (len(DATA) - len(held))
    decay = math.exp(-learned / 5_000)
    weight = (1 - decay) * 5_000 / learned
    count = decay * 250 + weight * (statistics.counts - counts)
    total = decay * 0.25 * head.sum + weight * (statistics.sums - sums) / 2**28
    assert result.codebook.count == pytest.approx(count, rel=1e-9)
    assert result.codebook.sum == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert result.codebook.vectors_seen == result.vectors == SLOTS * len(DATA)
    means = (total / count[:, None]).astype(np.float32)
    step = choose_step(head.codewords, means, held.vectors)
    assert result.step == step and step.share in (0.0, *STEPS)
    assert result.codebook.codewords == pytest.approx(moved(head.codewords, means, step.share), rel=1e-6, abs=1e-7)


def test_a_refused_step_keeps_the_words_and_the_evidence():
    """Too few passages to judge: the words stay to the bit; what was seen is not lost and may move them later."""
    head = four_by_five((400.0,) * 4)
    vectors = np.tile(np.float32([2, 0, 0, 0, 1]), (80, 1, 1))
    result = update(head, gathered(head, vectors), UpdateRule(tau=1e3), [W1])
    assert (result.step.share, result.step.gain) == (0.0, 0.0)
    assert result.codebook.codewords.tobytes() == head.codewords.tobytes()
    assert result.codebook.sum[0, 4] > 0 and result.codebook.version == 1
    moves = update(head, gathered(head, vectors), UpdateRule(tau=1e3, judged=False), [W1])
    assert moves.step.share == 1.0 and moves.codebook.codewords[0, 4] > 0


def test_an_impossible_anchor_is_refused():
    with pytest.raises(UsageError, match=r"update rule is impossible: \{'anchor': 0.0\}"):
        UpdateRule(anchor=0.0)
