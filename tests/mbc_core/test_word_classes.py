"""Exchange of entries between classes, against counting all pairs anew."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbc_core.training.word_classes import Pairs, _Exchange, set_apart, word_classes

TEXTS = st.lists(st.lists(st.integers(0, 7), max_size=8), min_size=1, max_size=8)


def likelihood(texts, classes, entries) -> float:
    """Bits that pairs of neighbours take less in the light of the class before, counted from scratch."""
    of = [*classes, -1]
    pairs = Counter((of[before], of[after]) for text in texts for before, after in zip([entries, *text], text))  # noqa: B905
    left, right = Counter(), Counter()
    for (before, after), count in pairs.items():
        left[before] += count
        right[after] += count
    total = sum(pairs.values())
    return sum(count * math.log2(count * total / left[one] / right[two]) for (one, two), count in pairs.items())


def test_pairs_typed_out():
    found = Pairs.of([[1, 1, 0], [], [1, 0]], 2)
    assert list(zip(found.before.tolist(), found.after.tolist(), found.count.tolist(), strict=True)) == [
        (1, 0, 2.0),
        (1, 1, 1.0),
        (2, 1, 2.0),
    ]


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_each_move_is_the_best_and_leaves_the_counts_of_a_recount(texts, classes):
    if not any(texts):
        return
    state = _Exchange(Pairs.of(texts, 8), np.array(classes), 3)
    for entry in range(8):
        options = [
            likelihood(texts, [*state.classes[:entry], to, *state.classes[entry + 1 : -1]], 8) for to in range(3)
        ]
        was = int(state.classes[entry])
        now = state.move(entry)
        assert state.classes[entry] == now
        assert options[now] == pytest.approx(max(options), abs=1e-6)
        assert now == was or options[now] > options[was], "it stays where no other class is better"
        assert state.gain() == pytest.approx(options[now], abs=1e-6)
        fresh = _Exchange(Pairs.of(texts, 8), state.classes[:-1], 3)
        assert (fresh.table == state.table).all()
        assert (fresh.left == state.left).all() and (fresh.right == state.right).all()


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(0, 7))
def test_gains_of_every_class_differ_as_the_likelihoods_do(texts, entry):
    if not any(texts):
        return
    classes = np.arange(8) % 3
    state = _Exchange(Pairs.of(texts, 8), classes, 3)
    following, preceding, itself = state._neighbours(entry)
    state._add(int(classes[entry]), -following, -preceding, -itself)
    gains = state._gains(following, preceding, itself)
    whole = [likelihood(texts, [*classes[:entry], to, *classes[entry + 1 :]], 8) for to in range(3)]
    assert (gains - gains[0]).tolist() == pytest.approx([one - whole[0] for one in whole], abs=1e-6)


def planted(seed: int = 0) -> list[list[int]]:
    """Even and odd entries take turns; who comes is chance."""
    draw = np.random.default_rng(seed)
    return [(2 * draw.integers(0, 6, size=20) + (np.arange(20) + draw.integers(2)) % 2).tolist() for _ in range(60)]


def test_two_planted_classes_are_found():
    said: list[str] = []
    found = word_classes(Pairs.of(planted(), 12), 2, passes=20, say=said.append).tolist()
    assert found[0::2] == [found[0]] * 6 and found[1::2] == [1 - found[0]] * 6
    assert said[0].startswith("pass 1: ") and "12 entries moved" in said[0]
    assert said[-1].startswith(f"pass {len(said)}: 0 of 12 entries moved; 0.9"), "a class before tells a bit"


def test_likelihood_never_falls():
    said: list[str] = []
    word_classes(Pairs.of(planted(3), 12), 4, passes=20, say=said.append)
    saved = [float(line.split("; ")[1].split()[0]) for line in said]
    assert saved == sorted(saved) and len(saved) > 1


def test_the_same_pairs_give_the_same_classes():
    one, two = (word_classes(Pairs.of(planted(1), 12), 3).tolist() for _ in range(2))
    assert one == two and set(one) == {0, 1, 2}


def test_every_class_keeps_an_entry_and_rare_entries_stay():
    texts = [[0, 1, 0, 1, 0, 1], [2]]
    found = word_classes(Pairs.of(texts, 6), 6).tolist()
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    began = word_classes(Pairs.of(texts, 6), 2, passes=0).tolist()
    assert began == [0, 1, 0, 1, 0, 1], "by how frequent they are, in turn"
    assert word_classes(Pairs.of(texts, 6), 2).tolist()[2:] == began[2:], "seen once or never"


def test_without_any_pair_all_stay():
    assert word_classes(Pairs.of([[], []], 4), 2).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("classes", [0, 1, 13])
def test_numbers_of_classes_that_cannot_be(classes):
    with pytest.raises(ValueError, match=f"{classes} classes for 12 entries; at least 2 classes"):
        word_classes(Pairs.of(planted(), 12), classes)


def test_entries_that_make_up_most_of_a_class_typed_out():
    classes = np.array([0, 0, 0, 0, 1, 1, 2])
    seen = np.array([600.0, 100.0, 300.0, 1.0, 50.0, 49.0, 900.0])
    # 600 of 1001, then 300 of 401, then 100 of 101; 50 of 99 is too little, and 900 is alone already.
    assert set_apart(classes, seen).tolist() == [3, 5, 4, 0, 1, 1, 2]
    assert set_apart(classes, seen, least=40.0).tolist() == [3, 5, 4, 0, 6, 1, 2]
    assert set_apart(classes, np.array([5e3, 5e3, 0, 0, 1, 1, 1])).tolist() == classes.tolist(), "half is not most"


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 4, 9, 30])), max_size=24))
def test_apart_is_what_a_plain_loop_takes_out(entries):
    entries = [(0, 0), (1, 0), (2, 0), (3, 0), *entries]
    found = set_apart(np.array([own for own, _ in entries]), np.array([float(n) for _, n in entries]), least=2.0)
    expected, taken = [own for own, _ in entries], []
    while True:
        most = [
            place
            for place, (own, n) in enumerate(entries)
            if n >= 2
            and expected[place] == own
            and expected.count(own) > 1
            and 2 * n > sum(other for at, (_, other) in enumerate(entries) if expected[at] == own)
        ]
        if not most:
            break
        taken.append(max(most, key=lambda place: (entries[place][1], -place)))
        expected[taken[-1]] = -1
    assert {place for place, own in enumerate(found.tolist()) if own > 3} == set(taken)
    assert sorted(found[taken].tolist()) == list(range(4, 4 + len(taken))), "each has a class of its own"
    assert all(found[place] == entries[place][0] for place in range(len(entries)) if place not in taken)
