"""Classes of word codes for :class:`~mbc_core.class_code.ClassCode`, found from text by exchange.

Every entry is moved to the class where it raises the likelihood of the class bigram model most, over and over
(Kneser and Ney, 1993; Martin, Liermann and Ney, 1998). The counts of class pairs are kept up to date, so trying all
classes for one entry looks at the pairs that it takes part in and at nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """How often entries follow one another.

    Attributes:
        before, after: int64 [p], two entries that occur together; ``before`` may be ``entries``, the beginning.
        count: float64 [p], whole numbers > 0.
        entries: how many entries there are.
    """

    before: Int64
    after: Int64
    count: Float64
    entries: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | NDArray[np.integer]], entries: int) -> Pairs:
        """Pairs of neighbours in ``sequences``, the beginning of each counted as an entry of its own."""
        begin = entries
        parts = [np.concatenate([[begin], np.asarray(one, dtype=np.int64)]) for one in sequences]
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        pair, count = np.unique(flat[:-1] * (entries + 1) + flat[1:], return_counts=True)
        before, after = np.divmod(pair, entries + 1)
        real = after != begin
        return cls(before[real], after[real], count[real].astype(np.float64), entries)


def word_classes(
    pairs: Pairs, classes: int, *, passes: int = 5, least: int = 2, say: Callable[[str], None] = lambda line: None
) -> Int64:
    """A class for every entry.

    Args:
        pairs: what follows what.
        classes: how many, ≥ 2.
        passes: how often all entries are tried; it ends sooner when none moves.
        least: entries that occur less often stay where they began: with one sight of a word, its class is chance.

    Returns:
        int64 [entries], 0 to classes-1; every class has an entry if there are as many entries.

    Raises:
        ValueError: there are fewer than two classes, or fewer entries than classes.
    """
    if not 2 <= classes <= pairs.entries:
        raise ValueError(f"{classes} classes for {pairs.entries} entries; at least 2 classes, and an entry for each")
    seen = np.bincount(pairs.after, weights=pairs.count, minlength=pairs.entries)
    order = np.argsort(-seen, kind="stable")
    found = np.empty(pairs.entries, dtype=np.int64)
    found[order] = np.arange(pairs.entries) % classes  # the most frequent ones begin apart
    state = _Exchange(pairs, found, classes)
    members = np.bincount(found, minlength=classes)
    tried = [int(entry) for entry in order if seen[entry] >= least]
    for turn in range(passes):
        moved = 0
        for entry in tried:
            was = int(state.classes[entry])
            if members[was] > 1 and (now := state.move(entry)) != was:
                members[was] -= 1
                members[now] += 1
                moved += 1
        saved = state.gain() / max(seen.sum(), 1.0)
        say(f"pass {turn + 1}: {moved:,} of {len(tried):,} entries moved; {saved:.3f} bits a code saved")
        if not moved:
            break
    return state.classes[:-1]


def set_apart(classes: Int64, seen: Float64, *, least: float = 100.0) -> Int64:
    """Give each entry that makes up more than half of its class a class of its own, the most frequent ones first.

    Among its class a Huffman code gives it a bit, though it is worth less; alone it takes none.

    Args:
        classes: int64 [entries], 0 to C-1.
        seen: float64 [entries], how often each occurs.
        least: entries that occur less often stay: a class takes a row and a column of codes.

    Returns:
        int64 [entries], 0 to C'-1 with C' ≥ C; an entry keeps its class or gets one from C on.
    """
    found = classes.copy()
    total = np.bincount(classes, weights=seen)
    members = np.bincount(classes)
    count = len(total)
    for entry in np.argsort(-seen, kind="stable").tolist():
        if seen[entry] < least:
            break
        own = classes[entry]
        if members[own] > 1 and 2 * seen[entry] > total[own]:
            found[entry] = count
            count += 1
            members[own] -= 1
            total[own] -= seen[entry]
    return found


class _Exchange:
    """Counts of class pairs, kept up to date while entries move.

    With N(c, d) the pairs of classes, the log likelihood of the pairs is
    Σ f(N(c, d)) - Σ f(N(c, ·)) - Σ f(N(·, d)) and a constant, f(x) = x log2 x.
    """

    def __init__(self, pairs: Pairs, classes: Int64, count: int) -> None:
        self.classes = np.append(classes, count)  # the beginning is a class of its own, which nothing is moved to
        self._pairs, self._classes = pairs, count
        self._xlogx = _xlogx(int(pairs.count.sum()) + 1)
        self._after = _grouped(pairs.before, pairs.after, pairs.count, pairs.entries + 1)
        self._before = _grouped(pairs.after, pairs.before, pairs.count, pairs.entries + 1)
        self.table = np.zeros((count + 1, count + 1))
        np.add.at(self.table, (self.classes[pairs.before], self.classes[pairs.after]), pairs.count)
        self.left, self.right = self.table.sum(axis=1), self.table.sum(axis=0)

    def gain(self) -> float:
        """Bits that all pairs together take less than by the classes' own frequencies."""
        f = self._f
        total = self.table.sum()
        return float(f(self.table).sum() - f(self.left).sum() - f(self.right).sum() + f(np.array([total]))[0])

    def move(self, entry: int) -> int:
        """Put ``entry`` where the likelihood is highest; it stays when no other class is better. Returns its class."""
        was = int(self.classes[entry])
        following, preceding, itself = self._neighbours(entry)
        self._add(was, -following, -preceding, -itself)
        gains = self._gains(following, preceding, itself)
        best = int(gains.argmax())
        now = best if gains[best] > gains[was] + 1e-9 else was
        self._add(now, following, preceding, itself)
        self.classes[entry] = now
        return now

    def _neighbours(self, entry: int) -> tuple[Float64, Float64, float]:
        """Classes that follow and precede ``entry``, float64 [classes + 1] each, and how often it follows itself."""
        (after, behind), (before, ahead) = self._after(entry), self._before(entry)
        other, another = after != entry, before != entry
        size = self._classes + 1
        following = np.bincount(self.classes[after[other]], weights=behind[other], minlength=size)
        preceding = np.bincount(self.classes[before[another]], weights=ahead[another], minlength=size)
        return following.astype(np.float64), preceding.astype(np.float64), float(behind[~other].sum())

    def _add(self, at: int, following: Float64, preceding: Float64, itself: float) -> None:
        self.table[at] += following
        self.table[:, at] += preceding
        self.table[at, at] += itself
        self.left[at] += following.sum() + itself
        self.right[at] += preceding.sum() + itself

    def _gains(self, following: Float64, preceding: Float64, itself: float) -> Float64:
        """Log likelihood that an entry with these neighbours adds to each class: float64 [classes]."""
        f, table = self._f, self.table
        after, before = np.flatnonzero(following), np.flatnonzero(preceding)
        rows, columns = table[:, after], table[before]
        gains = (f(rows + following[after]) - f(rows)).sum(axis=1)
        gains += (f(columns + preceding[before, None]) - f(columns)).sum(axis=0)
        own = np.diagonal(table)  # the cell of a class with itself got both above: say it anew
        gains += f(own + following + preceding + itself) + f(own) - f(own + following) - f(own + preceding)
        gains -= f(self.left + following.sum() + itself) - f(self.left)
        gains -= f(self.right + preceding.sum() + itself) - f(self.right)
        usable: Float64 = gains[: self._classes]
        return usable

    def _f(self, counts: Float64) -> Float64:
        values: Float64 = self._xlogx[counts.astype(np.int64)]
        return values


def _xlogx(most: int) -> Float64:
    """x log2 x of 0 … most; a look-up is several times faster than the logarithm."""
    values = np.arange(most + 1, dtype=np.float64)
    values[1:] *= np.log2(values[1:])
    return values


def _grouped(keys: Int64, values: Int64, weights: Float64, size: int) -> Callable[[int], tuple[Int64, Float64]]:
    order = np.argsort(keys, kind="stable")
    starts = np.searchsorted(keys[order], np.arange(size + 1))
    values, weights = values[order], weights[order]
    return lambda key: (values[starts[key] : starts[key + 1]], weights[starts[key] : starts[key + 1]])
