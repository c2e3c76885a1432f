"""Reads what ``mbc train prepare`` wrote: passages with words, salience scores and embeddings, and their questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mbc_core.errors import DamagedFile


@dataclass(frozen=True, eq=False)
class Prepared:
    """Passages and questions in memory; row numbers of questions point into the passages.

    Attributes:
        table: passage_id, source, text, words (list), scores (list), split; N rows.
        embeddings: float32 [N, d], unit norm.
        questions, answers: Q questions, each with one or more accepted answers.
        rows: int64 [Q], the passage that answers.
        question_embeddings: float32 [Q, d].
    """

    table: pa.Table
    embeddings: NDArray[np.float32]
    questions: list[str]
    answers: list[list[str]]
    rows: NDArray[np.int64]
    question_embeddings: NDArray[np.float32]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def sources(self) -> dict[str, int]:
        """Passages of each source, for cards."""
        names, counts = np.unique(np.array(self.table["source"].to_pylist(), dtype=object), return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def words_of(self, row: int) -> tuple[list[str], NDArray[np.float32]]:
        """Words of one passage in text order and their salience scores."""
        return self.table["words"][row].as_py(), np.array(self.table["scores"][row].as_py(), dtype=np.float32)

    def take(self, rows: NDArray[np.int64]) -> Prepared:
        """The passages ``rows`` and the questions that they answer."""
        place = np.full(len(self), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        kept = np.flatnonzero(place[self.rows] >= 0)
        return Prepared(
            self.table.take(pa.array(rows)),
            self.embeddings[rows],
            [self.questions[one] for one in kept],
            [self.answers[one] for one in kept],
            place[self.rows[kept]],
            self.question_embeddings[kept],
        )

    def split(self, name: str) -> Prepared:
        """The passages of one split (``train`` or ``dev``) and their questions."""
        splits = np.array(self.table["split"].to_pylist(), dtype=object)
        return self.take(np.flatnonzero(splits == name))


def load_prepared(folder: Path) -> Prepared:
    """Read ``passages.parquet``, ``embeddings.safetensors`` and ``questions.parquet`` of ``folder``.

    Raises:
        DamagedFile: a file is missing or cannot be read, or the counts do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        table = pq.read_table(folder / "passages.parquet", use_threads=True).combine_chunks()
        asked = pq.read_table(folder / "questions.parquet").combine_chunks()
        embeddings = load_file(folder / "embeddings.safetensors")["embeddings"].astype(np.float32)
        rows = asked["row"].to_numpy().astype(np.int64)
        question_embeddings = _matrix(asked["question_embedding"], embeddings.shape[1])
        questions, answers = asked["question"].to_pylist(), asked["answers"].to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowInvalid, SafetensorError) as error:
        raise DamagedFile(
            "the prepared training data cannot be read",
            value=str(folder),
            cause=f"{type(error).__name__}: {error}",
            fix="run `mbc train prepare` again",
        ) from error
    if len(embeddings) != table.num_rows or (len(rows) and not 0 <= rows.min() <= rows.max() < table.num_rows):
        raise DamagedFile(
            "the prepared files do not fit together",
            value=f"{table.num_rows} passages, {len(embeddings)} embeddings, rows up to {rows.max(initial=-1)}",
            cause="they come from different runs",
            fix="run `mbc train prepare` again",
        )
    return Prepared(table, _unit(embeddings), questions, answers, rows, _unit(question_embeddings))


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    """A column of lists of ``width`` halfs or floats → float32 [n, width]."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(-1, width)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit norm again after storage in half precision."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)
