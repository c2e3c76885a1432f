"""How often the passage that answers is among the first k: by address codes, and by the float embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbc_core.evaluation.paired import Resampled
from schemas.results import RecallAt

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
DEPTHS = (1, 5, 10)
_BLOCK = 256


def nearest_by_float(questions: Float32, embeddings: Float32, k: int) -> Int64:
    """Rows of the ``k`` largest inner products, best first; ties go to the smaller row.

    Args:
        questions: float32 [q, d]. embeddings: float32 [n, d].

    Returns:
        int64 [q, min(k, n)].
    """
    k = min(k, len(embeddings))
    found = np.zeros((len(questions), k), dtype=np.int64)
    for start in range(0, len(questions), _BLOCK):
        scores = questions[start : start + _BLOCK] @ embeddings.T
        found[start : start + _BLOCK] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return found


def recall_at(
    right: Int64, by_code: Int64, by_float: Int64 | None, *, depths: Sequence[int] = DEPTHS, seed: int = 0
) -> list[RecallAt]:
    """R@k of each depth in per cent, with paired bootstrap intervals.

    Args:
        right: int64 [q], the row that answers; -1 when the bank does not hold it, which counts as not found.
        by_code, by_float: int64 [q, ≥ max(depths) or all rows], best first; no float search when None.

    Raises:
        UsageError: there are no questions.
    """
    rows: list[RecallAt] = []
    for depth in depths:
        values = [_hits(right, by_code, depth)]
        if by_float is not None:
            values.append(_hits(right, by_float, depth))
        drawn = Resampled.of(np.stack(values), seed=seed)
        codes = drawn.interval(0)
        full = drawn.interval(1) if by_float is not None else None
        share = drawn.share(0, 1) if by_float is not None else None
        rows.append(
            {
                "k": depth,
                "by_code": codes.mean,
                "by_code_low": codes.low,
                "by_code_high": codes.high,
                "by_float": None if full is None else full.mean,
                "share": None if share is None else share.mean,
                "share_low": None if share is None else share.low,
                "share_high": None if share is None else share.high,
            }
        )
    return rows


def _hits(right: Int64, found: Int64, depth: int) -> NDArray[np.float64]:
    hit = ((found[:, :depth] == right[:, None]) & (right >= 0)[:, None]).any(axis=1)
    return np.where(hit, 100.0, 0.0)
