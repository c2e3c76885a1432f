"""Tables ↔ the bytes of one Parquet file: small, deterministic, checked by the digest in the file's name.

What makes a shard small: rows sorted so that neighbours resemble each other, an encoding chosen for each kind of
column (runs of equal values as dictionaries, keys and times as differences, fixed-length payloads without their
lengths), zstd, and no statistics for columns nobody filters by.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mbc_core.errors import DamagedFile, UsageError
from schemas.tables import SORT_ORDER, TABLES

DIGEST_CHARACTERS = 32
"""Hex characters of the sha256 that a file's name carries: 128 bits."""

_ZSTD_LEVEL = 19
_DICTIONARY = frozenset(
    {"passage", "added_at", "window", "codebook_version", "split", "reason", "ingest_id", "slice", "source", "pane"}
)
_STATISTICS = ("key", "added_at", "codebook_version", "window", "version")


def conform(table: str, rows: pa.Table) -> pa.Table:
    """Rows with exactly the columns and types of ``schemas.tables.TABLES[table]``, sorted as that table is kept.

    Raises:
        UsageError: a column is missing, unknown, has another type, or holds nulls where none may be.
    """
    schema = TABLES[table]
    if set(rows.column_names) != set(schema.names):
        raise UsageError(
            f"rows for the table `{table}` have missing or unknown columns",
            value=sorted(set(rows.column_names) ^ set(schema.names)),
            cause="they were not made from schemas.tables",
            fix=f"give exactly the columns {', '.join(schema.names)}",
        )
    for one in schema:
        if not one.nullable and rows[one.name].null_count:
            raise UsageError(
                f"the column `{one.name}` of the table `{table}` holds nulls",
                value=rows[one.name].null_count,
                cause="a required value was left out",
                fix="give every row a value",
            )
    try:
        rows = rows.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, ValueError, pa.ArrowNotImplementedError) as error:
        raise UsageError(
            f"rows for the table `{table}` have another type",
            value=[f"{one.name}: {one.type}" for one in rows.schema],
            cause=str(error),
            fix="build them with the schema in schemas.tables",
        ) from error
    if table == "documents":
        rows = _without_repeated_titles(rows)
    order = [(name, "ascending") for name in SORT_ORDER[table]]
    return rows.take(pc.sort_indices(rows, sort_keys=order)) if order else rows


def _without_repeated_titles(rows: pa.Table) -> pa.Table:
    """A title that only repeats the id is stored as null; readers show the id for a null title."""
    repeated = pc.fill_null(pc.equal(rows["title"], rows["doc_id"]), False)
    titles = pc.if_else(repeated, pa.scalar(None, pa.string()), rows["title"])
    return rows.set_column(rows.schema.get_field_index("title"), rows.schema.field("title"), titles)


def to_bytes(table: str, rows: pa.Table) -> bytes:
    """One Parquet file; equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    names = rows.schema.names
    pq.write_table(
        rows.combine_chunks(),
        sink,
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=[name for name in names if name in _DICTIONARY],
        column_encoding=_encodings(rows.schema),
        write_statistics=[name for name in names if name in _STATISTICS],
        row_group_size=max(1, rows.num_rows),
        data_page_size=8 << 20,
        store_schema=False,
    )
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes, where: str, columns: list[str] | None = None, *, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and give it ``schema`` (or the named ``columns`` of it).

    Raises:
        DamagedFile: not Parquet, cut short, or other columns.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    try:
        found = pq.read_table(pa.BufferReader(data), columns=wanted.names, use_threads=False)
        return found.select(wanted.names).cast(wanted)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DamagedFile(
            f"the bank's file {where} is not the Parquet it should be",
            cause=" ".join(str(error).split())[:200],
            fix="restore the file from a copy of the bank, or ingest its documents again into a new bank",
        ) from error


def digest(data: bytes) -> str:
    """The hex digest that names a file."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARACTERS]


def check_digest(data: bytes, expected: str, where: str) -> None:
    """Compare contents with the digest recorded for them (a prefix of the sha256 in hex).

    Raises:
        DamagedFile: they differ.
    """
    found = hashlib.sha256(data).hexdigest()[: len(expected)]
    if found != expected:
        raise DamagedFile(
            f"the bank's file {where} does not match its digest",
            cause=f"it was damaged or edited: {len(data)} bytes hash to {found[:12]}…, recorded is {expected[:12]}…",
            fix="restore the file from a copy of the bank; `mbc inspect --verify` lists every damaged file",
        )


def delta_statistics(rows: pa.Table) -> str:
    """Statistics of one file as a Delta log keeps them: rows, and the range of the columns people filter by."""
    low: dict[str, int | str] = {}
    high: dict[str, int | str] = {}
    for name in rows.column_names:
        if name in _STATISTICS and rows.num_rows:
            extremes = pc.min_max(rows[name])
            low[name], high[name] = _json_value(extremes["min"].as_py()), _json_value(extremes["max"].as_py())
    found = {"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": dict.fromkeys(low, 0)}
    return json.dumps(found, separators=(",", ":"))


def _json_value(value: int | str | datetime) -> int | str:
    return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(value, datetime) else value


def _encodings(schema: pa.Schema) -> dict[str, str]:
    chosen = {}
    for one in schema:
        if one.name in _DICTIONARY:
            continue
        if pa.types.is_integer(one.type) or pa.types.is_timestamp(one.type):
            chosen[one.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_binary(one.type) or pa.types.is_string(one.type):
            chosen[one.name] = "DELTA_LENGTH_BYTE_ARRAY"
    return chosen
