"""Encoded passages on the local disk between the two passes over them: codebook-update first, then quantize.

The codebook of a window is known only when the windows before it have been read, so every embedding is needed twice.
A local run keeps a slice's embeddings in Parquet files of its staging folder; only file names and window names travel
through the runner, which would otherwise hold several copies of every vector in memory. Workers on other machines
see no common disk: there the embeddings go through the runner's own shuffle.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.records import EncodedBatch, WindowVectors, concat
from pipelines.staging import staging_errors

PCollection = beam.PCollection

_STATISTICS_COLUMNS = ["key", "passage", "embedding"]


@dataclass(frozen=True, slots=True)
class SpilledVectors:
    """The passages of one window in one spilled batch; stands for a :class:`~pipelines.records.WindowVectors`.

    Attributes:
        path: the Parquet file of the batch's passages. group: the row group that holds the window.
    """

    path: str
    group: int

    def load(self) -> WindowVectors:
        """Read the window's rows.

        Raises:
            StorageError: the staging folder cannot be read.
        """
        with staging_errors(Path(self.path)), pq.ParquetFile(self.path) as file:
            return WindowVectors(_one_batch(file.read_row_group(self.group, _STATISTICS_COLUMNS, use_threads=False)))


@dataclass(frozen=True, slots=True)
class SpilledBatch:
    """An :class:`~pipelines.records.EncodedBatch` on disk: ``<stem>.documents``, ``.passages`` and ``.replay``.

    Attributes:
        stem: start of the files' names.
        windows: name of the window in each row group of the passages; a batch's rows are grouped by window.
    """

    stem: str
    windows: tuple[str, ...]

    @classmethod
    def write(cls, folder: Path, batch: EncodedBatch) -> SpilledBatch:
        """Write a batch; equal batches share their files, so a retried bundle leaves nothing behind.

        Raises:
            StorageError: the staging folder is full or may not be written.
        """
        digest = hashlib.blake2b(batch.documents["key"].to_numpy().tobytes(), digest_size=16)
        stem = folder / f"spilled-{digest.hexdigest()}"
        groups = list(_by_window(batch.passages))
        with staging_errors(folder):
            _write(stem.with_suffix(".documents"), [batch.documents])
            _write(stem.with_suffix(".replay"), [batch.replay])
            _write(stem.with_suffix(".passages"), [rows for _, rows in groups] or [batch.passages])
        return cls(str(stem), tuple(name for name, _ in groups))

    def by_window(self) -> Iterator[tuple[str, SpilledVectors]]:
        """See :meth:`pipelines.records.EncodedBatch.by_window`; reads nothing."""
        for group, window in enumerate(self.windows):
            yield window, SpilledVectors(f"{self.stem}.passages", group)

    def load(self) -> EncodedBatch:
        """Read the batch; its passages come grouped by window.

        Raises:
            StorageError: the staging folder cannot be read.
        """
        parts = []
        for part in EncodedBatch.parts:
            path = f"{self.stem}.{part}"
            with staging_errors(Path(path)), pq.ParquetFile(path) as file:
                parts.append(_one_batch(file.read(use_threads=False)))
        return EncodedBatch(*parts)


class Spill(beam.PTransform):
    """Encoded batches → the same batches on disk. What follows sees one encoding of each, also after a retry.

    Args:
        folder: on a disk that every worker sees.

    Example:
        ``batches = encoded.batches | Spill(folder)``
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def expand(self, pcoll: PCollection[EncodedBatch]) -> PCollection[SpilledBatch]:
        """Write, then settle on the files' names."""
        written = pcoll | "WriteBatch" >> beam.ParDo(_SpillDoFn(self.folder)).with_output_types(SpilledBatch)
        return written | "SettleNames" >> beam.Reshuffle()


class _SpillDoFn(beam.DoFn):
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def process(self, element: EncodedBatch) -> Iterator[SpilledBatch]:
        yield SpilledBatch.write(Path(self._folder), element)


def _by_window(passages: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    windows = passages["window"].dictionary_encode()
    places = windows.indices.to_numpy(zero_copy_only=False)
    for number, name in enumerate(windows.dictionary.to_pylist()):
        yield name, passages.take(pa.array(np.flatnonzero(places == number)))


def _write(path: Path, groups: list[pa.RecordBatch]) -> None:
    """One row group a record batch; the file appears whole or not at all."""
    partial = path.with_name(f"{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with pq.ParquetWriter(partial, groups[0].schema, compression="none", use_dictionary=False) as out:
        for rows in groups:
            out.write_batch(rows, row_group_size=max(1, rows.num_rows))
    partial.replace(path)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return concat(batches) if batches else pa.RecordBatch.from_pylist([], table.schema)
