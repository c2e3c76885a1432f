"""Fixed-shape batches: why a passage's codes do not depend on its neighbours.

Matrix kernels choose their blocking, and so their rounding, by shape. Hence each length bucket has one shape, ever:
short batches are filled with padded rows. A bucket is always longer than its passages, because attention
implementations drop a mask that happens to be all ones, which would let one row's length change another's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LENGTHS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 264)
"""Tokens a row, special tokens and at least one padding token included."""

MAX_TOKENS = 256
"""Most tokens of a passage, special tokens included."""

TOKENS_PER_BATCH = {"cpu": 512, "cuda": 65_536}
"""Sets the rows of a bucket: small on a CPU (little padding, quick single questions), large where launches cost."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Which passages run together, and in what shape.

    Attributes:
        places: positions in the caller's list; at most ``rows`` of them, the rest of the rows is padding.
        rows, length: shape of the token matrix.
    """

    places: tuple[int, ...]
    rows: int
    length: int


def bucket_length(tokens: int) -> int:
    """The bucket of a passage with ``tokens`` tokens (special tokens included; at most ``MAX_TOKENS``)."""
    return next(length for length in LENGTHS if tokens < length)


def rows_of(length: int, device_type: str) -> int:
    """Rows of a bucket's batches on a kind of device ("cpu", "cuda", …)."""
    return max(1, TOKENS_PER_BATCH.get(device_type, TOKENS_PER_BATCH["cuda"]) // length)


def plan_batches(token_counts: Sequence[int], device_type: str) -> Iterator[Batch]:
    """Batches that cover every passage once, shortest bucket first, in the caller's order within a bucket."""
    by_length: dict[int, list[int]] = {}
    for place, tokens in enumerate(token_counts):
        by_length.setdefault(bucket_length(tokens), []).append(place)
    for length in sorted(by_length):
        rows = rows_of(length, device_type)
        places = by_length[length]
        for start in range(0, len(places), rows):
            yield Batch(tuple(places[start : start + rows]), rows, length)


def token_matrix(
    batch: Batch, token_ids: Sequence[Sequence[int]], pad_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids and attention mask of a batch, both int64 [rows, length]; a padded row attends to one padding."""
    ids = np.full((batch.rows, batch.length), pad_id, dtype=np.int64)
    mask = np.zeros((batch.rows, batch.length), dtype=np.int64)
    mask[len(batch.places) :, 0] = 1  # a softmax over nothing is not a number
    for row, place in enumerate(batch.places):
        found = token_ids[place]
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return ids, mask
