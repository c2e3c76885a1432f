"""Address codes: embedding → rotated slot vectors → nearest codewords → packed bytes, as FAISS packs them.

A passage's codes may not depend on its neighbours, the batch size, the number of threads or the machine
(invariant 10). Floating-point matrix products do depend on those, because their sums are taken in another
order. So the two products here run on integers held in float64: each row is rounded to a fixed-point grid so
fine that float32 hardly notices, and so coarse that every partial sum stays below 2^53, where float64 counts
exactly. An exact sum has no order, so every BLAS gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mbc_core.errors import DamagedFile, UsageError

CODE_BITS = 9
"""Bits of one code on storage: K = 512 codewords."""

LENGTH_WEIGHT = 0.35
"""β of :func:`length_credits`: tuned on held-out passages, flat between 0.3 and 0.4."""

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_FLOAT64_EXACT_BITS = 53
_BLOCK_VECTORS = 4096
_ORTHOGONAL_TOLERANCE = 1e-4


def check_array(name: str, array: object, shape: tuple[int | None, ...], dtype: DTypeLike | None = None) -> None:
    """Refuse an array of another shape or dtype before a library below does something silent with it.

    Args:
        name: what the message calls the array.
        shape: wanted extents; None accepts any.
        dtype: wanted numpy dtype; None accepts any.

    Raises:
        UsageError: names the array, what was found and what was wanted.
    """
    wanted = f"[{', '.join('any' if extent is None else str(extent) for extent in shape)}]"
    wanted += "" if dtype is None else f" {np.dtype(dtype)}"
    if not isinstance(array, np.ndarray):
        raise UsageError(
            f"{name} is not a numpy array",
            value=type(array).__name__,
            cause="a list or a tensor was passed",
            fix=f"pass a numpy array {wanted}",
        )
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits or (dtype is not None and array.dtype != np.dtype(dtype)):
        raise UsageError(
            f"wrong shape or dtype of {name}",
            value=f"{list(array.shape)} {array.dtype}",
            cause=f"{wanted} is expected",
            fix="check which model, T and codebook it was made with, and convert it explicitly",
        )


def exact_inner_products(a: NDArray[Any], b: NDArray[Any]) -> Float64:
    """Inner products of the rows of ``a`` [n, d] and ``b`` [m, d], the same bits in any order of summation.

    Each row is rounded to about 22 bits (d = 384) or 24 bits (d ≤ 32) below its largest element.

    Returns:
        float64 [n, m].
    """
    left, left_exponent = _fixed_point(a)
    right, right_exponent = _fixed_point(b)
    products: Float64 = np.ldexp(left @ right.T, left_exponent + right_exponent.T)
    return products


def exact_squared_distances(a: NDArray[Any], b: NDArray[Any]) -> Float64:
    """Squared Euclidean distances between the rows of ``a`` [n, d] and ``b`` [m, d], reproducible like the products.

    Returns:
        float64 [n, m], never negative.
    """
    left, left_exponent = _fixed_point(a)
    right, right_exponent = _fixed_point(b)
    left_norms = np.ldexp((left * left).sum(axis=1, keepdims=True), 2 * left_exponent)
    right_norms = np.ldexp((right * right).sum(axis=1, keepdims=True), 2 * right_exponent).T
    products = np.ldexp(left @ right.T, left_exponent + right_exponent.T + 1)
    distances: Float64 = np.maximum(left_norms - products + right_norms, 0.0)
    return distances


def _fixed_point(rows: NDArray[Any]) -> tuple[Float64, NDArray[np.int32]]:
    """Rows [n, d] → integers held in float64 [n, d] and the power of two [n, 1] that scales them back."""
    if not np.isfinite(rows).all():
        raise UsageError(
            "a vector holds infinity or not-a-number",
            value=f"row {int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])} of {len(rows)}",
            cause="the encoder overflowed, or the weights are damaged",
            fix="encode again, in float32, and check the model's digest",
        )
    width = max(rows.shape[1], 1)
    bits = (_FLOAT64_EXACT_BITS - math.ceil(math.log2(width))) // 2
    _, exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True, initial=0.0))
    integers = np.rint(np.ldexp(rows.astype(np.float64), bits - exponent))
    return integers, (exponent - bits).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The fixed random rotation R that spreads an embedding's information evenly over its T slots.

    Attributes:
        matrix: float32 [width, width], orthogonal; rows are the new axes.
    """

    matrix: Float32

    def __post_init__(self) -> None:
        check_array("the rotation", self.matrix, (None, self.matrix.shape[0]), np.float32)
        error = np.abs(self.matrix.astype(np.float64) @ self.matrix.T - np.eye(self.width)).max(initial=0.0)
        if not error < _ORTHOGONAL_TOLERANCE:
            raise DamagedFile(
                "the rotation is not orthogonal",
                value=float(error),
                cause="the file is damaged or holds another matrix",
                fix="restore rotation.safetensors; codes made with another rotation cannot be read",
            )

    @classmethod
    def random(cls, width: int, seed: int) -> Rotation:
        """A rotation drawn uniformly. Save it: the last bits of the factorisation differ between machines."""
        gaussian = np.random.default_rng(seed).standard_normal((width, width))
        q, r = np.linalg.qr(gaussian)
        return cls(np.ascontiguousarray((q * np.sign(np.diag(r))).T, dtype=np.float32))

    @property
    def width(self) -> int:
        """Width d of the embeddings it turns."""
        return int(self.matrix.shape[0])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the matrix; the bank's manifest names it."""
        header = f"mbc-rotation/{self.width}/".encode()
        return hashlib.sha256(header + self.matrix.astype("<f4").tobytes()).hexdigest()

    def apply(self, embeddings: Float32) -> Float32:
        """R·h for each row, float32 [n, d] → float32 [n, d], the same bits in any company.

        Raises:
            UsageError: another width or dtype, or a value that is not finite.
        """
        check_array("the embeddings", embeddings, (None, self.width), np.float32)
        return exact_inner_products(embeddings, self.matrix).astype(np.float32)

    def to_bytes(self) -> bytes:
        """safetensors bytes with the one tensor ``rotation``."""
        return save_tensors({"rotation": self.matrix}, metadata={"format": "mbc-rotation/1"})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Rotation:
        """Read :meth:`to_bytes`.

        Raises:
            DamagedFile: not a rotation.
        """
        try:
            matrix = load_tensors(data)["rotation"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise DamagedFile(
                "the rotation cannot be read",
                value=where,
                cause=f"not a rotation in safetensors form ({error})",
                fix="restore the file from a copy of this release's weights",
            ) from error
        return cls(matrix)

    def save(self, path: Path) -> None:
        """Write :meth:`to_bytes` to ``path``."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Rotation:
        """Read a file of :meth:`save`.

        Raises:
            DamagedFile: not a rotation.
        """
        return cls.from_bytes(path.read_bytes(), str(path))


def to_slots(embeddings: Float32, rotation: Rotation, slots: int) -> Float32:
    """Slot vectors z = split(R·h).

    Args:
        embeddings: float32 [n, d].
        slots: T; divides d.

    Returns:
        float32 [n, T, d_c] with d_c = d / T.

    Raises:
        UsageError: T does not divide d, or the embeddings have another width or dtype.
    """
    if slots < 1 or rotation.width % slots:
        raise UsageError(
            "the number of slots does not divide the embedding's width",
            value=f"T = {slots}, width = {rotation.width}",
            cause="the profile belongs to another encoder",
            fix="choose T among the divisors of the width",
        )
    return rotation.apply(embeddings).reshape(len(embeddings), slots, rotation.width // slots)


def quantize(vectors: Float32, codewords: Float32) -> NDArray[np.uint16]:
    """Nearest codeword (Euclidean) of each slot vector; the lowest index wins a tie.

    Args:
        vectors: z, float32 [n, T, d_c].
        codewords: E, float32 [K, d_c].

    Returns:
        c, uint16 [n, T].

    Raises:
        UsageError: shapes or dtypes that do not fit, or a value that is not finite.
    """
    check_array("the codewords", codewords, (None, None), np.float32)
    check_array("the slot vectors", vectors, (None, None, codewords.shape[1]), np.float32)
    words, word_exponents = _fixed_point(codewords)
    word_scale = np.ldexp(1.0, word_exponents.T)
    half_norms = np.ldexp((words * words).sum(axis=1), 2 * word_exponents[:, 0] - 1)
    flat = vectors.reshape(-1, codewords.shape[1])
    codes = np.empty(len(flat), dtype=np.uint16)
    for start in range(0, len(flat), _BLOCK_VECTORS):
        integers, exponents = _fixed_point(flat[start : start + _BLOCK_VECTORS])
        scores = integers @ words.T  # exact; the rest is element by element, so blocks cannot change a bit
        scores *= word_scale
        scores *= np.ldexp(1.0, exponents)
        scores -= half_norms
        codes[start : start + _BLOCK_VECTORS] = scores.argmax(axis=1)
    return codes.reshape(vectors.shape[:2])


def code_size(slots: int, bits: int = CODE_BITS) -> int:
    """Bytes of one packed address: 14 for T = 12, 27 for T = 24."""
    return (slots * bits + 7) // 8


def pack(codes: NDArray[np.uint16], bits: int = CODE_BITS) -> NDArray[np.uint8]:
    """Pack codes as FAISS packs them: ``bits`` bits each, least significant bit first, no gaps between codes.

    Args:
        codes: uint16 [n, T], each below 2^bits.

    Returns:
        uint8 [n, code_size(T)].

    Raises:
        UsageError: another shape or dtype, or a code that does not fit.
    """
    check_array("the codes", codes, (None, None), np.uint16)
    if codes.size and int(codes.max()) >= 1 << bits:
        raise UsageError(
            f"a code does not fit into {bits} bits",
            value=int(codes.max()),
            cause="the codebook has more codewords than the packing allows",
            fix=f"use a codebook of at most {1 << bits} codewords",
        )
    as_bytes = np.ascontiguousarray(codes, dtype="<u2").view(np.uint8).reshape(*codes.shape, 2)
    flags = np.unpackbits(as_bytes, axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(flags.reshape(len(codes), codes.shape[1] * bits), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], slots: int, bits: int = CODE_BITS) -> NDArray[np.uint16]:
    """Inverse of :func:`pack`: uint8 [n, code_size(T)] → uint16 [n, T].

    Raises:
        UsageError: another shape or dtype.
    """
    check_array("the packed addresses", packed, (None, code_size(slots, bits)), np.uint8)
    flags = np.unpackbits(packed, axis=1, count=slots * bits, bitorder="little").reshape(len(packed), slots, bits)
    weights = (1 << np.arange(bits)).astype(np.uint16)
    return np.asarray((flags * weights).sum(axis=2, dtype=np.uint16))


def decode(codes: NDArray[np.uint16], codewords: Float32) -> Float32:
    """Codes [n, T] → the rotated embedding they stand for, float32 [n, T · d_c].

    Raises:
        UsageError: a code beyond the codebook.
    """
    check_array("the codes", codes, (None, None), np.uint16)
    if codes.size and int(codes.max()) >= len(codewords):
        raise UsageError(
            "a code lies beyond the codebook",
            value=int(codes.max()),
            cause=f"the codebook has {len(codewords)} codewords: the codes belong to another one",
            fix="read each row with the codebook version it names",
        )
    return np.asarray(codewords[codes].reshape(len(codes), codes.shape[1] * codewords.shape[1]), dtype=np.float32)


def length_credits(decoded: NDArray[Any]) -> Float64:
    """What a decoded address gains in score because it is shorter than the unit vector it stands for.

    A codeword is a mean, so x̂ is shorter than x, and the more so the worse x was quantized: its inner products all
    come out too small. β·(1 - |x̂|²) makes up for it. It is a sum over slots, so it costs a search nothing, and it is
    0 for an exact address.

    Args:
        decoded: x̂, [n, d].

    Returns:
        float64 [n].
    """
    exact = decoded.astype(np.float64)
    credits: Float64 = LENGTH_WEIGHT * (1.0 - (exact * exact).sum(axis=1))
    return credits
