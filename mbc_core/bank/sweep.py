"""Files that nothing refers to: what interrupted runs left behind, and what was replaced. Deleted by name only.

Files are listed before the logs are read: a file that was committed in between counts.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mbc_core.bank.codebooks import PENDING
from mbc_core.bank.delta_log import files_of
from mbc_core.bank.statistics_files import candidate_keys
from mbc_core.bank.storage import StoredFile
from mbc_core.errors import MbcError
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.bank.mentions import Mentions
    from mbc_core.bank.tombstones import Tombstones

SAFE_AGE = 24 * 3600.0
"""Seconds after which a file that nothing refers to cannot belong to a run that is still going on."""

_LOG = "/_delta_log/"
_LOG_FILE = re.compile(r".*/(\d{20}\.(json|checkpoint\..*)|_last_checkpoint)")
_OWNER = re.compile(r"\.tmp-(\d+)-")
_INDEX = "index"


def unreferenced(bank: Bank) -> list[StoredFile]:
    """Files of the tables, and waiting statistics, that no log and no ledger names; unfinished ones too."""
    listed = {table: bank.storage.list(table, temporary=True) for table in TABLES}
    waiting = bank.storage.list(PENDING, temporary=True)
    found = []
    for table, files in listed.items():
        counted = files_of(bank.table(table))
        found += [one for one in files if _LOG not in one.path and one.path.removeprefix(f"{table}/") not in counted]
        found += [one for one in files if _LOG in one.path and not _LOG_FILE.fullmatch(one.path)]
    named = set(bank.read("ledger", ["statistics"])["statistics"].to_pylist())
    return found + [one for one in waiting if one.path not in named]


def delete_older(bank: Bank, age: float) -> list[StoredFile]:
    """Delete what is :func:`unreferenced` and older than ``age`` seconds; returns what was deleted."""
    limit = time.time() - age
    old = [one for one in unreferenced(bank) if one.modified <= limit]
    for one in old:
        bank.storage.delete(one.path)
    return old


def delete_what_holds(
    bank: Bank, stones: Tombstones, mentions: Mentions | None, keys: Collection[int], replaced: Collection[str] = ()
) -> int:
    """Delete every file that no log names and that holds anything of a forgotten document, however young.

    A run that is going on and meant to commit such a file stops with an error, and its rerun leaves the document out.

    Args:
        stones: of the bank. mentions: finds ids in dead letters. keys: of the documents, as logs spell them.
        replaced: files that were taken out of the logs just now.

    Returns:
        How many files were deleted; index sidecars, which are made again when needed, among them.
    """
    gone = [one for one in unreferenced(bank) if one.path in replaced or _holds(bank, one, stones, mentions, keys)]
    gone += bank.storage.list(_INDEX, temporary=True)
    for one in gone:
        bank.storage.delete(one.path)
    return len(gone)


def _holds(bank: Bank, file: StoredFile, stones: Tombstones, mentions: Mentions | None, keys: Collection[int]) -> bool:
    try:
        if _LOG in file.path:
            text = bank.storage.read_bytes(file.path)
            return any(str(key).encode() in text for key in keys) or _is_abandoned(file)
        if file.path.startswith(f"{PENDING}/"):
            return bool(stones.forgotten(candidate_keys(bank, file.path)).any())
        rows = _rows(bank.storage.read_bytes(file.path))
    except (MbcError, pa.ArrowException, OSError, ValueError):
        # Half a file, or none any more: nobody can read it, but bytes of a document may be in it.
        return not file.is_temporary or _is_abandoned(file)
    if "key" in rows.column_names:
        known = rows["key"].drop_null().to_numpy().astype(np.int64)
        if stones.forgotten(known).any():
            return True
    return mentions is not None and "raw" in rows.column_names and any(_mentioned(rows, mentions))


def _mentioned(rows: pa.Table, mentions: Mentions) -> Iterator[bool]:
    for row in rows.select(["message", "source", "raw"]).to_pylist():
        yield bool(mentions.places(row))


def _rows(data: bytes) -> pa.Table:
    wanted = {"key", "message", "source", "raw"}
    names = [name for name in pq.read_schema(pa.BufferReader(data)).names if name in wanted]
    return pq.read_table(pa.BufferReader(data), columns=names, use_threads=False)


def _is_abandoned(file: StoredFile) -> bool:
    """Whether nobody is still writing an unfinished file: its process is gone, or it is an hour old."""
    owner = _OWNER.match(file.path.rsplit("/", 1)[-1])
    if file.modified <= time.time() - 3600:
        return True
    if owner is None:
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
