"""Compaction: small files become shards, superseded revisions go after the history window, leftovers are swept.

No row changes: its codes keep their bytes and their codebook version. A table's files are replaced in one commit, so
a reader sees the old ones or the new ones. Codes go before documents: those that no code row joins are dropped then.
Replay goes first: questions that expired or fell out of their window's sample are dropped.
Killed at any moment and run again, it goes on from what it finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from mbc_core.bank import replay
from mbc_core.bank.codebooks import FOLDER, PENDING, drop_folded_statistics, version_rows
from mbc_core.bank.commit import settle_all
from mbc_core.bank.delta_log import clear_log, files_of
from mbc_core.bank.inspect import stored_bytes
from mbc_core.bank.rewrite import commit_after, lost_race, write_note
from mbc_core.bank.slices import COMPACTED, PreparedFile, write_rows
from mbc_core.bank.sweep import SAFE_AGE, delete_older, delete_what_holds
from mbc_core.bank.visible import revision_places
from mbc_core.errors import UsageError
from schemas.results import CompactResult, Stored

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

LEAST_ROWS = 5_000
"""A file with fewer rows is small: it is merged with others."""

SHARD_ROWS = 50_000
"""Rows of a shard, about."""

HISTORY = 30 * 86_400.0
"""Seconds for which superseded revisions are kept, for reading the bank as of then."""

MERGED_TABLES = ("replay", "codes", "documents", "dead_letter", "ledger")
"""In this order: superseded revisions take part in the sample of questions as long as codes hold them."""

_ROWS_AT_ONCE, _BYTES_AT_ONCE = 400_000, 128 << 20  # of one commit: what is held in memory
_ATTEMPTS = 12

Say = Callable[[str], None]
Dropped = Callable[[pa.Table], npt.NDArray[np.bool_]]


@dataclass
class _Work:
    """What was done: files merged, shards written, rows dropped by table."""

    merged: int = 0
    shards: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def compact(
    bank: Bank, *, history: float = HISTORY, safe_age: float = SAFE_AGE, say: Say | None = None
) -> CompactResult:
    """Merge, drop and sweep; other runs may read and write the bank meanwhile.

    Args:
        history: seconds. A revision that was superseded longer ago is dropped; reading the bank as of any moment
            since then gives the same rows as before (questions whose lifetime is over go at once).
        safe_age: seconds after which a file that nothing refers to, or an interrupted run's row, belongs to no run
            that is still going on. Less than a day only when nothing else writes to the bank.
        say: told what is being done.

    Returns:
        Files and bytes before and after, and what was done.

    Raises:
        UsageError: a negative time.
        StorageError: the store refused, or other writers came first every time; run it again.
    """
    if history < 0 or safe_age < 0:
        raise UsageError(
            "a time is negative",
            value=(history, safe_age),
            cause="history and safe age are lengths of time",
            fix="write them like 30d or 12h",
        )
    began, say = time.monotonic(), say or (lambda line: None)
    before, work = stored(bank), _Work()
    now = time.time_ns() // 1000
    limit = now - round(1e6 * max(history, safe_age))
    settle_all(bank)
    for table in MERGED_TABLES:
        say(f"merging {table}")
        _compact_table(bank, table, _drop_rule(bank, table, now - round(1e6 * history), limit), work)
    say("sweeping what nothing refers to")
    swept = _sweep(bank, safe_age)
    for table in MERGED_TABLES:
        clear_log(bank, table, delete_before=time.time() - safe_age, empty=False)
    return {
        "before": before,
        "after": stored(bank),
        "merged": work.merged,
        "shards": work.shards,
        "dropped": work.dropped,
        "swept": swept,
        "seconds": round(time.monotonic() - began, 3),
    }


def stored(bank: Bank) -> Stored:
    """Files and bytes on storage."""
    parts = stored_bytes(bank)
    return {"files": len(bank.storage.list()), "bytes": parts["total"], "parts": parts}


# ------------------------------------------------------------------------------------------------------ which rows go


def _drop_rule(bank: Bank, table: str, cutoff: int, limit: int) -> Callable[[], Dropped] | None:
    """What makes the mask of rows that go, from the bank as it is then; None where none ever goes.

    Args:
        cutoff, limit: microseconds: superseded at or before; added at or before by a run that was interrupted.
    """
    if table == "codes":
        return lambda: _in(superseded(bank.read("codes", ["key", "added_at"]), cutoff))
    if table == "documents":
        return lambda: _not_in(bank.read("codes", ["key", "added_at"]), limit)
    if table == "replay":
        return lambda: _of_replay(bank, cutoff, limit)
    if table == "dead_letter":
        return lambda: _not_in_ledger(bank.read("ledger", ["ingest_id", "added_at"]), limit)
    return None


def superseded(codes: pa.Table, cutoff: int) -> pa.Table:
    """The revisions (key, added_at) whose successor was added at or before ``cutoff`` (microseconds)."""
    pairs = codes.group_by(["key", "added_at"]).aggregate([]).sort_by([("key", "ascending"), ("added_at", "ascending")])
    keys, added = pairs["key"].to_numpy(), pairs["added_at"].cast(pa.int64()).to_numpy()
    gone = np.zeros(len(keys), bool)
    gone[:-1] = (keys[1:] == keys[:-1]) & (added[1:] <= cutoff)
    return pairs.filter(pa.array(gone))


def _in(pairs: pa.Table) -> Dropped:
    return lambda rows: revision_places(rows, pairs) >= 0


def _not_in(codes: pa.Table, limit: int) -> Dropped:
    """Rows of no revision that codes hold: superseded ones, and those of runs that died before their codes."""
    return lambda rows: (revision_places(rows, codes) < 0) & (_added(rows) <= limit)


def _of_replay(bank: Bank, cutoff: int, limit: int) -> Dropped:
    """Questions of revisions that go, and those that are not asked any more."""
    not_asked = replay.not_asked(bank, cutoff)
    codes = bank.read("codes", ["key", "added_at"])
    gone, orphaned = _in(superseded(codes, cutoff)), _not_in(codes, limit)
    return lambda rows: gone(rows) | orphaned(rows) | not_asked(rows)


def _not_in_ledger(ledger: pa.Table, limit: int) -> Dropped:
    known = set(zip(ledger["ingest_id"].to_pylist(), _added(ledger).tolist(), strict=True))

    def dropped(rows: pa.Table) -> npt.NDArray[np.bool_]:
        pairs = zip(rows["ingest_id"].to_pylist(), _added(rows).tolist(), strict=True)
        return np.array([pair not in known for pair in pairs], bool) & (_added(rows) <= limit)

    return dropped


def _added(rows: pa.Table) -> npt.NDArray[np.int64]:
    moments: npt.NDArray[np.int64] = rows["added_at"].cast(pa.int64()).to_numpy()
    return moments


# ------------------------------------------------------------------------------------------------------------- merging


@dataclass(frozen=True)
class _Step:
    """One commit to make: files of ``seen`` (path → bytes), their rows, and the rows that stay."""

    seen: DeltaTable
    files: dict[str, int]
    rows: list[pa.Table]
    kept: list[pa.Table]


def _compact_table(bank: Bank, table: str, rule: Callable[[], Dropped] | None, work: _Work) -> None:
    """Commit after commit until nothing is left to merge or drop."""
    lost, fresh = 0, set[str]()
    while lost < _ATTEMPTS:
        step = bank.steady(lambda: _next_step(bank, table, rule, fresh), table, "codes")
        if step is None:
            return
        shards = _write_shards(bank, table, pa.concat_tables(step.kept))
        note = write_note(bank, _counts_lost(step)) if table == "codes" else None
        if commit_after(bank, table, step.seen, shards, step.files):
            _count(work, table, step, len(shards))
            for path in step.files:
                bank.storage.delete(f"{table}/{path}")
            fresh.update(one.path for one in shards)
            lost = 0
            continue
        for path in [f"{table}/{one.path}" for one in shards] + ([note] if note else []):
            bank.storage.delete(path)
        lost += 1
        time.sleep(0.02 * 1.6**lost)
    raise lost_race(bank, table)


def _next_step(bank: Bank, table: str, rule: Callable[[], Dropped] | None, fresh: set[str]) -> _Step | None:
    """What to do next; ``fresh`` files were written just now and are left alone."""
    seen = bank.table(table)
    files = files_of(seen)
    dropped = None if rule is None else rule()
    chosen = _choose(bank, table, {path: size for path, size in files.items() if path not in fresh}, dropped)
    rows = [bank.read_file(table, path) for path in chosen]
    kept = [part if dropped is None else part.filter(pa.array(~dropped(part))) for part in rows]
    return _Step(seen, {path: files[path] for path in chosen}, rows, kept) if chosen else None


def _count(work: _Work, table: str, step: _Step, shards: int) -> None:
    work.merged, work.shards = work.merged + len(step.files), work.shards + shards
    gone = sum(part.num_rows for part in step.rows) - sum(part.num_rows for part in step.kept)
    work.dropped[table] = work.dropped.get(table, 0) + gone


def _choose(bank: Bank, table: str, files: Mapping[str, int], dropped: Dropped | None) -> list[str]:
    """Files (path → bytes) to replace in the next commit: small ones when there are two or more, and those with rows
    that go."""
    wanted = replay.COLUMNS if table == "replay" else ("key", "ingest_id", "added_at")
    columns = [name for name in wanted if name in _columns(table)]
    small, dirty, sizes = [], [], {}
    for path in sorted(files):
        rows = bank.read_file(table, path, columns)
        gone = 0 if dropped is None else int(dropped(rows).sum())
        sizes[path] = rows.num_rows
        if gone:
            dirty.append(path)
        elif rows.num_rows < LEAST_ROWS:
            small.append(path)
    if not dirty and len(small) < 2:
        return []
    chosen: list[str] = []
    many, heavy = 0, 0
    for path in dirty + small:
        many, heavy = many + sizes[path], heavy + files[path]
        if chosen and (many > _ROWS_AT_ONCE or heavy > _BYTES_AT_ONCE):
            break
        chosen.append(path)
    return chosen if len(chosen) > 1 or dirty else []


def _columns(table: str) -> Sequence[str]:
    from schemas.tables import TABLES

    return list(TABLES[table].names)


def _write_shards(bank: Bank, table: str, rows: pa.Table) -> list[PreparedFile]:
    """Rows as files of about ``SHARD_ROWS``: by ranges of the key, so that a document's rows stay together."""
    if not rows.num_rows:
        return []
    count = max(1, rows.num_rows // SHARD_ROWS)
    moment, newest = time.time_ns() // 1000, int(_added(rows).max())
    parts = [rows] if count == 1 or "key" not in rows.column_names else _by_key(rows, count)
    stems = (f"{COMPACTED}/{moment}-p0-t{newest}-s{number}" for number in range(len(parts)))
    return [write_rows(bank, table, part, stem) for part, stem in zip(parts, stems, strict=True)]


def _by_key(rows: pa.Table, count: int) -> list[pa.Table]:
    keys = rows["key"].fill_null(0).to_numpy()
    bounds = np.unique(np.sort(keys)[(np.arange(1, count) * len(keys)) // count])
    shard = np.searchsorted(bounds, keys, "right")
    parts = [rows.filter(pc.equal(pa.array(shard), pa.scalar(number))) for number in range(len(bounds) + 1)]
    return [part for part in parts if part.num_rows]


def _counts_lost(step: _Step) -> dict[int, int]:
    """``added_at`` → how many rows went."""
    lost: dict[int, int] = {}
    for sign, tables in ((1, step.rows), (-1, step.kept)):
        for rows in tables:
            stamps, counts = np.unique(_added(rows), return_counts=True)
            for stamp, count in zip(stamps.tolist(), counts.tolist(), strict=True):
                lost[stamp] = lost.get(stamp, 0) + sign * count
    return lost


# ------------------------------------------------------------------------------------------------------------ sweeping


def _sweep(bank: Bank, safe_age: float) -> int:
    """Delete, by name, what nothing refers to; returns how many files."""
    count = len(delete_older(bank, safe_age))
    stones = bank.tombstones()
    if len(stones):
        count += delete_what_holds(bank, stones, None, ())
    count += _drop_old_statistics(bank, safe_age)
    named = {row["file"] for row in version_rows(bank).values()}
    limit = time.time() - safe_age
    for one in bank.storage.list(FOLDER, temporary=True):
        if not one.path.startswith(f"{PENDING}/") and one.path not in named and one.modified <= limit:
            bank.storage.delete(one.path)
            count += 1
    return count


def _drop_old_statistics(bank: Bank, safe_age: float) -> int:
    """Statistics that a codebook has taken in, once no run can still want to take them in anew."""
    limit = time.time() - safe_age
    rows = [row for row in version_rows(bank).values() if row["added_at"].timestamp() <= limit]
    return drop_folded_statistics(bank, bank.codebook(rows[-1]["version"]).last_window) if rows else 0
