"""Slices: their names and moments, what they add to each table, and the files that hold it before any commit.

A *slice* is the unit of durability: a bounded share of one run (an *ingest*). Its files are named by it, and by the
digest of what they hold; :mod:`mbc_core.bank.commit` makes them count.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa

from mbc_core.bank import parquet
from mbc_core.errors import UsageError
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

PREPARATORY = ("replay", "documents", "dead_letter")
"""Tables committed before ``codes``, in this order."""

COMPACTED = "compacted"
"""Folder of the files that `mbc compact` makes, in the place of an ingest id."""

_NAME = re.compile(rf"(?!{COMPACTED}$)[A-Za-z0-9][A-Za-z0-9._-]{{0,79}}")
FILE_NAME = re.compile(
    r"(?P<ingest>[^/]+)/(?P<slice>.+)-p(?P<pane>\d+)-t(?P<added_at>\d+)-s(?P<shard>\d+)-(?P<digest>[0-9a-f]{32})\.parquet"
)
"""Path of a slice's file below its table's folder: :meth:`SliceId.stem` and the digest of what it holds."""


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """A file that is written but not yet committed.

    Attributes:
        path: relative to the table's folder.
        size: bytes. rows: rows. statistics: JSON, as a Delta log keeps them.
    """

    path: str
    size: int
    rows: int
    statistics: str


@dataclass(frozen=True, slots=True)
class SliceId:
    """Which slice, and the moment it is added: one ``added_at`` for all its rows ties its tables together.

    Attributes:
        ingest_id: 1-80 characters of A-Z a-z 0-9 . _ - (also a folder's name).
        name: of the slice (or window, in streams) within the ingest.
        pane: 0, or the number of the late pane.
        added_at: microseconds since the epoch, UTC.
    """

    ingest_id: str
    name: str
    pane: int
    added_at: int

    @classmethod
    def begin(cls, ingest_id: str, name: str, pane: int = 0) -> SliceId:
        """A slice added now."""
        return cls(check_ingest_id(ingest_id), name, pane, time.time_ns() // 1000)

    def stem(self, shard: int = 0) -> str:
        """Start of the names of its files, below a table's folder."""
        return f"{self.ingest_id}/{safe_name(self.name)}-p{self.pane}-t{self.added_at}-s{shard}"

    def app_id(self, table: str) -> str:
        """App id of its commit to ``table``. Preparatory tables may be committed again by a later attempt."""
        attempt = f"/{self.added_at}" if table in PREPARATORY else ""
        return f"{table}/{self.ingest_id}/{self.name}{attempt}"


Rows: TypeAlias = "pa.Table | Sequence[PreparedFile]"


@dataclass(frozen=True, slots=True)
class SliceRows:
    """What one slice adds: for each table its rows, or files that :func:`write_rows` has prepared.

    Rows follow ``schemas.tables``; their column ``added_at`` may be left out and is set to the slice's. Prepared
    files must have been written with the same :class:`SliceId` that is given to
    :func:`~mbc_core.bank.commit.commit_slice`. The ledger is always rows.
    """

    codes: Rows
    documents: Rows
    replay: Rows
    dead_letters: Rows
    ledger: pa.Table


def check_ingest_id(ingest_id: str) -> str:
    """The id, if it can name a folder.

    Raises:
        UsageError: empty, too long, other characters, or the name of the folder of compacted files.
    """
    if not _NAME.fullmatch(ingest_id):
        raise UsageError(
            "the ingest id cannot be used",
            value=ingest_id,
            cause="it names a folder: 1 to 80 letters, digits, '.', '_' and '-', beginning with a letter or digit,"
            f" and not `{COMPACTED}`",
            fix="choose a plain name such as nightly-2024-07-01",
        )
    return ingest_id


def safe_name(name: str) -> str:
    """``name`` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def ingest_of(path: str) -> str:
    """The ingest that wrote a file, from its path below the table's folder; empty for files of other origin."""
    return path.split("/", 1)[0] if "/" in path else ""


def begin_slice(bank: Bank, ingest_id: str, name: str, pane: int = 0) -> SliceId:
    """A slice added now, or just after the newest one when this machine's clock is behind: the newest revision of a
    document is the one added last, whatever the clocks say."""
    begun = SliceId.begin(ingest_id, name, pane)
    moments = [int(found["added_at"]) for path, _ in bank.files("codes") if (found := FILE_NAME.fullmatch(path))]
    return SliceId(ingest_id, name, pane, max(begun.added_at, 1 + max(moments, default=0)))


def write_rows(bank: Bank, table: str, rows: pa.Table, stem: str) -> PreparedFile:
    """Write ``rows`` as the new file ``<stem>-<digest>.parquet`` of ``table``; nothing reads it before a commit.

    Raises:
        UsageError: the rows do not follow the table's schema.
        StorageError: the store is full or may not be written.
    """
    rows = parquet.conform(table, rows)
    data = parquet.to_bytes(table, rows)
    path = f"{stem}-{parquet.digest(data)}.parquet"
    bank.storage.write_new(f"{table}/{path}", data)
    return PreparedFile(path, len(data), rows.num_rows, parquet.delta_statistics(rows))


def write_slice_rows(bank: Bank, table: str, rows: pa.Table, slice_id: SliceId, shard: int = 0) -> PreparedFile:
    """:func:`write_rows` for one shard of a slice: sets ``added_at`` and names the file by the slice."""
    return write_rows(bank, table, stamped(table, rows, slice_id.added_at), slice_id.stem(shard))


def stamped(table: str, rows: pa.Table, added_at: int) -> pa.Table:
    """``rows`` with their column ``added_at`` set (microseconds since the epoch)."""
    kept = rows.drop_columns(["added_at"]) if "added_at" in rows.column_names else rows
    field = TABLES[table].field("added_at")
    times = pa.array([added_at], field.type).take(pa.array([0] * rows.num_rows, pa.int32()))
    return kept.append_column(field, times)
