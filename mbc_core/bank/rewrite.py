"""Replacing files of a table in one step, beside running ingests.

deltalake commits added and removed files together, so no reader ever sees a row twice or not at all. But when
another commit came between, its own retry looks at nothing: a file that is gone would be removed again and its rows
added twice. Hence :func:`commit_after`: exactly behind the version that was looked at, or not at all.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from mbc_core.bank.delta_log import files_of
from mbc_core.bank.slices import PreparedFile, write_rows
from mbc_core.bank.storage import as_storage_error, may_pass
from mbc_core.errors import StorageError

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

REMOVALS = "removals"
"""Folder of the notes that say how many rows of which slice were taken out, so that the ledger can be checked."""

_ATTEMPTS = 12


@dataclass
class Rewritten:
    """What :func:`rewrite_table` did.

    Attributes:
        rows: taken out. files: paths of the files that no longer count; nothing was deleted yet.
        version: of the table after the commit.
    """

    rows: int = 0
    files: list[str] = field(default_factory=list)
    version: int = 0


def commit_after(
    bank: Bank,
    table: str,
    seen: DeltaTable,
    added: Sequence[PreparedFile],
    removed: Mapping[str, int],
    metadata: dict[str, str] | None = None,
) -> bool:
    """Replace files in one commit right after the version ``seen``; without files it only takes the next version.

    Args:
        removed: path → bytes of files that count in ``seen``.

    Returns:
        False when another commit came first: look again.

    Raises:
        StorageError: the log may not be written.
    """
    now = time.time_ns() // 1_000_000
    actions: list[AddAction | RemoveAction] = [
        AddAction(one.path, one.size, {}, modification_time=now, data_change=False, stats=one.statistics)
        for one in added
    ]
    actions += [RemoveAction(path, False, now, size, {}) for path, size in removed.items()]
    properties = CommitProperties(custom_metadata=metadata, max_commit_retries=0)
    try:
        seen.create_write_transaction(actions, "append", seen.schema(), commit_properties=properties)
    except (DeltaError, OSError) as error:
        if isinstance(error, CommitFailedError) or may_pass(error):
            return _has_landed(bank, table, added, removed)
        raise as_storage_error(error, "commit to the table", bank.storage.locate(table)) from error
    return True


def _has_landed(bank: Bank, table: str, added: Sequence[PreparedFile], removed: Mapping[str, int]) -> bool:
    """Whether a commit that was answered with an error is in the log all the same: an answer may be lost on its way."""
    now = dict(bank.files(table))
    return bool(added or removed) and all(one.path in now for one in added) and not now.keys() & removed.keys()


def rewrite_table(
    bank: Bank, table: str, change: Callable[[pa.Table], pa.Table | None], *, counted: bool = False
) -> Rewritten:
    """Pass every file of a table through ``change`` and replace those that it changes, all in one commit.

    There is always a commit, also when nothing changes: whoever commits to the table after that has loaded it after
    this call began.

    Args:
        change: rows of one file → the rows that stay (perhaps none), or None when the file stays as it is.
        counted: leave a note of the rows taken out, for tables whose rows the ledger counts.
    """
    clean: set[str] = set()
    written: dict[str, tuple[PreparedFile | None, pa.Table]] = {}
    for attempt in range(_ATTEMPTS):
        seen, files = bank.steady(lambda: _pass(bank, table, change, clean, written), table)
        chosen = {path: written[path] for path in sorted(files.keys() & written.keys())}
        note = note_removed(bank, [(rows, file) for file, rows in chosen.values()]) if counted else None
        added = [file for file, _ in chosen.values() if file is not None]
        if commit_after(bank, table, seen, added, {path: files[path] for path in chosen}):
            gone = sum(rows.num_rows - (0 if file is None else file.rows) for file, rows in chosen.values())
            _drop_unused(bank, table, written, chosen.keys())
            return Rewritten(gone, list(chosen), seen.version() + 1)
        if note is not None:
            bank.storage.delete(note)
        time.sleep(0.02 * 1.6**attempt)
    raise lost_race(bank, table)


def _pass(
    bank: Bank,
    table: str,
    change: Callable[[pa.Table], pa.Table | None],
    clean: set[str],
    written: dict[str, tuple[PreparedFile | None, pa.Table]],
) -> tuple[DeltaTable, dict[str, int]]:
    """The table and its files, after those in neither ``clean`` nor ``written`` went through ``change``.

    One file at a time: of a table that is larger than memory only the changed files are held.
    """
    seen = bank.table(table)
    files = files_of(seen)
    for path in sorted(files.keys() - clean - written.keys()):
        rows = bank.read_file(table, path)
        kept = change(rows)
        if kept is None:
            clean.add(path)
        else:
            written[path] = write_rows(bank, table, kept, path.rsplit("-", 1)[0]) if kept.num_rows else None, rows
    return seen, files


def lost_race(bank: Bank, table: str) -> StorageError:
    """The error after the last attempt."""
    return StorageError(
        f"other writers won the race for the table {bank.storage.locate(table)} every time",
        value=f"{_ATTEMPTS} attempts",
        cause="many runs write to this bank at the same moment",
        fix="run the same command again: it goes on from here",
    )


def _drop_unused(
    bank: Bank, table: str, written: Mapping[str, tuple[PreparedFile | None, pa.Table]], used: object
) -> None:
    """Delete files that were written for an attempt which another commit made useless."""
    for path, (file, _) in written.items():
        if file is not None and path not in used:  # type: ignore[operator]
            bank.storage.delete(f"{table}/{file.path}")


# ------------------------------------------------------------------------------------------------- notes for the ledger


def note_removed(bank: Bank, changed: Sequence[tuple[pa.Table, PreparedFile | None]]) -> str | None:
    """Before a commit, note how many rows of each slice it takes out of ``codes``; returns the note's path, if any.

    A crash before the commit leaves a note that says too much: a check takes notes as upper bounds.
    """
    before: dict[int, int] = {}
    for rows, file in changed:
        stamps, counts = np.unique(rows["added_at"].cast(pa.int64()).to_numpy(), return_counts=True)
        for stamp, count in zip(stamps.tolist(), counts.tolist(), strict=True):
            before[stamp] = before.get(stamp, 0) + count
        if file is not None:
            kept = bank.read_file("codes", file.path, ["added_at"])["added_at"].cast(pa.int64()).to_numpy()
            for stamp, count in zip(*(part.tolist() for part in np.unique(kept, return_counts=True)), strict=True):
                before[stamp] -= count
    return write_note(bank, before)


def write_note(bank: Bank, removed: Mapping[int, int]) -> str | None:
    """Note that rows of ``codes`` go: ``added_at`` (microseconds) → how many."""
    removed = {stamp: count for stamp, count in removed.items() if count}
    if not removed:
        return None
    path = f"{REMOVALS}/{time.time_ns() // 1000}-{secrets.token_hex(4)}.json"
    told = {"codes": {str(stamp): count for stamp, count in sorted(removed.items())}}
    bank.storage.write_new(path, (json.dumps(told) + "\n").encode())
    return path


def removed_rows(bank: Bank) -> dict[int, int]:
    """``added_at`` (microseconds) → at most how many rows of ``codes`` of that slice were compacted or forgotten."""
    found: dict[int, int] = {}
    for one in bank.storage.list(REMOVALS):
        for stamp, count in json.loads(bank.storage.read_bytes(one.path))["codes"].items():
            found[int(stamp)] = found.get(int(stamp), 0) + count
    return found
