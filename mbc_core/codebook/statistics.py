"""What a batch of quantized vectors says about the codebook: sums with a zero and an addition.

Every sum is an integer, so any chunking, order, worker count or retry gives the same bytes (invariant 2).
Decay, division and reset happen later, once, in ``mbc_core.codebook.update``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook, Tensors, damaged, read_tensors, write_tensors
from mbc_core.codebook.samples import (
    FIXED_POINT,
    PROBES,
    SAMPLE_SIZE,
    Candidates,
    Int64,
    Probes,
    fixed_point,
    slot_hashes,
    sums_by_code,
)
from mbc_core.codes import Float32, check_array
from mbc_core.errors import UsageError

_FORMAT = "mbc-statistics/1"
_LARGEST_ELEMENT = 1024.0
_LARGEST_SUM = 1 << 62


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Sums over slot vectors that were quantized with one codebook version.

    Attributes:
        codebook_version: version the codes belong to.
        seed: seed of the candidates' hash.
        counts: int64 [K]: vectors of each code.
        sums: int64 [K, d_c]: their sum in units of 2^-28.
        vectors: number of slot vectors seen.
        error_sum: Σ ‖z − E_c‖² in units of 2^-28.
        energy_sum: Σ ‖z‖² in units of 2^-28.
        candidates: sample of the vectors, for resets.
        probes: sample of whole passages, to judge an update with.
    """

    codebook_version: int
    seed: int
    counts: Int64
    sums: Int64
    candidates: Candidates
    probes: Probes
    vectors: int = 0
    error_sum: int = 0
    energy_sum: int = 0

    @classmethod
    def zero(
        cls, size: int, width: int, codebook_version: int, seed: int = 0, *, sample_size: int = SAMPLE_SIZE
    ) -> BatchStatistics:
        """Statistics of nothing, for K = ``size`` codewords of d_c = ``width``."""
        nothing = Candidates(
            sample_size, np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, width), np.float32)
        )
        counts, sums = np.zeros(size, np.int64), np.zeros((size, width), np.int64)
        return cls(codebook_version, seed, counts, sums, nothing, Probes.none(PROBES, width))

    @classmethod
    def of(
        cls,
        codebook: Codebook,
        vectors: Float32,
        codes: NDArray[np.uint16],
        keys: Int64,
        passages: NDArray[np.int32],
        seed: int = 0,
        *,
        sample_size: int = SAMPLE_SIZE,
    ) -> BatchStatistics:
        """Statistics of one batch.

        Args:
            codebook: version that ``codes`` were quantized with.
            vectors: z, float32 [n, T, d_c], elements within ±1024.
            codes: c, uint16 [n, T].
            keys: int64 [n], keys of the documents.
            passages: int32 [n], passage numbers within the document.

        Raises:
            UsageError: shapes or dtypes that do not fit, a code beyond the codebook, or a huge vector.
        """
        check_array("the slot vectors", vectors, (None, None, codebook.width), np.float32)
        check_array("the codes", codes, vectors.shape[:2], np.uint16)
        check_array("the document keys", keys, (len(vectors),), np.int64)
        check_array("the passage numbers", passages, (len(vectors),), np.int32)
        flat, flat_codes = vectors.reshape(-1, codebook.width), codes.ravel().astype(np.int64)
        _require_small(flat)
        _require_known(flat_codes, codebook)
        hashes = slot_hashes(seed, vectors, keys, passages)
        return cls(
            codebook_version=codebook.version,
            seed=seed,
            counts=np.bincount(flat_codes, minlength=codebook.size).astype(np.int64),
            sums=sums_by_code(fixed_point(flat), flat_codes, codebook.size),
            candidates=Candidates.of(sample_size, hashes, vectors, keys),
            probes=Probes.of(PROBES, hashes, vectors, codes, keys),
            vectors=len(flat),
            error_sum=_squares(flat.astype(np.float64) - codebook.codewords[flat_codes]),
            energy_sum=_squares(flat.astype(np.float64)),
        )

    def __add__(self, other: BatchStatistics) -> BatchStatistics:
        """Statistics of both; associative and commutative to the byte.

        Raises:
            UsageError: made under another codebook version, seed, sample size or shape.
        """
        if self._kind() != other._kind():
            raise UsageError(
                "statistics of two kinds cannot be added",
                value=f"{self._kind()} + {other._kind()}",
                cause="codebook version, seed, sample size, K or d_c differ",
                fix="carry both to the head of the chain first (carried_to), and use one seed",
            )
        sums = self.sums + other.sums
        if np.abs(sums).max(initial=0) > _LARGEST_SUM:
            raise UsageError(
                "the statistics grew too large to be exact",
                value=self.vectors + other.vectors,
                cause="too many vectors were gathered without publishing a codebook version",
                fix="publish more often (a lower publication threshold), or migrate the bank",
            )
        return replace(
            self,
            counts=self.counts + other.counts,
            sums=sums,
            candidates=self.candidates + other.candidates,
            probes=self.probes + other.probes,
            vectors=self.vectors + other.vectors,
            error_sum=self.error_sum + other.error_sum,
            energy_sum=self.energy_sum + other.energy_sum,
        )

    def carried_to(self, head: Codebook) -> BatchStatistics:
        """The same statistics, fit to update ``head``: without codes that were reset since they were gathered.

        Such a code's vectors were near a codeword that no longer exists; they must not pull the new one.

        Raises:
            UsageError: gathered under a version newer than ``head``, or with another K or d_c.
        """
        if self.codebook_version > head.version or self.sums.shape != head.codewords.shape:
            raise UsageError(
                "statistics do not belong to this chain of codebooks",
                value=f"version {self.codebook_version}, {list(self.sums.shape)}",
                cause=f"the head is version {head.version}, {list(head.codewords.shape)}",
                fix="give the statistics to the bank they were gathered for",
            )
        stays = head.reset_at <= self.codebook_version
        return replace(
            self,
            codebook_version=head.version,
            counts=np.where(stays, self.counts, 0),
            sums=np.where(stays[:, None], self.sums, 0),
            probes=self.probes.forget_codes(~stays),
        )

    @property
    def sampled_documents(self) -> Int64:
        """Keys of the documents that vectors are kept of, ascending: int64 [m]."""
        return np.unique(np.concatenate([self.candidates.keys, self.probes.keys]))

    def without_documents(self, keys: Int64) -> BatchStatistics:
        """The same statistics with no vector of these documents (sums name no document and stay)."""
        return replace(self, candidates=self.candidates.without(keys), probes=self.probes.without(keys))

    def to_bytes(self) -> bytes:
        """safetensors bytes; equal statistics give equal bytes."""
        tensors: Tensors = {
            "counts": self.counts,
            "sums": self.sums,
            "candidate_hashes": self.candidates.hashes,
            "candidate_keys": self.candidates.keys,
            "candidate_vectors": self.candidates.vectors,
            "probe_hashes": self.probes.hashes,
            "probe_keys": self.probes.keys,
            "probe_vectors": self.probes.vectors,
            "probe_codes": self.probes.codes,
        }
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"sample_size": self.candidates.limit}
        return write_tensors(tensors, {"format": _FORMAT, **numbers})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> BatchStatistics:
        """Read :meth:`to_bytes`.

        Raises:
            DamagedFile: not statistics.
        """
        tensors, metadata = read_tensors(data, where, _FORMAT)
        try:
            candidates = Candidates(
                int(metadata["sample_size"]),
                tensors["candidate_hashes"],
                tensors["candidate_keys"],
                tensors["candidate_vectors"],
            )
            numbers = {name: int(metadata[name]) for name in _NUMBERS}
            sums = tensors["sums"]
            probes = Probes.none(PROBES, sums.shape[1])
            if "probe_hashes" in tensors:  # statistics of release 0.1.0 have none
                probes = Probes(PROBES, *(tensors[f"probe_{name}"] for name in ("hashes", "keys", "vectors", "codes")))
            found = cls(counts=tensors["counts"], sums=sums, candidates=candidates, probes=probes, **numbers)
            found._check()
            return found
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise damaged(where, error) from error

    def _kind(self) -> tuple[object, ...]:
        return self.codebook_version, self.seed, self.candidates.limit, self.sums.shape

    def _check(self) -> None:
        size, width = self.sums.shape
        kept = len(self.candidates.hashes)
        check_array("the counts", self.counts, (size,), np.int64)
        check_array("the sums", self.sums, (size, width), np.int64)
        check_array("the candidates' hashes", self.candidates.hashes, (kept,), np.uint64)
        check_array("the candidates' keys", self.candidates.keys, (kept,), np.int64)
        check_array("the candidates' vectors", self.candidates.vectors, (kept, width), np.float32)
        probes = len(self.probes)
        check_array("the probes' hashes", self.probes.hashes, (probes,), np.uint64)
        check_array("the probes' keys", self.probes.keys, (probes,), np.int64)
        check_array("the probes' vectors", self.probes.vectors, (probes, None, width), np.float32)
        check_array("the probes' codes", self.probes.codes, self.probes.vectors.shape[:2], np.uint16)


_NUMBERS = ("codebook_version", "seed", "vectors", "error_sum", "energy_sum")


def _squares(rows: NDArray[np.float64]) -> int:
    """Σ of squared elements in units of 2^-28, each rounded before the sum."""
    return int(np.rint(rows * rows * FIXED_POINT).astype(np.int64).sum())


def _require_small(rows: Float32) -> None:
    largest = np.abs(rows).max(initial=0.0)
    if not largest <= _LARGEST_ELEMENT:
        raise UsageError(
            "a slot vector is too large, or not finite",
            value=float(largest),
            cause=f"statistics are exact for elements within ±{_LARGEST_ELEMENT:.0f}",
            fix="use embeddings of unit length",
        )


def _require_known(codes: Int64, codebook: Codebook) -> None:
    if int(codes.max(initial=0)) >= codebook.size:
        raise UsageError(
            "a code lies beyond the codebook",
            value=int(codes.max()),
            cause=f"version {codebook.version} has {codebook.size} codewords: the codes belong to another codebook",
            fix="quantize with the version the statistics are gathered under",
        )
