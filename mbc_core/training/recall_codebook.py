"""A rotation made for recall: every slot gets its share of each principal component, and recall of codes measured.

A random rotation makes all slots alike by making every direction alike: half of what distinguishes two passages is
then lost evenly. Here the principal components of the embeddings are dealt out like cards: the T strongest make the
first band, the next T the second, and so on; within a band the axes are turned at random; each slot takes one axis
of every band. The slots are as alike as before, so one shared codebook still serves them all, but each slot vector
has a few strong axes and many weak ones, and K codewords describe it with a third less error. Because a better
described passage is also described longer, the score must credit length (:func:`mbc_core.codes.length_credits`).
Inner products of embeddings do not change: the rotation stays orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Float32, Float64, Rotation
from mbc_core.errors import UsageError
from mbc_core.training.codebook import HeldOutQuestions, address_recall, unit_rows
from mbc_core.training.prepared import load_prepared

_BLOCK_ROWS = 1 << 13


def spread_rotation(embeddings: NDArray[Any], slots: int, seed: int) -> Rotation:
    """The rotation that gives each of ``slots`` slots one axis of every band of principal components.

    A rotation made for T slots also suits T/2: two neighbouring slots together have two axes of every band.

    Args:
        embeddings: [N, d] of any float dtype, N ≥ d; brought to unit length here.
        slots: T; divides d.
        seed: of the turns within the bands.

    Returns:
        R, orthogonal. Save it: the last bits of the factorisations differ between machines.

    Raises:
        UsageError: fewer embeddings than their width, or a T that does not divide it.
    """
    rows = unit_rows(embeddings)
    width = rows.shape[1]
    if slots < 1 or width % slots or len(rows) < width:
        raise UsageError(
            "no rotation can be fitted",
            value=f"T = {slots}, {len(rows)} embeddings of width {width}",
            cause="T must divide the width, and at least as many embeddings as the width are needed",
            fix="choose another T, prepare more passages, or take a random rotation",
        )
    components = principal_components(rows)
    axes = np.empty((slots, width // slots, width))
    draw = np.random.default_rng(seed)
    for band in range(width // slots):
        turned = _random_turn(slots, draw) @ components[band * slots : (band + 1) * slots]
        axes[:, band] = turned
    return Rotation(np.ascontiguousarray(axes.reshape(width, width), dtype=np.float32))


def principal_components(rows: Float32) -> Float64:
    """Principal components of unit rows [N, d] about the origin, strongest first: float64 [d, d], one a row.

    About the origin, because that is what a codeword has to describe. The sign of each makes its largest element
    positive.
    """
    width = rows.shape[1]
    moments = np.zeros((width, width))
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].astype(np.float64)
        moments += block.T @ block
    _, vectors = np.linalg.eigh(moments / len(rows))
    found = vectors.T[::-1]
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1, keepdims=True), axis=1)
    components: Float64 = found * np.where(largest < 0, -1.0, 1.0)
    return components


def measure_recall(
    folders: Mapping[str, Path], rotation: Rotation, book: Codebook, slots: int, device: str = "cpu"
) -> dict[str, dict[str, float | int]]:
    """Recall by codes and by float embedding on whole prepared sets, each searched among its own passages.

    Args:
        folders: name → what ``mbc train prepare`` wrote.

    Returns:
        For each name questions, passages, ``codes_at_1``, ``codes_at_5``, ``float_at_1``, ``float_at_5``.

    Raises:
        DamagedFile: a folder cannot be read.
    """
    found = {}
    for name, folder in folders.items():
        data = load_prepared(folder)
        asked = HeldOutQuestions(data.question_embeddings, data.rows)
        found[name] = address_recall(data.embeddings, asked, rotation, book, slots, torch.device(device))
    return found


def _random_turn(size: int, draw: np.random.Generator) -> Float64:
    """An orthogonal matrix [size, size] drawn uniformly."""
    q, r = np.linalg.qr(draw.standard_normal((size, size)))
    turn: Float64 = q * np.sign(np.diag(r))
    return turn
