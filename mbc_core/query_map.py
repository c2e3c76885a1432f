"""The question's side of recall: a learned map of R·q, and what each direction of a passage's length counts for.

Codes keep their meaning, the bank keeps its bytes; only what is asked of them changes. Quantizing loses the weak
directions of an embedding first, while the strong ones are shared by many passages and so tell fewer of them apart:
the plain score trusts each as it trusted the exact vector. The map is trained on questions whose passage is known,
with the *quantized* passages to choose from:

    score(q, doc) = (z + D·z)·x̂ + β·(1 - Σ_i u_i·x̂_i²) + offset,   z = R·q

It stays a sum over slots, so packed codes are searched as they are stored, whatever their codebook version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mbc_core.codes import LENGTH_WEIGHT, Float32, Float64, Rotation, check_array, decode, exact_inner_products
from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError

_FORMAT = "mbc-query-map/1"


@dataclass(frozen=True, eq=False)
class QueryMap:
    """D, u and the offset of the score, made for one rotation and one number of slots.

    Attributes:
        residual: D, float32 [d, d]; kept in half precision in the file. Zero: the question as it is.
        length_weights: u, float32 [d], positive; one: the plain credit for length.
        offset: gives scores the mean of the plain ones, on whose scale words are added; the same for every passage.
        rotation: digest of R, whose axes these are.
        slots: T that it was trained for.
    """

    residual: Float32
    length_weights: Float32
    offset: float
    rotation: str
    slots: int

    def __post_init__(self) -> None:
        width = len(self.length_weights)
        check_array("the query map", self.residual, (width, width), np.float32)
        check_array("the query map's length weights", self.length_weights, (width,), np.float32)
        finite = np.isfinite(self.residual).all() and np.isfinite([*self.length_weights, self.offset]).all()
        if not finite or not (self.length_weights > 0).all() or self.slots < 1 or width % self.slots:
            raise DamagedFile(
                "the query map does not hold what one holds",
                value=f"T = {self.slots}, width {width}, least length weight {self.length_weights.min(initial=1.0)}",
                cause="a value is not finite, a length weight is not positive, or T does not divide the width",
                fix="restore the file from a copy of this release's weights, or make it with `mbc train query-map`",
            )

    @classmethod
    def identity(cls, rotation: Rotation, slots: int) -> QueryMap:
        """The map that changes nothing."""
        width = rotation.width
        none = np.zeros((width, width), np.float32)
        return cls(none, np.ones(width, np.float32), 0.0, rotation.digest, slots)

    @property
    def width(self) -> int:
        """d."""
        return len(self.length_weights)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the file's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def serves(self, rotation: Rotation, slots: int) -> bool:
        """Was it made for codes of this rotation and T?"""
        return (self.rotation, self.slots) == (rotation.digest, slots)

    def require(self, rotation: Rotation, slots: int) -> None:
        """Refuse to serve codes of another rotation or another T.

        Raises:
            IncompatibleBank: names what the map was made for.
        """
        if not self.serves(rotation, slots):
            raise IncompatibleBank(
                "the query map belongs to another rotation or number of codes",
                value=f"rotation {self.rotation[:12]}…, T = {self.slots}",
                cause=f"these codes have rotation {rotation.digest[:12]}…, T = {slots}",
                fix="recall without a query map, or train one for these codes with `mbc train query-map`",
            )

    def apply(self, question_slots: Float32) -> Float32:
        """z → z + D·z, float32 [q, T, d_c] → the same shape, the same bits in any company.

        Raises:
            UsageError: a wrong dtype, or slots that do not make up the width.
        """
        check_array("the question's slots", question_slots, (None, None, None), np.float32)
        if question_slots.shape[1] * question_slots.shape[2] != self.width:
            raise UsageError(
                "the query map does not fit the question",
                value=f"T · d_c = {question_slots.shape[1]} · {question_slots.shape[2]}, width {self.width}",
                cause="they belong to different encoders",
                fix="recall without a query map",
            )
        if not self.residual.any():
            return question_slots
        flat = question_slots.reshape(len(question_slots), self.width)
        turned = flat + exact_inner_products(flat, self.residual)
        return turned.astype(np.float32).reshape(question_slots.shape)

    def slot_weights(self, slots: int) -> Float32:
        """u by slot, float32 [T, d_c]."""
        return self.length_weights.reshape(slots, self.width // slots)

    def to_bytes(self) -> bytes:
        """safetensors bytes: ``residual`` in half precision, ``length_weights``, ``offset``, ``slots``."""
        tensors: dict[str, NDArray[Any]] = {
            "residual": self.residual.astype(np.float16),
            "length_weights": self.length_weights,
            "offset": np.array([self.offset], np.float32),
            "slots": np.array([self.slots], np.int32),
            "rotation": np.frombuffer(bytes.fromhex(self.rotation), np.uint8),
        }
        return save_tensors(tensors, metadata={"format": _FORMAT})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> QueryMap:
        """Read :meth:`to_bytes`.

        Raises:
            DamagedFile: not a query map.
        """
        try:
            tensors = load_tensors(data)
            residual, weights = tensors["residual"].astype(np.float32), tensors["length_weights"]
            offset, slots = float(tensors["offset"][0]), int(tensors["slots"][0])
            rotation = tensors["rotation"].tobytes().hex()
        except (SafetensorError, KeyError, ValueError, IndexError) as error:
            raise DamagedFile(
                "the query map cannot be read",
                value=where,
                cause=f"not a query map in safetensors form ({error!r})",
                fix="restore the file from a copy of this release's weights",
            ) from error
        return cls(residual, weights, offset, rotation, slots)

    @classmethod
    def load(cls, path: Path) -> QueryMap:
        """Read a file of :meth:`to_bytes`.

        Raises:
            DamagedFile: not a query map.
        """
        return cls.from_bytes(path.read_bytes(), str(path))


def mapped_scores(
    questions: Float32, rotation: Rotation, codes: NDArray[np.uint16], codewords: Float32, query_map: QueryMap
) -> Float64:
    """The plain float64 computation over decoded codes that every search with a map must equal: [q, n]."""
    z = questions.astype(np.float64) @ rotation.matrix.astype(np.float64).T
    turned = z + z @ query_map.residual.astype(np.float64).T
    decoded = decode(codes, codewords).astype(np.float64)
    lengths = (decoded**2) @ query_map.length_weights.astype(np.float64)
    scores: Float64 = turned @ decoded.T + LENGTH_WEIGHT * (1 - lengths) + query_map.offset
    return scores
