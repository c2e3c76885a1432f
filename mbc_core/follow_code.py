"""A class code in which frequent symbols also have followers of their own: "United" is mostly followed by "States".

Classes say what kind of symbol comes next, not which one. So a symbol that is often followed by the same few has a list
of them. Where it stands, one more sign beside the classes says "one of its followers", and a short code says which.
Every other symbol is written by its class as before. What a symbol takes still depends on it and the one before alone,
so words are priced and counted exactly as with a :class:`~mbc_core.class_code.ClassCode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbc_core.class_code import ClassCode, Numbers
from mbc_core.prefix_code import BYTE, LONGEST, PrefixCode

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Followers:
    """The lists, one behind the other.

    Attributes:
        leaders: int64 [m], symbols that have a list, ascending.
        levels: int64 [m], how much each one's list is used, 0 to L-1: it chooses the row of class codes behind it.
        sizes: int64 [m], how many followers each has, ≥ 1.
        symbols: int64 [Σ sizes], the followers of each leader, ascending.
        bits: int64 [Σ sizes], bits of each follower's code in its list; 0 when it is alone there.
    """

    leaders: Int64
    levels: Int64
    sizes: Int64
    symbols: Int64
    bits: Int64

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Followers:
        """The lists of these :meth:`fields`.

        Raises:
            KeyError: one is missing.
            ValueError, TypeError: one holds something else than whole numbers.
        """
        leaders, sizes, symbols = (_whole_numbers(fields[name]) for name in ("leaders", "sizes", "followers"))
        return cls(leaders, read_lengths(fields["levels"]), sizes, symbols, read_lengths(fields["follower_bits"]))

    def fields(self) -> dict[str, object]:
        """What :meth:`of_fields` takes: lists of numbers, and lengths as :func:`lengths_text`."""
        return {
            "leaders": self.leaders.tolist(),
            "levels": lengths_text(self.levels),
            "sizes": self.sizes.tolist(),
            "followers": self.symbols.tolist(),
            "follower_bits": lengths_text(self.bits),
        }

    def check(self, symbols: int, levels: int) -> None:
        """Check that they are lists of 0 … ``symbols``-1, each with a complete code.

        Raises:
            ValueError: they are not.
        """
        if not len(self.leaders) == len(self.levels) == len(self.sizes) or not len(self.leaders):
            raise ValueError("every leader needs a level and a size, and there must be a leader")
        most = len(self.symbols)  # of a list: sizes beyond it could add up to the right sum by overflow
        if self.sizes.min() < 1 or self.sizes.max() > most or not self.sizes.sum() == most == len(self.bits):
            raise ValueError("every leader needs a follower, and every follower a length")
        if self.levels.min() < 0 or self.levels.max() >= levels:
            raise ValueError(f"levels of leaders must be 0 to {levels - 1}")
        starts = np.cumsum(self.sizes) - self.sizes
        within = np.ones(len(self.symbols), dtype=bool)
        within[starts] = False
        for name, found, rising in (
            ("leaders", self.leaders, np.diff(self.leaders)),
            ("followers", self.symbols, np.diff(self.symbols, prepend=-1)[within]),
        ):
            if found.min() < 0 or found.max() >= symbols or (rising < 1).any():
                raise ValueError(f"{name} must be symbols, 0 to {symbols - 1}, ascending")
        alone = self.sizes == 1
        if (self.bits[starts[alone]] != 0).any():
            raise ValueError("a follower that is alone takes no bits in its list")
        lengths = np.where(np.repeat(alone, self.sizes), 1, self.bits)
        if lengths.min() < 1 or lengths.max() > LONGEST:
            raise ValueError(f"lengths of followers must be 1 to {LONGEST} bits")
        if (np.add.reduceat(np.left_shift(1, LONGEST - lengths), starts)[~alone] != 1 << LONGEST).any():
            raise ValueError("the lengths of a leader's followers do not make a complete prefix code")


class FollowCode(ClassCode):
    """Symbols 0 … n-1 ↔ bits, each symbol in the light of the one before it, with followers.

    A symbol that is on the list of the one before is always written as its follower, so there is one way to write
    symbols.

    Args:
        classes, transitions, members, usual: as for :class:`~mbc_core.class_code.ClassCode`; the transitions are
            those behind symbols without a list.
        listed: int [L·C, C+1], bits of a class (column) behind a leader of level l and class c (row l·C + c); the last
            column is the sign for "a follower". Each row is a complete code, its longest at least eight bits.
        followers: the lists.

    Raises:
        ValueError: shapes do not fit together, or lengths make no complete code.
    """

    def __init__(
        self,
        classes: Numbers,
        transitions: Sequence[Numbers],
        members: Numbers,
        usual: Numbers,
        listed: Sequence[Numbers],
        followers: Followers,
    ) -> None:
        super().__init__(classes, transitions, members, usual)
        count, levels = len(self.usual), len(listed) // len(self.usual)
        if not levels or len(listed) % count or any(len(row) != count + 1 for row in listed):
            raise ValueError(f"{count} classes need {count} rows of {count + 1} lengths a level, at least one level")
        followers.check(len(self.classes), levels)
        self.listed, self.followers = np.asarray(listed, dtype=np.int64), followers
        _check_rows(self.listed)
        self._sign, size = count, len(self.classes)
        row = np.full(size, -1)
        row[followers.leaders] = count * followers.levels + self.classes[followers.leaders]
        self._row: list[int] = row.tolist()  # which row of ``listed`` is behind each symbol; -1: it has no list
        self._listed_step: list[list[int]] = self.listed.tolist()
        leader = np.repeat(followers.leaders, followers.sizes)
        self._at: dict[int, int] = dict(
            zip((leader * size + followers.symbols).tolist(), range(len(leader)), strict=True)
        )
        self._whole: list[int] = (self.listed[row[leader], count] + followers.bits).tolist()
        self._ends: list[int] = np.cumsum(followers.sizes).tolist()
        self._place_of: dict[int, int] = dict(
            zip(followers.leaders.tolist(), range(len(followers.leaders)), strict=True)
        )
        # Made when first met: a passage meets few of them, and making all would take longer than reading the file.
        self._listed_rows: dict[int, PrefixCode] = {}
        self._lists: dict[int, tuple[PrefixCode | None, list[int]]] = {}

    def after(self, before: int | None, symbol: int) -> int:
        """Bits of ``symbol`` behind ``before`` (None: it is the first)."""
        if before is None:
            return super().after(None, symbol)
        at = self._at.get(int(before) * len(self._class) + int(symbol))  # a uint16 would overflow
        if at is not None:
            return self._whole[at]
        of, row = self._class[symbol], self._row[before]
        step = self._step[self._class[before]] if row < 0 else self._listed_step[row]
        return step[of] + self._inner[symbol]

    def fields(self) -> dict[str, object]:
        """What :meth:`of_fields` takes: numbers, texts of lengths, and lists only."""
        return {
            "classes": self.classes.tolist(),
            "transitions": [lengths_text(row) for row in self.transitions],
            "members": lengths_text(self.members),
            "usual": self.usual.tolist(),
            "listed": [lengths_text(row) for row in self.listed],
            **self.followers.fields(),
        }

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> FollowCode:
        """The code of these :meth:`fields`.

        Raises:
            ValueError, KeyError, TypeError: they are no such code.
        """
        return cls(
            _whole_numbers(fields["classes"]),
            [read_lengths(row) for row in fields["transitions"]],
            read_lengths(fields["members"]),
            _whole_numbers(fields["usual"]),
            [read_lengths(row) for row in fields["listed"]],
            Followers.of_fields(fields),
        )

    def _behind(self, before: int | None) -> PrefixCode:
        row = -1 if before is None else self._row[before]
        if row < 0:
            return super()._behind(before)
        found = self._listed_rows.get(row)
        if found is None:
            self._listed_rows[row] = found = PrefixCode(self.listed[row])
        return found

    def _spelled(self, before: int | None, symbol: int) -> tuple[int, int]:
        at = None if before is None else self._at.get(before * len(self._class) + symbol)
        if before is None or at is None:
            return super()._spelled(before, symbol)
        place = self._place_of[before]
        return self._sign, at - (self._ends[place - 1] if place else 0)

    def _group(self, before: int | None, of: int) -> tuple[PrefixCode | None, Sequence[int]]:
        if before is None or of != self._sign:
            return super()._group(before, of)
        found = self._lists.get(before)
        if found is None:
            place = self._place_of[before]
            own = slice(self._ends[place - 1] if place else 0, self._ends[place])
            symbols = self.followers.symbols[own].tolist()
            code = None if len(symbols) == 1 else PrefixCode(self.followers.bits[own], short=True)
            self._lists[before] = found = code, symbols
        return found


def lengths_text(lengths: Int64) -> str:
    """Lengths, 0 to 32 each, as one letter each: 0 to 9, then a to w. A file of them is read fast and stays small."""
    return _LETTERS[lengths].tobytes().decode("ascii")


def read_lengths(text: str) -> Int64:
    """int64, the lengths of :func:`lengths_text`.

    Raises:
        ValueError: there is something else than such letters.
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"lengths are letters in a text, not {type(text).__name__}")
    found = _LENGTHS[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)]
    if (found < 0).any():
        raise ValueError("lengths are letters 0 to 9 and a to w")
    return found


_LETTERS = np.frombuffer(b"0123456789abcdefghijklmnopqrstuvw", dtype=np.uint8)
_LENGTHS = np.full(256, -1, dtype=np.int64)
_LENGTHS[_LETTERS] = np.arange(len(_LETTERS))


def _whole_numbers(values: Sequence[object]) -> Int64:
    found = np.array(values)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ValueError("expected a list of whole numbers")
    return found.astype(np.int64)


def _check_rows(rows: Int64) -> None:
    """Check each row as :class:`~mbc_core.prefix_code.PrefixCode` would, all at once.

    Raises:
        ValueError: one is no complete code with a longest of at least eight bits.
    """
    if rows.min() < 1 or rows.max() > LONGEST:
        raise ValueError(f"code lengths must be 1 to {LONGEST} bits")
    if (np.left_shift(1, LONGEST - rows).sum(axis=1) != 1 << LONGEST).any():
        raise ValueError("the code lengths do not make a complete prefix code")
    if (rows.max(axis=1) < BYTE).any():
        raise ValueError(f"the longest code must have at least {BYTE} bits")
