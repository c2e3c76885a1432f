"""Samples as arrays, and the batches a training step takes: sorted by length, right-padded, answers marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Batch = TypeVar("Batch")
_PAD_TO = 8


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of token ids in one array: list i is ``values[starts[i]:starts[i] + lengths[i]]``."""

    values: Int32
    starts: Int64
    lengths: Int64

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Pack Python lists."""
        lengths = np.fromiter((len(one) for one in lists), dtype=np.int64, count=len(lists))
        values = np.fromiter((one for row in lists for one in row), dtype=np.int32, count=int(lengths.sum()))
        return cls(values, np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True, slots=True)
class Composed:
    """Prompts with answers, ready for batches.

    Attributes:
        tokens: prompt and answer ids of each sample.
        answer_lengths: int64 [n], how many of the last ids are the answer.
    """

    tokens: Ragged
    answer_lengths: Int64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass.

    Attributes:
        ids: int64 [rows, longest], right-padded.
        places: int64 [answers], positions in the flattened batch whose next token is an answer's.
        targets: int64 [answers], those tokens.
        samples: rows that are real.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    samples: int


def micro_batches(
    composed: Composed, pad_id: int, batch_tokens: int, rows: int, seed: Sequence[int]
) -> list[MicroBatch]:
    """Sort samples by length, cut at ``batch_tokens`` padded tokens or ``rows`` samples, shuffle the batches."""
    lengths = composed.tokens.lengths
    order = np.argsort(lengths, kind="stable")
    groups: list[np.ndarray[Any, Any]] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < min(len(order), start + rows)
            and (stop + 1 - start) * _padded(int(lengths[order[stop]])) <= batch_tokens
        ):
            stop += 1
        groups.append(order[start:stop])
        start = stop
    batches = [_micro_batch(composed, group, pad_id) for group in groups]
    np.random.default_rng(list(seed)).shuffle(batches)
    return batches


def steps_of(batches: Sequence[MicroBatch], samples: int) -> list[list[MicroBatch]]:
    """Group micro-batches into steps of about ``samples`` samples each."""
    total = sum(batch.samples for batch in batches)
    wanted = max(1, round(total / samples))
    steps: list[list[MicroBatch]] = [[]]
    seen = 0
    for batch in batches:
        if steps[-1] and seen >= len(steps) * total / wanted:
            steps.append([])
        steps[-1].append(batch)
        seen += batch.samples
    return steps


def prefetched(
    make: Callable[[int], list[list[Batch]]], first: int, ahead: int = 3
) -> Iterator[tuple[int, list[list[Batch]]]]:
    """Pools ``first``, ``first + 1``, … in order, made ``ahead`` of time by a background thread."""
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="samples") as workers:
        waiting: list[tuple[int, Future[list[list[Batch]]]]] = []
        number = first
        try:
            while True:
                while len(waiting) <= ahead:
                    waiting.append((number, workers.submit(make, number)))
                    number += 1
                done, future = waiting.pop(0)
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def spread(starts: Int64, lengths: Int64) -> Int64:
    """Indices starts[0], starts[0]+1, …, for lengths[0] of them, then the same for each next run."""
    skipped = np.cumsum(lengths) - lengths
    return np.repeat(starts - skipped, lengths) + np.arange(int(lengths.sum()))


def _micro_batch(composed: Composed, group: np.ndarray[Any, Any], pad_id: int) -> MicroBatch:
    lengths = composed.tokens.lengths[group]
    answers = composed.answer_lengths[group]
    width = _padded(int(lengths.max()))
    ids = np.full((len(group), width), pad_id, dtype=np.int64)
    filled = np.arange(width)[None, :] < lengths[:, None]
    places = np.repeat(composed.tokens.starts[group], lengths) + _runs(lengths)
    ids[filled] = composed.tokens.values[places]
    target_places = np.repeat(np.arange(len(group)) * width + lengths - answers, answers) + _runs(answers)
    targets = ids.reshape(-1)[target_places]
    return MicroBatch(pinned(ids), pinned(target_places - 1), pinned(targets), len(group))


def pinned(values: np.ndarray[Any, Any]) -> Tensor:
    """A tensor that copies to an accelerator without holding up the host."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _runs(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0…lengths[0]-1, 0…lengths[1]-1, …"""
    inside: np.ndarray[Any, Any] = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return inside


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO
