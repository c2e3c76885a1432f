"""What a learning codebook is worth: the same stream coded with chains that learn, and with frozen version 0.

Passages arrive in windows; each window is coded with the version the chain allows it, its statistics go into the
chain, and then every question about what is stored so far is looked up among all codes stored so far, whatever
version they name. That is what a bank does for months, without the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.chain import MOST_VERSIONS, CodebookChain
from mbc_core.codebook.files import Codebook
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import UpdateRule, perplexity
from mbc_core.codes import Float32, Rotation, check_array, pack, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.recall import Part, RecallIndex

KS = (1, 5)
"""Ranks at which recall is counted: R@1 and R@5."""

_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Stream:
    """Embedded passages in the order of their arrival, and questions about them.

    Attributes:
        embeddings: float32 [n, d]. keys: int64 [n], documents; a document's passages follow each other.
        passages: int32 [n], numbers within the document.
        questions: float32 [q, d]. rows: int64 [q], the passage that answers each question.
    """

    embeddings: Float32
    keys: NDArray[np.int64]
    passages: NDArray[np.int32]
    questions: Float32
    rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        check_array("the embeddings", self.embeddings, (None, None), np.float32)
        check_array("the document keys", self.keys, (len(self.embeddings),), np.int64)
        check_array("the passage numbers", self.passages, (len(self.embeddings),), np.int32)
        check_array("the questions", self.questions, (None, self.embeddings.shape[1]), np.float32)
        check_array("the questions' passages", self.rows, (len(self.questions),), np.int64)


@dataclass(frozen=True, slots=True)
class Side:
    """One way of coding, after one window.

    Attributes:
        version: that the window's codes name.
        used: share of the K codes that the window uses. perplexity: of the window's usage, as a share of K.
        error: Σ ‖z − E_c‖² / Σ ‖z‖² over the window.
        hits: bool [q', 2], for every question about what is stored so far: found at rank 1, within rank 5.
        published: number of the version published at the end of this window, or None. resets: its reset codes.
        step: share of the way that its words went.
    """

    version: int
    used: float
    perplexity: float
    error: float
    hits: NDArray[np.bool_]
    published: int | None = None
    resets: int = 0
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One window of the stream, coded every way.

    Attributes:
        window: number. start, end: its passages.
        asked: int64 [q'], numbers of the questions about what is stored so far.
        sides: one a rule, in their order.
    """

    window: int
    start: int
    end: int
    asked: NDArray[np.int64]
    sides: tuple[Side, ...]


def cut_windows(keys: NDArray[np.int64], least: int) -> list[tuple[int, int]]:
    """Consecutive windows of at least ``least`` passages, no document in two of them: (start, end) each.

    >>> cut_windows(np.array([1, 1, 2, 3, 3, 3, 4], np.int64), 2)
    [(0, 2), (2, 7)]

    The last one takes what is left, so it is larger; only a stream that is shorter than ``least`` is one short window.
    """
    starts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
    cuts = [0]
    for place in starts[1:]:
        if place - cuts[-1] >= least:
            cuts.append(place)
    if cuts[-1] < len(keys):
        cuts = [*(cuts[:-1] or cuts), len(keys)]
    return list(pairwise(cuts))


def compare(
    stream: Stream,
    codebook: Codebook,
    rotation: Rotation,
    slots: int,
    windows: Sequence[tuple[int, int]],
    rules: Sequence[UpdateRule | None],
) -> Iterator[Step]:
    """Code the stream window by window, by every rule, and look up every question after each window.

    Args:
        codebook: version 0. rotation: R. slots: T.
        windows: (start, end) of consecutive windows; each stands for one day in the chain's calendar.
        rules: how the codebook learns; None keeps version 0 for everything.

    Raises:
        UsageError: windows that do not follow each other, or pieces that do not fit.
    """
    _require_consecutive(windows, len(stream.embeddings))
    chains = [
        CodebookChain(
            [codebook], window_seconds=_DAY_SECONDS, rule=rule, most_versions=1 if rule is None else MOST_VERSIONS
        )
        for rule in rules
    ]
    coders = [_Coder(chain, rotation, slots) for chain in chains]
    for number, (start, end) in enumerate(windows):
        asked = np.flatnonzero(stream.rows < end)
        z = to_slots(stream.embeddings[start:end], rotation, slots)
        sides = tuple(one.step(number, z, stream, (start, end), asked) for one in coders)
        yield Step(number, start, end, asked, sides)


class _Coder:
    """Codes stored so far, by version, and the chain that decides the next ones."""

    def __init__(self, chain: CodebookChain, rotation: Rotation, slots: int) -> None:
        self._chain, self._rotation, self._slots = chain, rotation, slots
        self._parts: list[Part] = []

    def step(self, number: int, z: Float32, stream: Stream, place: tuple[int, int], asked: NDArray[np.int64]) -> Side:
        start, end = place
        window = f"{np.datetime64(number, 'D')}T00:00:00Z"
        book = self._chain.version_for(window)
        codes = quantize(z, book.codewords)
        statistics = BatchStatistics.of(book, z, codes, stream.keys[start:end], stream.passages[start:end])
        self._parts.append((book, pack(codes), np.arange(start, end)))
        update = self._chain.add(window, statistics)
        return Side(
            version=book.version,
            used=float((statistics.counts > 0).mean()),
            perplexity=perplexity(statistics.counts) / book.size,
            error=statistics.error_sum / max(statistics.energy_sum, 1),
            hits=self._look_up(stream, asked),
            published=None if update is None else update.codebook.version,
            resets=0 if update is None else update.resets,
            step=0.0 if update is None else update.step.share,
        )

    def _look_up(self, stream: Stream, asked: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [q', 2]: found at rank 1, within rank 5."""
        hits = np.zeros((len(asked), len(KS)), bool)
        if len(asked):
            index = RecallIndex.build(self._parts, self._rotation, self._slots)
            _, found = index.search(np.ascontiguousarray(stream.questions[asked]), max(KS))
            right = found == stream.rows[asked][:, None]
            hits = np.stack([right[:, :k].any(axis=1) for k in KS], axis=1)
        return hits


def _require_consecutive(windows: Sequence[tuple[int, int]], passages: int) -> None:
    edges = [edge for window in windows for edge in window]
    wanted = [0, *(edge for end in edges[1:-1:2] for edge in (end, end)), passages]
    if edges != wanted or any(start >= end for start, end in windows):
        raise UsageError(
            "the windows do not cut the stream",
            value=list(windows)[:4],
            cause=f"each starts where the one before ends, from 0 to {passages}",
            fix="cut them with cut_windows",
        )
