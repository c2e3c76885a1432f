"""Followers are the pairs that are frequent and save bits: a plain loop, held-out texts, and texts without any."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.follow_code import FollowCode
from mbc_core.training.word_classes import Pairs
from mbc_core.training.word_followers import FollowerRule, _weighed, follow_code

SYMBOLS, CLASSES = 520, 130
OF = np.arange(SYMBOLS) % CLASSES


def texts(count: int, seed: int) -> list[list[int]]:
    """Symbols at random, but behind each of the first forty mostly comes the one that is three times as far."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        text = draw.integers(0, SYMBOLS, size=30)
        for place in range(1, 30):
            before = int(text[place - 1])
            if before < 40 and draw.random() < 0.7:
                text[place] = 3 * before + 1
        made.append(text.tolist())
    return made


def test_pairs_that_belong_together_are_found():
    code = follow_code(texts(800, 0), [], OF)
    assert isinstance(code, FollowCode)
    lists = code.followers
    found = set(zip(np.repeat(lists.leaders, lists.sizes).tolist(), lists.symbols.tolist(), strict=True))
    assert {(one, 3 * one + 1) for one in range(40)} <= found
    planted = [at for at, one in enumerate(lists.leaders.tolist()) if one < 40]
    assert (lists.levels[planted] == 2).all(), "seven in ten is the highest level"
    assert code.after(5, 16) < ClassCode.from_sequences(texts(800, 0), OF.tolist(), unseen=1.0).after(5, 16)


def test_new_texts_take_fewer_bits():
    train, fresh = texts(800, 0), texts(200, 1)
    alone = ClassCode.from_sequences(train, OF.tolist(), unseen=1.0, sharing=100.0)
    code = follow_code(train, train, OF)
    assert sum(sequence_bits(code, one) for one in fresh) < sum(sequence_bits(alone, one) for one in fresh)
    assert all(code.unpack(code.pack(one)) == one for one in fresh)


def test_every_follower_is_frequent_enough():
    kept, whole = texts(200, 2), texts(200, 3)
    rule = FollowerRule(least=2.5, discount=0.5)
    code = follow_code(kept, whole, OF, weight=0.5, rule=rule)
    seen: Counter[tuple[int, int]] = Counter()
    for weight, sequences in ((0.5, kept), (rule.whole, whole)):
        for one in sequences:
            for pair in pairwise(one):
                seen[pair] += weight
    lists = code.followers
    pairs = zip(np.repeat(lists.leaders, lists.sizes).tolist(), lists.symbols.tolist(), strict=True)
    assert all(seen[pair] >= 2.5 for pair in pairs)
    weighed = _weighed(Pairs.of(kept, SYMBOLS), Pairs.of(whole, SYMBOLS), 0.5, rule.whole)
    counted = zip(weighed.before.tolist(), weighed.after.tolist(), weighed.count.tolist(), strict=True)
    assert {(before, after): count for before, after, count in counted} == pytest.approx(dict(seen))


def test_texts_whose_pairs_are_chance_get_the_class_code():
    code = follow_code(texts(20, 4), [], OF, rule=FollowerRule(least=50.0))
    assert type(code) is ClassCode
    assert type(follow_code([[0], [1], []], [], OF)) is ClassCode, "no pairs at all"


def test_the_same_texts_give_the_same_code():
    assert follow_code(texts(100, 5), [], OF).fields() == follow_code(texts(100, 5), [], OF).fields()
