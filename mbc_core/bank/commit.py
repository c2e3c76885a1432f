"""Writing a bank: new files first, then one Delta commit that makes them count, each commit exactly once.

The tables of a slice (:mod:`mbc_core.bank.slices`) are committed in the order replay, documents, dead_letter,
codes, ledger. Only ``codes`` makes a document visible: rows of the other tables count only when codes hold the
same (key, added_at), so what a crash leaves behind is never seen. Every commit carries an app id and a version in
the Delta log, which is asked before committing: a rerun skips what is done, whatever the moment of the crash.

The ledger rows of a slice are written as a file before codes are committed, and the commit of codes names that
file: if the run dies between the two commits, :func:`settle` finds it and commits it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from mbc_core.bank import parquet
from mbc_core.bank.slices import (
    COMPACTED,
    FILE_NAME,
    PREPARATORY,
    PreparedFile,
    Rows,
    SliceId,
    SliceRows,
    begin_slice,
    check_ingest_id,
    ingest_of,
    stamped,
    write_slice_rows,
)
from mbc_core.bank.storage import as_storage_error, may_pass
from mbc_core.errors import DamagedFile, StorageError, UsageError

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.bank.recheck import JudgedAt

_LEDGER_FILE = "mbc.ledger"
_ATTEMPTS = 8


class Overtaken(Exception):
    """Another run has made visible what this commit was going to add."""


def commit_files(
    bank: Bank,
    table: str,
    files: Sequence[PreparedFile],
    app_id: str,
    version: int = 0,
    metadata: dict[str, str] | None = None,
    overtaken: Callable[[DeltaTable], bool] | None = None,
) -> bool:
    """Make ``files`` part of ``table`` in one atomic commit, at most once for (app_id, version).

    Args:
        overtaken: looks at the table as it is just before the commit; True gives the commit up. The commit is made
            only if no other one came after that look; else it looks again.

    Returns:
        True when committed now; False when it had been committed before, by this process or another.

    Raises:
        Overtaken: ``overtaken`` said so; nothing was committed.
        DamagedFile: a file is missing or has another size than when it was prepared.
        StorageError: the log may not be written, or other writers won too often.
    """
    _check_present(bank, table, files)
    actions: list[AddAction | RemoveAction] = [
        AddAction(
            path=one.path,
            size=one.size,
            partition_values={},
            modification_time=time.time_ns() // 1_000_000,
            data_change=True,
            stats=one.statistics,
        )
        for one in files
    ]
    properties = CommitProperties(
        custom_metadata=metadata,
        app_transactions=[Transaction(app_id, version)],
        # deltalake would retry by itself behind commits that do not conflict in its eyes, without asking us again.
        max_commit_retries=None if overtaken is None else 0,
    )
    for attempt in range(_ATTEMPTS):
        try:
            delta = bank.table(table)
            if _is_committed(delta, app_id, version):
                return False
            if overtaken is not None and overtaken(delta):
                raise Overtaken
            delta.create_write_transaction(actions, "append", delta.schema(), commit_properties=properties)
            return True
        except (DeltaError, OSError) as error:
            # Another writer was faster, or the log was cut short under us (`mbc forget`). If it was this very commit,
            # the next look finds it; else try again.
            lost = isinstance(error, CommitFailedError)
            if not (lost or may_pass(error)) or (attempt == _ATTEMPTS - 1 and not lost):
                raise as_storage_error(error, "commit to the table", bank.storage.locate(table)) from error
            time.sleep(0.05 * 2**attempt)
    raise StorageError(
        f"other writers won the race for the table `{table}` every time",
        value=f"{_ATTEMPTS} attempts",
        cause="many runs write to this bank at the same moment",
        fix="run again (finished slices are skipped), with fewer writers at a time",
    )


def is_committed(bank: Bank, table: str, app_id: str, version: int = 0) -> bool:
    """Whether the commit (app_id, version) of ``table`` is done."""
    return bank.look(table, lambda delta: _is_committed(delta, app_id, version))


def commit_slice(
    bank: Bank,
    rows: SliceRows,
    ingest_id: str,
    slice_name: str,
    pane: int = 0,
    slice_id: SliceId | None = None,
    judged: JudgedAt | None = None,
) -> bool:
    """Add one slice to the bank, exactly once, whenever earlier attempts died.

    Args:
        bank: an open bank.
        rows: what to add. Given as rows, an interrupted earlier attempt with equal rows is continued.
        ingest_id, slice_name, pane: which slice.
        slice_id: the slice as begun before, when files were prepared under it; made here otherwise.
        judged: what the documents were judged against: what other runs have added since is judged again, and what
            has become a duplicate is left out and counted so. None: nothing is judged.

    Returns:
        True when this call made the slice visible; False when it was visible before.

    Raises:
        StorageError: the store refused, or other runs added the same documents every time.
    """
    from mbc_core.bank.recheck import Recheck, judged_again
    from mbc_core.bank.refuse import ForgottenWatch, drop_prepared, without_forgotten

    _check_ledger(rows.ledger, ingest_id, slice_name, pane)
    begun = slice_id or _continued(bank, rows, ingest_id, slice_name, pane)
    begun = begun or begin_slice(bank, ingest_id, slice_name, pane)
    if is_committed(bank, "codes", begun.app_id("codes"), pane):
        settle(bank, ingest_id)
        return False
    given, refused, again = rows, False, False
    for _ in range(_ATTEMPTS):
        if (kept := without_forgotten(bank, rows)) is not rows:
            rows, begun, refused = kept, begin_slice(bank, ingest_id, slice_name, pane), True
        watches: list[Watch] = [ForgottenWatch(bank, rows)]
        if judged is not None:
            watches.append(Recheck(bank, begun, rows, judged))
        try:
            won = _commit_once(bank, rows, begun, watches)
        except Overtaken:
            if judged is not None:
                rows, begun, judged = judged_again(bank, rows, begun)
            continue
        except DamagedFile:
            # `mbc forget` has deleted a file with a document of its own before it was committed: write it anew.
            if again or not all(isinstance(part, pa.Table) for part in (rows.codes, rows.documents, rows.replay)):
                raise
            again = True
            continue
        if refused:
            drop_prepared(bank, given, rows)
        return won
    raise StorageError(
        f"other runs added the documents of slice {slice_name} every time before it could be committed",
        value=f"{_ATTEMPTS} attempts",
        cause="many runs ingest the same documents at the same moment",
        fix="run again (finished slices are skipped), with fewer writers at a time",
    )


class Watch(Protocol):
    """Looks at a table just before a commit to it."""

    def overtaken(self, table: DeltaTable) -> bool:
        """Whether what was to be committed must be judged again first."""
        ...


def _commit_once(bank: Bank, rows: SliceRows, begun: SliceId, watches: Sequence[Watch]) -> bool:
    """One attempt. ``watches`` look before each commit to a table that can hold documents; the first one looks at
    what was forgotten, the others at what codes show."""
    for table, given in (("replay", rows.replay), ("documents", rows.documents), ("dead_letter", rows.dead_letters)):
        if files := _prepare(bank, table, given, begun):
            commit_files(bank, table, files, begun.app_id(table), begun.pane, None, watches[0].overtaken)
    codes = _prepare(bank, "codes", rows.codes, begun)
    ledger = write_slice_rows(bank, "ledger", rows.ledger, begun)
    named = {_LEDGER_FILE: ledger.path}

    def overtaken(table: DeltaTable) -> bool:
        return any(one.overtaken(table) for one in watches)

    won = commit_files(bank, "codes", codes, begun.app_id("codes"), begun.pane, named, overtaken)
    if won:
        commit_files(bank, "ledger", [ledger], begun.app_id("ledger"), begun.pane)
    else:
        settle(bank, begun.ingest_id)
    return won


def settle(bank: Bank, ingest_id: str) -> int:
    """Commit the ledger rows of slices whose codes were committed just before a crash.

    Returns:
        How many slices were settled.
    """
    in_log = {path for path, _ in bank.files("ledger")}
    waiting = [one.path.removeprefix("ledger/") for one in bank.storage.list(f"ledger/{check_ingest_id(ingest_id)}")]
    waiting = [path for path in waiting if path not in in_log and FILE_NAME.fullmatch(path)]
    if not waiting:
        return 0
    named = bank.look("codes", lambda delta: {entry.get(_LEDGER_FILE) for entry in delta.history()})
    settled = 0
    for path in waiting:
        if path in named:
            settled += _settle_file(bank, path)
    return settled


def settle_all(bank: Bank) -> int:
    """:func:`settle` for every ingest that left ledger files which no log names."""
    in_log = {path for path, _ in bank.files("ledger")}
    left = (one.path.removeprefix("ledger/") for one in bank.storage.list("ledger"))
    runs = {ingest_of(path) for path in left if path not in in_log}
    return sum(settle(bank, one) for one in sorted(runs - {"", COMPACTED, "_delta_log"}))


def finished_slices(bank: Bank, ingest_id: str) -> set[str]:
    """Names of the slices of this ingest that are wholly in the bank; settles what a crash left between two commits."""
    settle(bank, ingest_id)
    ledger = bank.read("ledger", ["ingest_id", "slice"])
    return {
        name
        for one, name in zip(ledger["ingest_id"].to_pylist(), ledger["slice"].to_pylist(), strict=True)
        if one == ingest_id
    }


def _check_ledger(ledger: pa.Table, ingest_id: str, name: str, pane: int) -> None:
    columns = (ledger[column].to_pylist() for column in ("ingest_id", "slice", "pane"))
    found = set(zip(*columns, strict=True))
    if found != {(ingest_id, name, pane)}:
        raise UsageError(
            "the ledger rows do not belong to the slice",
            value=sorted(found),
            cause=f"the slice is {(ingest_id, name, pane)}",
            fix="give one ledger row a window, at least one in all, with the slice's own names",
        )


def _settle_file(bank: Bank, path: str) -> int:
    rows = bank.read_file("ledger", path)
    size = bank.storage.size(f"ledger/{path}") or 0
    slice_id = SliceId(rows["ingest_id"][0].as_py(), rows["slice"][0].as_py(), rows["pane"][0].as_py(), 0)
    file = PreparedFile(path, size, rows.num_rows, parquet.delta_statistics(rows))
    return int(commit_files(bank, "ledger", [file], slice_id.app_id("ledger"), slice_id.pane))


def _prepare(bank: Bank, table: str, given: Rows, slice_id: SliceId) -> list[PreparedFile]:
    if not isinstance(given, pa.Table):
        return list(given)
    return [write_slice_rows(bank, table, given, slice_id)] if given.num_rows else []


def _continued(bank: Bank, rows: SliceRows, ingest_id: str, name: str, pane: int) -> SliceId | None:
    """The attempt that a crash cut short after its documents were committed, if it had exactly these rows.

    The name of a file is the digest of its rows, ``added_at`` among them: equal names mean equal rows.
    """
    if not isinstance(rows.documents, pa.Table):
        return None
    prefix = SliceId(check_ingest_id(ingest_id), name, pane, 0).stem().removesuffix("-t0-s0") + "-t"
    stored = {table: {path for path, _ in bank.files(table) if path.startswith(prefix)} for table in PREPARATORY}
    moments = {int(found["added_at"]) for path in set().union(*stored.values()) if (found := FILE_NAME.fullmatch(path))}
    for added_at in sorted(moments):
        slice_id = SliceId(ingest_id, name, pane, added_at)
        given = {"replay": rows.replay, "documents": rows.documents, "dead_letter": rows.dead_letters}
        if all(_same_file(bank, stored[table], table, given[table], slice_id) for table in PREPARATORY):
            return slice_id
    return None


def _same_file(bank: Bank, stored: set[str], table: str, rows: Rows, slice_id: SliceId) -> bool:
    """Whether nothing of this attempt was committed to ``table``, or exactly the file these rows make.

    What was committed and is not there under its name was compacted since, or partly forgotten.
    """
    mine = {path for path in stored if path.startswith(slice_id.stem())}
    if not mine:
        return not is_committed(bank, table, slice_id.app_id(table), slice_id.pane)
    if not isinstance(rows, pa.Table) or not rows.num_rows:
        return False
    data = parquet.to_bytes(table, parquet.conform(table, stamped(table, rows, slice_id.added_at)))
    return mine == {f"{slice_id.stem()}-{parquet.digest(data)}.parquet"}


def _check_present(bank: Bank, table: str, files: Sequence[PreparedFile]) -> None:
    for one in files:
        size = bank.storage.size(f"{table}/{one.path}")
        if size != one.size:
            raise DamagedFile(
                f"the prepared file {bank.storage.locate(f'{table}/{one.path}')} is not as it was written",
                cause="it is missing" if size is None else f"it has {size} bytes, written were {one.size}",
                fix="run the same command again: it writes the file anew and goes on from here",
            )


def _is_committed(delta: DeltaTable, app_id: str, version: int) -> bool:
    done = delta.transaction_version(app_id)
    return done is not None and done >= version
