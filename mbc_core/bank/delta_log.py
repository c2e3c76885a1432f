"""The Delta log under each table of a bank: made once, loaded beside those who write, cut short.

A log cannot simply lose its old entries either: a writer that had loaded an old version would find the name of the
next one free, and its commit would be lost. So :func:`clear_log` leaves the names and takes out the contents, and
what stays stops readers: a protocol that no release knows. Whoever was reading meets an error, never half a table,
and reads again from the checkpoint.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from mbc_core.bank.storage import Storage, as_storage_error, is_refusal, may_pass, plain_cause
from mbc_core.errors import DamagedFile
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

LOADS = 6
"""How often a log is read that is being cut short meanwhile."""

_WORTH_A_CHECKPOINT = 20  # entries; a checkpoint is as large as that many
_STOP = '{"protocol":{"minReaderVersion":99,"minWriterVersion":99}}\n'
_ENTRY = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\..*parquet")


def create_table(storage: Storage, name: str, description: str) -> None:
    """Create a Delta table unless it is there; safe when others do the same at the same time."""
    where, options = storage.locate(name), storage.delta_options() or None
    try:
        if DeltaTable.is_deltatable(where, storage_options=options):
            return
        if storage.is_local:
            Path(where).mkdir(parents=True, exist_ok=True)
        DeltaTable.create(
            where,
            TABLES[name],
            mode="error",
            description=description or None,
            storage_options=options,
            # Without this, the loser of a race writes its description as version 1 over the winner's.
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except (DeltaError, OSError) as error:
        if not _is_table(where, options):
            raise as_storage_error(error, "create the table", where) from error


def _is_table(where: str, options: dict[str, str] | None) -> bool:
    try:
        return DeltaTable.is_deltatable(where, storage_options=options)
    except (DeltaError, OSError):
        return False


def _load_steadily(where: str, version: int | None, options: dict[str, str] | None) -> DeltaTable:
    """Load a table, again when its log was being cut short (`mbc forget`): the checkpoint then has it all."""
    for attempt in range(LOADS):
        try:
            return DeltaTable(where, version=version, storage_options=options)
        except (DeltaError, OSError) as error:
            if version is not None or isinstance(error, TableNotFoundError) or not may_pass(error):
                raise
            time.sleep(0.02 * 2**attempt)
    return DeltaTable(where, version=version, storage_options=options)


def load_table(storage: Storage, name: str, version: int | None = None) -> DeltaTable:
    """Load the table ``name`` of a bank, whatever its columns.

    Raises:
        DamagedFile: it is not there, or its log cannot be read.
        StorageError: the store refused.
    """
    where = storage.locate(name)
    try:
        return _load_steadily(where, version, storage.delta_options() or None)
    except TableNotFoundError as error:
        raise DamagedFile(
            f"the bank's table {where} is not there",
            cause="its folder or its _delta_log was removed",
            fix="restore it from a copy of the bank",
        ) from error
    except OSError as error:
        raise as_storage_error(error, "read the log of the table", where) from error
    except DeltaError as error:
        if is_refusal(error):
            raise as_storage_error(error, "read the log of the table", where) from error
        raise DamagedFile(
            f"the log of the bank's table {where} cannot be read",
            cause=plain_cause(error),
            fix="restore the files of its _delta_log from a copy of the bank",
        ) from error


def sorted_files(delta: DeltaTable) -> list[tuple[str, int]]:
    """(path, bytes) of every file that counts, sorted. Errors are deltalake's own, for :meth:`Bank.look` to judge."""
    return sorted(_added(delta))


def files_of(table: DeltaTable) -> dict[str, int]:
    """Path → bytes of every file that counts.

    Raises:
        StorageError: the log cannot be read.
    """
    try:
        return dict(_added(table))
    except DeltaError as error:
        raise as_storage_error(error, "read the log of", table.table_uri) from error


def _added(table: DeltaTable) -> list[tuple[str, int]]:
    """(path, bytes) of every file that counts, in the log's order."""
    actions = pa.table(table.get_add_actions(flatten=True))
    return list(zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True))


def clear_log(bank: Bank, table: str, *, delete_before: float = 0.0, empty: bool = True) -> int:
    """Write a checkpoint, and take the contents out of every older entry of the log but for its commit's facts.

    Args:
        empty: False keeps the contents of entries that are not deleted, and does nothing when few would be.
        delete_before: entries last written before this time (seconds since the epoch) are deleted. Give a time so
            long ago that no writer can still have that version loaded.

    Returns:
        How many entries were emptied or deleted.
    """
    folder = f"{table}/_delta_log"
    if not empty and sum(one.modified < delete_before for one in bank.storage.list(folder)) < _WORTH_A_CHECKPOINT:
        return 0
    loaded = bank.table(table)
    try:
        loaded.create_checkpoint()
    except (DeltaError, OSError) as error:
        raise as_storage_error(error, "write a checkpoint of", bank.storage.locate(table)) from error
    count = 0
    for one in bank.storage.list(folder):
        name = one.path.rsplit("/", 1)[-1]
        entry, checkpoint = _ENTRY.fullmatch(name), _CHECKPOINT.fullmatch(name)
        number = int((entry or checkpoint or ["", "-1"])[1])
        if not 0 <= number < loaded.version():
            continue
        if checkpoint or one.modified < delete_before:
            bank.storage.delete(one.path)
            count += 1
        elif empty:
            count += _empty_entry(bank, one.path)
    return count


def _empty_entry(bank: Bank, path: str) -> bool:
    """Keep of a log entry what names the run that made it; the files and their statistics go."""
    text = bank.storage.read_bytes(path).decode()
    facts = [line for line in text.splitlines(keepends=True) if "commitInfo" in json.loads(line)]
    emptied = "".join([*(line if line.endswith("\n") else line + "\n" for line in facts), _STOP])
    if emptied == text:
        return False
    bank.storage.replace(path, emptied.encode())
    return True
