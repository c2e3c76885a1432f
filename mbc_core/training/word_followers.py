"""Which followers each word code gets, for :class:`~mbc_core.follow_code.FollowCode`: pairs that save bits as such.

A pair of neighbours goes on a list when it was seen often enough to be no chance, and when it takes some bits less
there than by its class. What it takes there depends on how much the lists are used, so this is found in a few rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbc_core.class_code import ClassCode, row_counts
from mbc_core.follow_code import FollowCode, Followers
from mbc_core.prefix_code import PrefixCode
from mbc_core.training.word_classes import Pairs

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class FollowerRule:
    """What makes a follower; tuned on held-out passages.

    Attributes:
        whole: weight of a pair that stands in a text, beside one that a passage keeps (1).
        least: weight from which on a pair may be on a list: kept in one passage is too little.
        discount: weight taken off every pair on a list; a new text's pairs are others.
        gain: bits that a pair must save there.
        levels: shares of what stands behind a leader that is on its list: up to the first, to the second, above it.
        unseen: count given to every symbol beside what was seen.
        sharing: counts that each row of classes gets from the classes' own frequencies.
        steady: counts that the use of lists behind a class gets from its use at that level.
        rounds: how often the lists are found anew.
    """

    whole: float = 0.3
    least: float = 1.5
    discount: float = 0.7
    gain: float = 2.0
    levels: tuple[float, ...] = (0.2, 0.4)
    unseen: float = 1.0
    sharing: float = 100.0
    steady: float = 20.0
    rounds: int = 4


def follow_code(
    kept: Sequence[Sequence[int] | NDArray[np.integer]],
    whole: Sequence[Sequence[int] | NDArray[np.integer]],
    classes: Int64,
    *,
    weight: float = 1.0,
    rule: FollowerRule | None = None,
) -> ClassCode:
    """A code that suits the sequences ``kept``.

    Args:
        kept: symbols of each passage as they are stored.
        whole: symbols of each text, kept or not: they tell some more about what follows what.
        classes: int64 [n], class of every symbol.
        weight: of a pair in ``kept``; less than 1 where a passage is there at several budgets.

    Returns:
        a :class:`FollowCode`; a plain :class:`ClassCode` if no pair is worth a list.

    Raises:
        ValueError: a code would need more than 32 bits, or fewer than 8 (too few classes).
    """
    rule, size = rule or FollowerRule(), len(classes)
    stored = Pairs.of(kept, size)
    plain = _class_code(stored, np.ones(len(stored.count), dtype=bool), classes, rule)
    lists = _Lists(_weighed(stored, Pairs.of(whole, size), weight, rule.whole), classes, plain, rule)
    if not lists.chosen.any():
        return plain
    rest = ~np.isin(_keys(stored), _keys(lists.pairs)[lists.chosen])
    code = _class_code(stored, rest, classes, rule)
    rows = row_counts(
        stored.before[rest], stored.after[rest], stored.count[rest], classes, unseen=rule.unseen, sharing=rule.sharing
    )[:-1]
    share = lists.use.reshape(-1, len(rows), 1)  # [levels, classes, 1]
    listed = np.concatenate([(1 - share) * rows / rows.sum(axis=1, keepdims=True), share], axis=2)
    lengths = [PrefixCode.from_counts(row).lengths.tolist() for row in listed.reshape(-1, len(rows) + 1)]
    return FollowCode(
        classes.tolist(),
        code.transitions.tolist(),
        code.members.tolist(),
        code.usual.tolist(),
        lengths,
        lists.followers(),
    )


class _Lists:
    """Which pairs are on lists, and how much the lists are used.

    Attributes:
        pairs: without the beginning, ordered by leader, then follower.
        chosen: bool [p], the pairs that are on a list.
        use: float64 [L·C], share of what stands behind leaders of a level and class that is on their lists.
        level: int64 [n], of every symbol; it means something for leaders alone.
    """

    def __init__(self, pairs: Pairs, classes: Int64, plain: ClassCode, rule: FollowerRule) -> None:
        self.pairs, self._classes, self._rule = pairs, classes, rule
        self._levels, self._count = len(rule.levels) + 1, int(classes.max()) + 1
        before, after = pairs.before, pairs.after
        self._total = np.bincount(before, weights=pairs.count, minlength=pairs.entries)
        self._mass: Float64 = np.maximum(pairs.count - rule.discount, 1e-9)
        cost = plain.transitions[classes[before], classes[after]] + plain.members[after]
        enough = pairs.count >= rule.least
        self.chosen = enough
        for _ in range(rule.rounds):
            listed = self._look()
            use = self.use[self.level * self._count + classes][before]
            inner = np.log2(np.maximum(listed[before], 1e-9) / self._mass)
            self.chosen = enough & (cost - np.log2(1 - use) + np.log2(use) - inner > rule.gain)
        self._look()

    def _look(self) -> Float64:
        """Count how much the lists are used; float64 [n], weight of the followers on each symbol's list."""
        size, groups = self.pairs.entries, self._levels * self._count
        weight = np.where(self.chosen, self._mass, 0.0)
        listed = np.bincount(self.pairs.before, weights=weight, minlength=size).astype(np.float64)
        leads = listed > 0
        self.level = np.searchsorted(self._rule.levels, listed / (self._total + 1))
        group = self.level * self._count + self._classes
        used = np.bincount(group[leads], weights=listed[leads], minlength=groups).reshape(self._levels, -1)
        all_of = np.bincount(group[leads], weights=self._total[leads] + 1, minlength=groups).reshape(self._levels, -1)
        usual = used.sum(axis=1, keepdims=True) / np.maximum(all_of.sum(axis=1, keepdims=True), 1e-9)
        steady = self._rule.steady
        self.use = np.clip((used + steady * usual) / (all_of + steady), 1e-6, 0.97).ravel()
        return listed

    def followers(self) -> Followers:
        """The lists with their codes."""
        after, mass = self.pairs.after[self.chosen], self._mass[self.chosen]
        leaders, starts, sizes = np.unique(self.pairs.before[self.chosen], return_index=True, return_counts=True)
        bits = np.zeros(len(after), dtype=np.int64)
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            if size > 1:
                bits[start : start + size] = PrefixCode.from_counts(mass[start : start + size], short=True).lengths
        return Followers(leaders, self.level[leaders].astype(np.int64), sizes.astype(np.int64), after, bits)


def _class_code(pairs: Pairs, used: NDArray[np.bool_], classes: Int64, rule: FollowerRule) -> ClassCode:
    """The class code of the pairs ``used``."""
    return ClassCode.from_pairs(
        pairs.before[used],
        pairs.after[used],
        pairs.count[used],
        classes.tolist(),
        unseen=rule.unseen,
        sharing=rule.sharing,
    )


def _keys(pairs: Pairs) -> Int64:
    return pairs.before * (pairs.entries + 1) + pairs.after


def _weighed(kept: Pairs, whole: Pairs, weight: float, text: float) -> Pairs:
    """Pairs of both, weighed and added up, without those at the beginning."""
    keys, place = np.unique(np.concatenate([_keys(kept), _keys(whole)]), return_inverse=True)
    weights = np.concatenate([weight * kept.count, text * whole.count])
    count = np.bincount(place, weights=weights, minlength=len(keys)).astype(np.float64)
    before, after = np.divmod(keys, kept.entries + 1)
    real = before < kept.entries
    return Pairs(before[real], after[real], count[real], kept.entries)
