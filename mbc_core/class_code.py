"""A code for symbols that follow one another: what comes before a symbol says how many bits it takes.

Symbols are sorted into classes (verbs, first names, years, …, found from text). A symbol is written in two steps: its
class, by a Huffman code that depends on the class before, then the symbol among its class. This is the class bigram
model of Brown et al. (1992), "Class-Based n-gram Models of Natural Language":
P(w | w') = P(class(w) | class(w')) · P(w | class(w)). Where words stand as in the text it saves a good bit a word
against a code that knows only how frequent each is. The model takes some hundred thousand small numbers and decoding is
two look-ups a symbol; a language model would save more, but then the bank could only be read with that model, bit for
bit the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbc_core.prefix_code import BYTE, LONGEST, PrefixCode, filled, whole_or_damaged

Numbers = Sequence[int] | NDArray[np.int64]
"""Whole numbers, as read from a file or counted."""

_MASK = (1 << LONGEST) - 1


class ClassCode:
    """Symbols 0 … n-1 ↔ bits, each symbol in the light of the one before it.

    Args:
        classes: int [n], class of each symbol, 0 to C-1; every class has a symbol.
        transitions: int [C+1, C], bits of the code of a class (column) after a class (row); the last row is the
            beginning. Each row is a complete code, its longest at least eight bits, so that filling never reads as a
            class.
        members: int [n], bits of a symbol's code among its class; 0 when it is alone there.
        usual: int [C], bits that a class takes by and large, whatever comes before, 1 to 32; see :attr:`lengths`.

    Raises:
        ValueError: shapes do not fit together, or lengths make no complete code.
    """

    def __init__(
        self,
        classes: Numbers,
        transitions: Sequence[Numbers],
        members: Numbers,
        usual: Numbers,
    ) -> None:
        of, inner = np.asarray(classes, dtype=np.int64), np.asarray(members, dtype=np.int64)
        count = int(of.max()) + 1 if len(of) else 0
        if not count or of.min() < 0 or not of.shape == inner.shape == (of.size,) or len(np.unique(of)) != count:
            raise ValueError("every symbol needs a class and a length, and every class a symbol")
        if len(transitions) != count + 1 or any(len(row) != count for row in transitions) or len(usual) != count:
            raise ValueError(f"{count} classes need {count + 1} rows of {count} lengths, and {count} usual lengths")
        self.classes, self.usual = of, np.asarray(usual, dtype=np.int64)
        self.transitions = np.asarray(transitions, dtype=np.int64)
        self.members = inner
        if self.usual.shape != (count,) or self.transitions.shape != (count + 1, count):
            raise ValueError("lengths of classes are numbers, one each")
        if self.usual.min() < 1 or self.usual.max() > LONGEST:
            raise ValueError(f"a class takes at least one bit, and at most {LONGEST}")
        self.lengths: NDArray[np.int64] = self.usual[of] + inner
        """int64 [n]: bits that a symbol takes by and large. What it takes in its place is told by :meth:`after`."""
        self._rows = [PrefixCode(row) for row in transitions]
        self._symbols = [np.flatnonzero(of == one).tolist() for one in range(count)]
        self._among = [None if len(own) == 1 else PrefixCode(inner[own], short=True) for own in self._symbols]
        if any(inner[own[0]] for own in self._symbols if len(own) == 1):
            raise ValueError("a symbol that is alone in its class takes no bits there")
        self._place = _places(self._symbols, len(of))
        self._class: list[int] = of.tolist()
        self._inner: list[int] = inner.tolist()
        self._step: list[list[int]] = self.transitions.tolist()

    def after(self, before: int | None, symbol: int) -> int:
        """Bits of ``symbol`` behind ``before`` (None: it is the first)."""
        row = -1 if before is None else self._class[before]
        return self._step[row][self._class[symbol]] + self._inner[symbol]

    def pack(self, symbols: Sequence[int]) -> bytes:
        """Bits of ``symbols`` one after the other, filled with ones to whole bytes.

        Raises:
            ValueError: one is none of 0 … n-1, and would come back as another.
        """
        value, size, before = 0, 0, None
        for symbol in map(int, symbols):
            if not 0 <= symbol < len(self._class):
                raise ValueError(f"{symbol} is no symbol, 0 to {len(self._class) - 1}")
            of, place = self._spelled(before, symbol)
            row = self._behind(before)
            value = value << row.bits[of] | row.codes[of]
            size += row.bits[of]
            among = self._group(before, of)[0]
            if among is not None:
                value = value << among.bits[place] | among.codes[place]
                size += among.bits[place]
            before = symbol
        return filled(value, size)

    def unpack(self, stored: bytes) -> list[int]:
        """Symbols of :meth:`pack`.

        Raises:
            DamagedFile: the bytes end inside a code.
        """
        left = len(stored) * BYTE
        value = (int.from_bytes(stored, "big") + 1 << LONGEST) - 1  # ones behind the end, as the filling is
        found: list[int] = []
        before = None
        while left > 0:
            of, used = self._behind(before).first(value >> left & _MASK)
            among, symbols = self._group(before, of)
            place = 0
            if among is not None and used < left:
                place, more = among.first(value >> left - used & _MASK)
                used += more
            elif among is not None:
                break
            if used > left:
                break
            before = symbols[place]
            found.append(before)
            left -= used
        whole_or_damaged(value >> LONGEST, left, len(stored))
        return found

    def _behind(self, before: int | None) -> PrefixCode:
        """The code of what comes behind ``before``."""
        return self._rows[-1 if before is None else self._class[before]]

    def _spelled(self, before: int | None, symbol: int) -> tuple[int, int]:
        """How ``symbol`` is written behind ``before``: its group and its place there."""
        return self._class[symbol], self._place[symbol]

    def _group(self, before: int | None, of: int) -> tuple[PrefixCode | None, Sequence[int]]:
        """The code among the symbols of a group behind ``before`` (None: there is but one), and the symbols."""
        return self._among[of], self._symbols[of]

    def fields(self) -> dict[str, object]:
        """What :meth:`of_fields` takes: numbers and lists only."""
        return {
            "classes": self.classes.tolist(),
            "transitions": self.transitions.tolist(),
            "members": self.members.tolist(),
            "usual": self.usual.tolist(),
        }

    @classmethod
    def of_fields(cls, fields: dict[str, list[int]] | dict[str, object]) -> ClassCode:
        """The code of these :meth:`fields`.

        Raises:
            ValueError, KeyError, TypeError: they are no such code.
        """
        one = {name: fields[name] for name in ("classes", "transitions", "members", "usual")}
        return cls(**one)  # type: ignore[arg-type]  # their content is checked by the constructor

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | NDArray[np.integer]],
        classes: Sequence[int],
        *,
        unseen: float,
        sharing: float = 20.0,
    ) -> ClassCode:
        """Lengths that suit ``sequences``.

        Args:
            sequences: symbols of each text, in order.
            classes: int [n], class of every symbol.
            unseen: count given to every symbol beside what was seen.
            sharing: how many counts each row of transitions gets from the classes' own frequencies.

        Raises:
            ValueError: a code would need more than 32 bits, or fewer than 8 (too few classes).
        """
        texts = [np.zeros(0, dtype=np.int64), *(np.asarray(one, dtype=np.int64) for one in sequences)]
        before = np.concatenate([np.append(len(classes), one)[: len(one)] for one in texts])
        after = np.concatenate(texts)
        return cls.from_pairs(before, after, np.ones(len(after)), classes, unseen=unseen, sharing=sharing)

    @classmethod
    def from_pairs(
        cls,
        before: NDArray[np.int64],
        after: NDArray[np.int64],
        number: NDArray[np.float64],
        classes: Sequence[int],
        *,
        unseen: float,
        sharing: float = 20.0,
    ) -> ClassCode:
        """Lengths that suit pairs of neighbours.

        Args:
            before, after: int64 [p], symbols that stand together; ``before`` may be n, the beginning.
            number: float64 [p], how often.
            classes, unseen, sharing: as for :meth:`from_sequences`.

        Raises:
            ValueError: a code would need more than 32 bits, or fewer than 8 (too few classes).
        """
        of = np.asarray(classes, dtype=np.int64)
        count = int(of.max()) + 1
        seen = np.bincount(after, weights=number, minlength=len(of))
        smooth = row_counts(before, after, number, of, unseen=unseen, sharing=sharing)
        steps = np.array([PrefixCode.from_counts(row).lengths for row in smooth])
        members = np.zeros(len(of), dtype=np.int64)
        for one in range(count):
            places = np.flatnonzero(of == one)
            if len(places) > 1:
                members[places] = PrefixCode.from_counts((seen[places] + unseen).tolist(), short=True).lengths
        weights = smooth / smooth.sum(axis=0)
        usual = np.rint((weights * steps).sum(axis=0)).astype(np.int64)
        return cls(of.tolist(), steps.tolist(), members.tolist(), usual.tolist())


def row_counts(
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    number: NDArray[np.float64],
    classes: NDArray[np.int64],
    *,
    unseen: float,
    sharing: float,
) -> NDArray[np.float64]:
    """How often class follows class, float64 [C+1, C], with ``sharing`` counts a row by the classes' own frequencies.

    The arguments are those of :meth:`ClassCode.from_pairs`.
    """
    count = int(classes.max()) + 1
    seen = np.bincount(after, weights=number, minlength=len(classes))
    together = np.zeros((count + 1, count))
    np.add.at(together, (np.append(classes, count)[before], classes[after]), number)
    own = np.bincount(classes, weights=seen + unseen, minlength=count)
    smooth: NDArray[np.float64] = together + sharing * own / own.sum()
    return smooth


def sequence_bits(code: ClassCode | PrefixCode, symbols: Sequence[int]) -> int:
    """Bits of ``symbols``, before filling."""
    return sum(code.after(before, symbol) for before, symbol in zip([None, *symbols], symbols, strict=False))


def _places(symbols: Sequence[Sequence[int]], count: int) -> list[int]:
    places = [0] * count
    for own in symbols:
        for place, symbol in enumerate(own):
            places[symbol] = place
    return places
