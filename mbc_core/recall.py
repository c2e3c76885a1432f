"""Recall: find passages by their packed codes as they lie on storage, without decoding them.

score(q, doc) = Σ_t (R·q)_t · E[c_t] + β·(1 - |x̂|²) with x̂ = (E[c_1], …, E[c_T]): T table look-ups a passage, since
|x̂|² is a sum over slots too (:func:`mbc_core.codes.length_credits` says what the second term is for). It falls as
|q/2β - x̂|² grows, and FAISS's product quantizer finds the nearest x̂ without decoding one when all its T
sub-quantizers hold the one shared codebook E; it packs codes the way the bank does. The search is exhaustive:
10⁶ passages take some tens of milliseconds, so there is no approximate index yet. A query map
(:mod:`mbc_core.query_map`) changes what is asked and how lengths count, still slot by slot.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import (
    CODE_BITS,
    LENGTH_WEIGHT,
    Float32,
    Float64,
    Rotation,
    check_array,
    code_size,
    decode,
    length_credits,
    to_slots,
    unpack,
)
from mbc_core.errors import UsageError
from mbc_core.query_map import QueryMap

ENGINES = ("auto", "faiss", "exact")

_TIE_MARGIN = 8
_BLOCK_ROWS = 1 << 14
_BLOCK_QUESTIONS = 1 << 10

Int64 = NDArray[np.int64]
Found = tuple[Float32, Int64]
Part = tuple[Codebook, NDArray[np.uint8], Int64]
"""(codebook version, packed addresses uint8 [n, code_size(T)], row ids int64 [n]) of the rows that name it."""


class _Engine(Protocol):
    """Search among the codes of one codebook version; positions count from 0."""

    def __len__(self) -> int: ...

    def search(self, question_slots: Float32, k: int) -> Found:
        """Best ``k`` ≤ len(self) positions of each question [q, T, d_c], best first, ties in any order."""
        ...


class RecallIndex:
    """Exhaustive search over packed codes of any number of codebook versions.

    Scores of different versions are comparable: each estimates the cosine of question and passage.
    Ties are broken by the smaller row id, so equal banks give equal answers.
    """

    def __init__(
        self,
        engines: Sequence[_Engine],
        rows: Sequence[Int64],
        rotation: Rotation,
        slots: int,
        query_map: QueryMap | None = None,
    ) -> None:
        self._engines, self._rows = list(engines), list(rows)
        self._rotation, self._slots, self._map = rotation, slots, query_map

    @classmethod
    def build(
        cls,
        parts: Sequence[Part],
        rotation: Rotation,
        slots: int,
        *,
        engine: str = "auto",
        query_map: QueryMap | None = None,
    ) -> RecallIndex:
        """Index the rows of ``parts``, grouped by codebook version.

        Args:
            slots: T.
            engine: ``faiss``, ``exact`` (NumPy, same results, slower), or ``auto``: FAISS where it is installed,
                except on macOS, where FAISS and PyTorch bring two OpenMP libraries and crash together.
            query_map: made for this rotation and T; None: the plain score.

        Raises:
            UsageError: shapes, dtypes or codebooks that do not fit, or a row id given twice.
            IncompatibleBank: the map belongs to another rotation or T.
        """
        make = _FaissEngine if _choose(engine) == "faiss" else _ExactEngine
        if query_map is not None:
            query_map.require(rotation, slots)
        weights = None if query_map is None else query_map.slot_weights(slots)
        engines, rows = [], []
        for codebook, packed, ids in parts:
            check_array("the packed addresses", packed, (None, code_size(slots)), np.uint8)
            check_array("the row ids", ids, (len(packed),), np.int64)
            _require_codebook(codebook, rotation, slots)
            if len(packed):
                _require_known(packed, slots, codebook)
                engines.append(make(codebook.codewords, packed, slots, weights))
                rows.append(ids)
        everything = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        if len(np.unique(everything)) != len(everything):
            raise UsageError(
                "a row id is given twice",
                value=len(everything) - len(np.unique(everything)),
                cause="a passage was added under two codebook versions",
                fix="give each live row once, with the version it names",
            )
        return cls(engines, rows, rotation, slots, query_map)

    @property
    def rotation(self) -> Rotation:
        """R, which the codes were made with."""
        return self._rotation

    def __len__(self) -> int:
        return sum(len(engine) for engine in self._engines)

    def search(self, questions: Float32, k: int) -> Found:
        """The ``k`` best rows of each question.

        Args:
            questions: embeddings, float32 [q, d], not rotated.
            k: at least 1.

        Returns:
            (scores float32 [q, k'], row ids int64 [q, k']) with k' = min(k, rows), best first. There are no
            placeholder rows.

        Raises:
            UsageError: a wrong shape or dtype, or k below 1.
        """
        if k < 1:
            raise UsageError("k is below 1", value=k, cause="at least one passage is recalled", fix="use a k such as 5")
        asked = to_slots(questions, self._rotation, self._slots)
        if self._map is not None:
            asked = self._map.apply(asked)
        columns = min(k, len(self))
        scores, rows = np.zeros((len(asked), columns), np.float32), np.zeros((len(asked), columns), np.int64)
        for start in range(0, len(asked), _BLOCK_QUESTIONS):
            part = slice(start, start + _BLOCK_QUESTIONS)
            scores[part], rows[part] = self._search(asked[part], k)
        if self._map is not None:
            scores += np.float32(self._map.offset)
        return scores, rows

    def _search(self, question_slots: Float32, k: int) -> Found:
        scores, rows = _nothing(len(question_slots))
        for engine, ids in zip(self._engines, self._rows, strict=True):
            found, positions = _with_all_ties(engine, question_slots, k)
            scores, rows = _best(np.hstack([scores, found]), np.hstack([rows, ids[positions]]), k)
        return scores, rows


def exhaustive_scores(questions: Float32, rotation: Rotation, codes: NDArray[np.uint16], codewords: Float32) -> Float64:
    """The plain float64 computation over decoded codes that every other search must equal: [q, n]."""
    rotated = questions.astype(np.float64) @ rotation.matrix.astype(np.float64).T
    decoded = decode(codes, codewords)
    scores: Float64 = rotated @ decoded.astype(np.float64).T + length_credits(decoded)
    return scores


class _FaissEngine:
    """FAISS ``IndexPQ`` whose sub-quantizers all hold E; it keeps the packed bytes and never decodes them.

    With length weights u the sub-quantizer of slot t holds E·√u_t, and the question is divided by √u_t.
    """

    def __init__(
        self, codewords: Float32, packed: NDArray[np.uint8], slots: int, weights: Float32 | None = None
    ) -> None:
        import faiss

        size, width = codewords.shape
        self._roots = np.ones((slots, width), np.float32) if weights is None else np.sqrt(weights)
        full = np.zeros((slots, 1 << CODE_BITS, width), dtype=np.float32)
        full[:, :size] = codewords * self._roots[:, None]
        index = faiss.IndexPQ(slots * width, slots, CODE_BITS, faiss.METRIC_L2)
        faiss.copy_array_to_vector(full.ravel(), index.pq.centroids)
        index.is_trained = True
        index.add_sa_codes(np.ascontiguousarray(packed))
        self.index: Any = index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, question_slots: Float32, k: int) -> Found:
        """See :class:`_Engine`."""
        flat = (question_slots / self._roots).reshape(len(question_slots), -1)
        distances, positions = self.index.search(np.ascontiguousarray(flat * np.float32(0.5 / LENGTH_WEIGHT)), k)
        # |q/2β - x̂|² = |q|²/4β² - (q·x̂ - β|x̂|²)/β, where q is q/√u and x̂ is x̂·√u
        best = (flat.astype(np.float64) ** 2).sum(axis=1, keepdims=True) / (4 * LENGTH_WEIGHT) + LENGTH_WEIGHT
        return (best - LENGTH_WEIGHT * distances).astype(np.float32), positions


class _ExactEngine:
    """The same look-ups in NumPy, for machines without FAISS."""

    def __init__(
        self, codewords: Float32, packed: NDArray[np.uint8], slots: int, weights: Float32 | None = None
    ) -> None:
        self._codewords, self._packed, self._slots = codewords, packed, slots
        squares = codewords.astype(np.float64) ** 2
        # Summed over the T slots this makes β·(1 - |x̂|²): [1 or T, K].
        lengths = squares.sum(axis=1)[None] if weights is None else weights.astype(np.float64) @ squares.T
        self._credit = (LENGTH_WEIGHT * (1 / slots - lengths)).astype(np.float32)

    def __len__(self) -> int:
        return len(self._packed)

    def search(self, question_slots: Float32, k: int) -> Found:
        """See :class:`_Engine`."""
        tables = np.einsum("qtd,kd->tqk", question_slots, self._codewords) + self._credit[:, None]
        scores, rows = _nothing(len(question_slots))
        for start in range(0, len(self), _BLOCK_ROWS):
            codes = unpack(self._packed[start : start + _BLOCK_ROWS], self._slots)
            block = np.zeros((len(question_slots), len(codes)), np.float32)
            for table, column in zip(tables, codes.T, strict=True):
                block += table[:, column]
            ids = np.broadcast_to(np.arange(start, start + len(codes)), block.shape)
            scores, rows = _best(np.hstack([scores, block]), np.hstack([rows, ids]), k)
        return scores, rows


def _with_all_ties(engine: _Engine, question_slots: Float32, k: int) -> Found:
    """At least the best ``k``, and everything that ties with the last of them, so that a tie can be broken by id."""
    wanted = min(k + _TIE_MARGIN, len(engine))
    while True:
        scores, positions = engine.search(question_slots, wanted)
        tie_goes_on = wanted > k and bool((scores[:, -1] == scores[:, k - 1]).any())
        if wanted == len(engine) or not tie_goes_on:
            return scores, positions
        wanted = min(2 * wanted, len(engine))


def _best(scores: Float32, rows: Int64, k: int) -> Found:
    """Columns [q, m] → the best ``k``, by score, then by the smaller row id."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _nothing(questions: int) -> Found:
    return np.zeros((questions, 0), np.float32), np.zeros((questions, 0), np.int64)


def _choose(engine: str) -> str:
    if engine not in ENGINES:
        raise UsageError(
            "there is no such search engine",
            value=engine,
            cause="the name is misspelt",
            fix=f"use one of {', '.join(ENGINES)}",
        )
    installed = importlib.util.find_spec("faiss") is not None
    if engine == "faiss" and not installed:
        raise UsageError(
            "FAISS is not installed",
            value=engine,
            cause="this environment lacks the package faiss-cpu",
            fix="install faiss-cpu, or use the engine `exact`",
        )
    if engine == "auto":
        return "faiss" if installed and sys.platform != "darwin" else "exact"
    return engine


def _require_codebook(codebook: Codebook, rotation: Rotation, slots: int) -> None:
    if codebook.width * slots != rotation.width:
        raise UsageError(
            "the codebook does not fit the rotation",
            value=f"T · d_c = {slots} · {codebook.width}, rotation {rotation.width}",
            cause="the codebook belongs to another T or another encoder",
            fix="use the bank's own codebook and rotation",
        )


def _require_known(packed: NDArray[np.uint8], slots: int, codebook: Codebook) -> None:
    """A code beyond a small codebook would silently score 0; all 512 values are known to a full one."""
    if codebook.size < 1 << CODE_BITS and int(unpack(packed, slots).max()) >= codebook.size:
        raise UsageError(
            "a stored code lies beyond its codebook",
            value=int(unpack(packed, slots).max()),
            cause=f"codebook version {codebook.version} has {codebook.size} codewords",
            fix="read each row with the codebook version it names",
        )
