"""Followers are the pairs that are frequent and save bits: a plain loop, held-out texts, and texts without any."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.follow_code import FollowCode
from mbc_core.prefix_code import PrefixCode
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


def mixed_texts(count: int, seed: int) -> list[list[int]]:
    """Symbols at random; behind each of the first sixty come up to five others, more or less often."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        text = draw.integers(0, SYMBOLS // 2, size=30)
        for place in range(1, 30):
            before = int(text[place - 1])
            if before < 60 and draw.random() < before % 7 / 8:
                text[place] = (5 * before + min(int(draw.geometric(0.5)), 5)) % 60
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


def plain_lists(kept, whole, rule, weight):
    """By the rule, in plain loops: weights of listed pairs, a level a leader, and how much lists of (level, class) are
    used."""
    seen = [Counter(pair for one in texts for pair in pairwise(one)) for texts in (kept, whole)]
    count = {pair: weight * seen[0][pair] + rule.whole * seen[1][pair] for pair in sorted(seen[0] | seen[1])}
    plain = ClassCode.from_sequences(kept, OF.tolist(), unseen=rule.unseen, sharing=rule.sharing)
    cost = {(a, b): int(plain.transitions[OF[a], OF[b]] + plain.members[b]) for a, b in count}
    total, mass = Counter(), {pair: number - rule.discount for pair, number in count.items() if number >= rule.least}
    for (leader, _), number in count.items():
        total[leader] += number
    chosen = set(mass)
    for turn in range(rule.rounds + 1):
        listed, used, every = Counter(), Counter(), Counter()
        for pair in sorted(chosen):
            listed[pair[0]] += mass[pair]
        level = {one: sum(share < listed[one] / (total[one] + 1) for share in rule.levels) for one in total}
        for one in listed:
            for group in ((level[one], int(OF[one])), level[one]):
                used[group] += listed[one]
                every[group] += total[one] + 1
        use = {
            (at, own): (used[at, own] + rule.steady * used[at] / (every[at] or 1)) / (every[at, own] + rule.steady)
            for at in range(len(rule.levels) + 1)
            for own in range(CLASSES)
        }
        use = {group: min(max(share, 1e-6), 0.97) for group, share in use.items()}
        if turn < rule.rounds:
            share = {one: use[level[one], int(OF[one])] for one in total}
            chosen = {
                pair
                for pair in mass
                if cost[pair]
                + math.log2(share[pair[0]] / (1 - share[pair[0]]))
                - math.log2((listed[pair[0]] or 1e-9) / mass[pair])
                > rule.gain
            }
    return {pair: mass[pair] for pair in sorted(chosen)}, {one: level[one] for one in listed}, use


@pytest.mark.parametrize(
    "rule", [FollowerRule(), FollowerRule(least=2.5, discount=1.5, gain=0.5, levels=(0.3,), sharing=30.0, rounds=2)]
)
def test_lists_are_those_of_the_plain_loop(rule):
    kept, whole = mixed_texts(300, 6), mixed_texts(150, 7)
    code, (mass, level, use) = follow_code(kept, whole, OF, weight=0.5, rule=rule), plain_lists(kept, whole, rule, 0.5)
    lists, start = code.followers, 0
    found = list(zip(np.repeat(lists.leaders, lists.sizes).tolist(), lists.symbols.tolist(), strict=True))
    assert found == list(mass) and len(found) > 60 and len(set(level.values())) == len(rule.levels) + 1
    assert dict(zip(lists.leaders.tolist(), lists.levels.tolist(), strict=True)) == level
    for size in lists.sizes.tolist():
        weights = [mass[pair] for pair in found[start : start + size]]
        shortest = PrefixCode.from_counts(weights, short=True).bits if size > 1 else [0]
        spent = sum(a * b for a, b in zip(weights, lists.bits[start : start + size].tolist(), strict=True))
        assert spent == pytest.approx(sum(a * b for a, b in zip(weights, shortest, strict=True)))
        start += size
    require_rows(code, kept, set(mass), use, rule)


def require_rows(code, kept, listed, use, rule):
    """Check that rows behind leaders are as short as the pairs on no list, and the lists' use, allow."""
    rows, own = np.zeros((CLASSES, CLASSES)), np.bincount(OF, minlength=CLASSES) * rule.unseen
    for one in kept:
        for before, after in zip([None, *one], one, strict=False):
            if (before, after) not in listed:
                own[OF[after]] += 1
                if before is not None:
                    rows[OF[before], OF[after]] += 1
    rows += rule.sharing * own / own.sum()
    for (level, of), share in use.items():
        weights = [*((1 - share) * rows[of] / rows[of].sum()), share]
        spent = float(code.listed[level * CLASSES + of] @ weights)
        assert spent == pytest.approx(float(PrefixCode.from_counts(weights).lengths @ weights))
