"""The bank as plain rows for DuckDB and friends: ids, decoded words, codes as numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbc_core.bank.storage import storage_errors
from mbc_core.bank.visible import binary_matrix
from mbc_core.codes import code_size, unpack
from mbc_core.errors import UsageError
from schemas.tables import TIME

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

EXPORT = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("passage", pa.int32(), nullable=False),
        pa.field("window", pa.string(), nullable=False),
        pa.field("event_time", TIME),
        pa.field("added_at", TIME, nullable=False),
        pa.field("words", pa.string(), nullable=False),
        pa.field("codes", pa.list_(pa.uint16()), nullable=False),
        pa.field("codebook_version", pa.int32(), nullable=False),
    ]
)
"""Columns of an export, one row a passage. ``words`` is empty for a profile without word codes."""

_BATCH = 8192


class WordDecoder(Protocol):
    """What turns word codes into text; :class:`mbc_core.lexicon.Lexicon` is one."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the lexicon."""

    def read(self, stored: bytes) -> str:
        """Text of the stored bytes."""


def export(
    bank: Bank,
    out: Path | BinaryIO,
    format: Literal["parquet", "jsonl"] = "parquet",
    lexicon: WordDecoder | None = None,
    as_of: int | None = None,
) -> int:
    """Write the newest revision of every passage, decoded.

    Args:
        out: a file to write (replaced when it is there), or an open binary stream.
        format: one Parquet file, or JSON Lines in UTF-8 with ISO 8601 times.
        lexicon: the bank's own; may be None only for a profile without word codes.
        as_of: microseconds since the epoch; None: now.

    Returns:
        Rows written.

    Raises:
        UsageError: another format, or a lexicon that is not the bank's.
        StorageError: ``out`` cannot be written.
    """
    if format not in ("parquet", "jsonl"):
        raise UsageError(
            "the export format is unknown",
            value=format,
            cause="an export is Parquet or JSON Lines",
            fix="use --format parquet or --format jsonl",
        )
    check_lexicon(bank, lexicon)
    write = _write_parquet if format == "parquet" else _write_jsonl
    batches = decoded_batches(bank, lexicon, as_of)
    with storage_errors("write", str(out) if isinstance(out, Path) else "the output"):
        if not isinstance(out, Path):
            return write(batches, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        try:
            with temporary.open("wb") as stream:
                rows = write(batches, stream)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
        return rows


def check_lexicon(bank: Bank, lexicon: WordDecoder | None) -> None:
    """Whether ``lexicon`` can read this bank's word codes.

    Raises:
        UsageError: it is another one, or is missing though the bank has word codes.
    """
    found = "" if lexicon is None else lexicon.digest
    if bank.manifest.words and found != bank.manifest.lexicon:
        raise UsageError(
            "the lexicon is not the one this bank was made with",
            value=found[:12] or None,
            cause=f"the bank's word codes belong to the lexicon {bank.manifest.lexicon[:12]}…",
            fix="use the release (or the weights) that made the bank",
        )


def decoded_batches(bank: Bank, lexicon: WordDecoder | None, as_of: int | None = None) -> Iterator[pa.Table]:
    """Tables of at most 8,192 rows with the schema :data:`EXPORT`, sorted by (key, passage)."""
    passages = bank.passages(as_of)
    for start in range(0, passages.num_rows, _BATCH):
        part = passages.slice(start, _BATCH)
        packed = binary_matrix(part["address"], code_size(bank.manifest.slots), "address")
        codes = unpack(packed, bank.manifest.slots)
        offsets = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
        columns = {name: part[name] for name in EXPORT.names if name in part.column_names}
        columns["words"] = pa.array([_words(payload, lexicon) for payload in part["words"].to_pylist()], pa.string())
        columns["codes"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.reshape(-1)))
        yield pa.table([columns[name] for name in EXPORT.names], names=EXPORT.names).cast(EXPORT)


def _words(payload: bytes, lexicon: WordDecoder | None) -> str:
    if lexicon is None or not payload:
        return ""
    return lexicon.read(payload)


def _write_parquet(batches: Iterator[pa.Table], stream: BinaryIO) -> int:
    rows = 0
    with pq.ParquetWriter(stream, EXPORT, compression="zstd") as writer:
        for batch in batches:
            writer.write_table(batch)
            rows += batch.num_rows
    return rows


def _write_jsonl(batches: Iterator[pa.Table], stream: BinaryIO) -> int:
    rows = 0
    for batch in batches:
        for row in batch.to_pylist():
            for name in ("event_time", "added_at"):
                row[name] = None if row[name] is None else row[name].isoformat().replace("+00:00", "Z")
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            rows += 1
    return rows
