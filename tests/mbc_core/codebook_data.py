"""Small data for the tests of codes, codebook and recall: embeddings with topics, and a typed-out 4×5 codebook."""

from __future__ import annotations

import numpy as np

from mbc_core.codebook.files import Codebook


def topical_embeddings(count: int, width: int, *, topics: int = 12, seed: int = 0) -> np.ndarray:
    """Unit vectors float32 [count, width] in noisy clusters, as text embeddings are; not i.i.d."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((topics, width))
    rows = centres[draw.integers(topics, size=count)] + 0.8 * draw.standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def codebook_of(vectors: np.ndarray, size: int, *, mass: float = 1000.0) -> Codebook:
    """Version 0 whose K codewords are evenly spaced rows of the slot vectors [n, T, d_c]."""
    flat = vectors.reshape(-1, vectors.shape[2])
    words = np.ascontiguousarray(flat[:: max(1, len(flat) // size)][:size])
    return Codebook.first(words, np.full(len(words), mass / len(words)))


def four_by_five(counts: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)) -> Codebook:
    """Four codewords of width five: one on each of the first four axes."""
    return Codebook.first(np.eye(4, 5, dtype=np.float32), np.array(counts))
