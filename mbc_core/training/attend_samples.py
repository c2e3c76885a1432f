"""Training samples of the attend read: a question, the passages that are shown as vectors, and the answer.

Everything stays on the accelerator as tables of vectors and tokens; a batch carries row numbers and places only. A pool
is a pure function of the seed and its number, as in :mod:`mbc_core.training.samples`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.training.batches import Int64, Ragged, pinned, spread
from mbc_core.training.samples import SampleSource

_PAD_TO = 8


@dataclass(frozen=True, slots=True)
class AttendBatch:
    """One forward and backward pass.

    Attributes:
        ids: int64 [rows, longest], right-padded; the pad id stands where soft tokens go.
        places, targets: int64 [answers], as in :class:`mbc_core.training.batches.MicroBatch`.
        first: int64 [lines], place of each passage's first soft token in the flattened batch.
        passages, asked: int64 [lines], the passage and the question of each line.
        variants: int64 [lines], which of a passage's vectors is shown.
        samples: rows.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    first: Tensor
    passages: Tensor
    asked: Tensor
    variants: Tensor
    samples: int


@dataclass(frozen=True, eq=False)
class AttendSource:
    """Draws pools of batches.

    Attributes:
        samples: questions, answers, their true passages and distractors, drawn as the word reader draws them.
        soft_tokens: places a passage takes.
        variants: how often each of a passage's vectors is shown; sums to 1.
        pad_id: id at the places of soft tokens, and right of the end.
        as_found: share of samples that show what recall finds, even if the true passage is not among it.
    """

    samples: SampleSource
    soft_tokens: int
    variants: tuple[float, ...]
    pad_id: int
    as_found: float = 0.0

    def pool(self, seed: int, number: int, size: int, rows: int) -> list[AttendBatch]:
        """Batches of ``rows`` samples (the last may be smaller) of pool ``number``, the same for equal arguments."""
        rng = np.random.default_rng([seed, number, 7])
        question, k = self._draw(rng, size)
        owner, passage, _ = self.samples.choose_lines(rng, question, k)
        passage = self._as_found(rng, question, k, owner, passage)
        variant = rng.choice(len(self.variants), size=len(owner), p=np.array(self.variants) / sum(self.variants))
        lines = np.bincount(owner, minlength=size)
        length = self._lengths(question, lines)
        order = np.argsort(length, kind="stable")
        groups = [order[start : start + rows] for start in range(0, size, rows)]
        begin = np.cumsum(lines) - lines
        batches = []
        for group in groups:
            chosen = spread(begin[group], lines[group])
            batches.append(self._batch(question[group], lines[group], passage[chosen], variant[chosen]))
        rng.shuffle(batches)
        return batches

    def _as_found(self, rng: np.random.Generator, question: Int64, k: Int64, owner: Int64, passage: Int64) -> Int64:
        """Where recall misses the true passage, a share of samples shows the passages that it finds instead."""
        others, lines = self.samples.others, np.bincount(owner, minlength=len(question))
        chosen = (rng.random(len(question)) < self.as_found) & (self.samples.ranks[question] >= k)
        if not others.shape[1] or not chosen.any():
            return passage
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lines) - lines, lines)
        found = others[question[owner], np.minimum(place, others.shape[1] - 1)]
        return np.where(chosen[owner] & (found >= 0), found, passage)

    def _draw(self, rng: np.random.Generator, size: int) -> tuple[Int64, Int64]:
        """Which questions, and how many passages each shows."""
        source, mix = self.samples, self.samples.mixture
        cloze = len(source.rows) - source.asked
        is_cloze = (rng.random(size) < mix.cloze) & (cloze > 0) | (source.asked == 0)
        question = np.where(
            is_cloze, source.asked + rng.integers(0, max(cloze, 1), size), rng.integers(0, max(source.asked, 1), size)
        )
        k = rng.choice(mix.passages, size=size, p=np.array(mix.weights) / sum(mix.weights))
        k[rng.random(size) < mix.no_memory] = 0
        return question, k

    def _lengths(self, question: Int64, lines: NDArray[np.int64]) -> Int64:
        line = self.soft_tokens + len(self.samples.newline)
        asked, answer = self.samples.questions.lengths[question], self.samples.answers.lengths[question]
        return len(self.samples.start) + lines * line + asked + answer

    def _batch(
        self,
        question: Int64,
        lines: NDArray[np.int64],
        passage: Int64,
        variant: NDArray[np.int64],
    ) -> AttendBatch:
        source, rows = self.samples, np.arange(len(question))
        length = self._lengths(question, lines)
        width = -(-int(length.max()) // _PAD_TO) * _PAD_TO
        ids = np.full(len(question) * width, self.pad_id, dtype=np.int64)
        begin = rows * width
        for offset, one in enumerate(source.start):
            ids[begin + offset] = one
        owner = np.repeat(rows, lines)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lines) - lines, lines)
        line = self.soft_tokens + len(source.newline)
        first = begin[owner] + len(source.start) + within * line
        for offset, one in enumerate(source.newline):
            ids[first + self.soft_tokens + offset] = one
        at = begin + len(source.start) + lines * line
        asked = _copy(ids, at, source.questions, question)
        answer = _copy(ids, at + asked, source.answers, question)
        places = spread(at + asked, answer)
        return AttendBatch(
            pinned(ids.reshape(len(question), width)),
            pinned(places - 1),
            pinned(ids[places]),
            pinned(first),
            pinned(passage.astype(np.int64)),
            pinned(question[owner]),
            pinned(variant.astype(np.int64)),
            len(question),
        )


def _copy(ids: Int64, at: Int64, lists: Ragged, which: Int64) -> Int64:
    """Write the lists ``which`` into ``ids`` from ``at`` on; their lengths."""
    lengths = lists.lengths[which]
    ids[spread(at, lengths)] = lists.values[spread(lists.starts[which], lengths)]
    return lengths
