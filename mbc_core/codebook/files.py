"""One immutable codebook version, and its file.

The bytes of a version depend on nothing but its contents: metadata travel as one JSON string with sorted keys,
because safetensors writes several metadata entries in random order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from mbc_core.codes import CODE_BITS, Float32, Float64, check_array
from mbc_core.errors import DamagedFile, UsageError

Tensors = dict[str, NDArray[Any]]

_METADATA_KEY = "mbc"
_FORMAT = "mbc-codebook/1"


@dataclass(frozen=True, eq=False)
class Codebook:
    """A codebook version. Never changed after it is registered: stored codes name it and mean what it says.

    Attributes:
        version: position in the chain; 0 is the one the bank was created with.
        parent: version it was updated from; None for version 0.
        codewords: E, float32 [K, d_c].
        count: N, float64 [K]: decayed number of vectors behind each codeword.
        sum: m, float64 [K, d_c]: decayed sum of those vectors; codeword = m / N.
        reset_at: int32 [K]: version that last reset each code; 0 when none did.
        built_from: windows whose vectors it was updated with, sorted; empty for version 0.
        last_window: newest of them, and of its ancestors'; None for version 0.
        vectors_seen: slot vectors taken in since version 0, by all versions up to this one.
    """

    version: int
    parent: int | None
    codewords: Float32
    count: Float64
    sum: Float64
    reset_at: NDArray[np.int32]
    built_from: tuple[str, ...] = ()
    last_window: str | None = None
    vectors_seen: int = 0

    def __post_init__(self) -> None:
        check_array("the codewords", self.codewords, (None, None), np.float32)
        size, width = self.codewords.shape
        if not 1 <= size <= 1 << CODE_BITS:
            raise UsageError(
                "the codebook has an unusable number of codewords",
                value=size,
                cause=f"a code has {CODE_BITS} bits on storage",
                fix=f"use between 1 and {1 << CODE_BITS} codewords",
            )
        check_array("the codebook's counts", self.count, (size,), np.float64)
        check_array("the codebook's sums", self.sum, (size, width), np.float64)
        check_array("the codebook's reset versions", self.reset_at, (size,), np.int32)
        numbers = np.column_stack([self.codewords, self.count, self.sum])
        impossible = np.flatnonzero(~np.isfinite(numbers).all(axis=1) | (self.count <= 0))
        if len(impossible):
            raise DamagedFile(
                f"codebook version {self.version} holds an impossible number",
                value=f"code {impossible[0]}, count {self.count[impossible[0]]}",
                cause="a count is not positive, or a number is not finite",
                fix="restore the codebook file from a copy",
            )

    @classmethod
    def first(cls, codewords: Float32, count: Float64) -> Codebook:
        """Version 0 from trained codewords [K, d_c] and the mass [K] behind each.

        Raises:
            UsageError: shapes or dtypes that do not fit.
        """
        check_array("the codewords", codewords, (None, None), np.float32)
        check_array("the codebook's counts", count, (len(codewords),), np.float64)
        return cls(
            version=0,
            parent=None,
            codewords=codewords,
            count=count,
            sum=codewords.astype(np.float64) * count[:, None],
            reset_at=np.zeros(len(codewords), dtype=np.int32),
        )

    @property
    def size(self) -> int:
        """K, the number of codewords."""
        return int(self.codewords.shape[0])

    @property
    def width(self) -> int:
        """d_c, the width of a codeword."""
        return int(self.codewords.shape[1])

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of :meth:`to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """safetensors bytes; equal codebooks give equal bytes."""
        metadata = {
            "format": _FORMAT,
            "version": self.version,
            "parent": self.parent,
            "built_from": list(self.built_from),
            "last_window": self.last_window,
            "vectors_seen": self.vectors_seen,
        }
        tensors: Tensors = {
            "codewords": self.codewords,
            "count": self.count,
            "sum": self.sum,
            "reset_at": self.reset_at,
        }
        return write_tensors(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, where: str, *, digest: str | None = None) -> Codebook:
        """Read :meth:`to_bytes`.

        Args:
            where: path, for the message.
            digest: sha256 (hex) that the bank recorded; compared when given.

        Raises:
            DamagedFile: another digest, format or layout.
        """
        found = hashlib.sha256(data).hexdigest()
        if digest is not None and found != digest:
            raise DamagedFile(
                f"the codebook file {where} does not match its digest",
                value=found,
                cause=f"the bank recorded {digest}: the file was cut short or overwritten",
                fix="restore the file from a copy; codes that name this version cannot be read without it",
            )
        tensors, metadata = read_tensors(data, where, _FORMAT)
        try:
            return cls(
                version=int(metadata["version"]),
                parent=None if metadata["parent"] is None else int(metadata["parent"]),
                codewords=tensors["codewords"],
                count=tensors["count"],
                sum=tensors["sum"],
                reset_at=tensors["reset_at"],
                built_from=tuple(metadata["built_from"]),
                last_window=metadata["last_window"],
                vectors_seen=int(metadata["vectors_seen"]),
            )
        except (KeyError, TypeError, UsageError) as error:
            raise damaged(where, error) from error


def write_tensors(tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    """Deterministic safetensors bytes: contiguous tensors, one metadata entry with sorted JSON."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save_tensors(contiguous, metadata={_METADATA_KEY: text})


def read_tensors(data: bytes, where: str, wanted_format: str) -> tuple[Tensors, dict[str, Any]]:
    """Inverse of :func:`write_tensors`.

    Raises:
        DamagedFile: not safetensors, no metadata, or another format.
    """
    try:
        tensors = load_tensors(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"][_METADATA_KEY])
        found = metadata["format"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise damaged(where, error) from error
    if found != wanted_format:
        raise DamagedFile(
            f"the file {where} has another format",
            value=found,
            cause=f"{wanted_format} is expected: the file belongs to another release or another part of the bank",
            fix="use the release that wrote it, or restore the right file",
        )
    return tensors, metadata


def damaged(where: str, error: Exception) -> DamagedFile:
    """The error for a file whose inside cannot be read."""
    return DamagedFile(
        f"the file {where} cannot be read",
        value=str(error),
        cause="it was cut short, overwritten or edited",
        fix="restore it from a copy",
    )
