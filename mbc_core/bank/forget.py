"""Forgetting documents: out of every table, every file and every readable old version, so that none comes back.

In this order, each step safe to repeat, so that a run that was killed is finished by the same command:

1. tombstones are written: whoever commits from now on takes these documents out;
2. each table is rewritten without them, with a commit in any case: whoever commits after it has seen the tombstones;
3. samples of vectors that wait for a codebook are written again without theirs;
4. files that no log names any more are searched, and those that hold anything of theirs are deleted, by name;
5. the logs of the tables are emptied up to a checkpoint, since their statistics and old versions name what was there;
6. the receipt is written; a tombstone file without one belongs to a run that was interrupted.

Codes go first: whatever codes show, documents still hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.bank.codebooks import PENDING, version_rows
from mbc_core.bank.commit import settle_all
from mbc_core.bank.delta_log import clear_log
from mbc_core.bank.mentions import Mentions
from mbc_core.bank.refuse import has_key, letter_keys, redacted
from mbc_core.bank.rewrite import Rewritten, rewrite_table
from mbc_core.bank.statistics_files import candidate_keys, without_candidates
from mbc_core.bank.sweep import delete_what_holds
from mbc_core.bank.tombstones import (
    FOLDER,
    Tombstones,
    load_tombstones,
    read_tombstones,
    tombstone_files,
    tombstone_of,
    write_tombstones,
)
from mbc_core.errors import MbcError, UsageError
from schemas.document import MAX_ID_BYTES, document_key
from schemas.results import ForgetResult

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

RECEIPTS = "receipts"
TABLES_WITH_KEYS = ("codes", "documents", "replay", "dead_letter")
_CLEARED = (*TABLES_WITH_KEYS, "ledger")

Say = Callable[[str], None]


def forget(bank: Bank, doc_ids: Iterable[str], say: Say | None = None) -> ForgetResult:
    """Remove documents from the bank for good, and refuse them from now on.

    Args:
        bank: opened; other runs may read and write it meanwhile.
        doc_ids: ids as they were ingested. Those that the bank does not hold are refused from now on all the same.
        say: told what is being done.

    Returns:
        ``forgotten`` and ``not_found`` (documents), and the path of the ``receipt``.

    Raises:
        UsageError: no ids, or one that no document can have.
        StorageError: the store refused; run the same command again.
    """
    say = say or (lambda line: None)
    wanted = _Wanted.of(bank, doc_ids)
    from mbc_core.canary import without_forgotten

    say(f"looking for {len(wanted.ids):,} documents")
    order = _order(bank, wanted)
    done = _Done()
    for table in TABLES_WITH_KEYS:
        say(f"rewriting {table}")
        done.add(table, _take_out(bank, table, wanted))
    settle_all(bank)
    if rows := without_forgotten(bank, wanted.stones):
        done.rows["canary"] = rows
    say("searching what waits for the next codebook, and files left over")
    done.add("statistics", _clean_statistics(bank, wanted.stones))
    done.files = delete_what_holds(bank, wanted.stones, wanted.mentions, wanted.keys.tolist(), done.replaced)
    for table in _CLEARED:
        say(f"emptying the log of {table}")
        clear_log(bank, table)
    return _finish(bank, order, done)


def unfinished(bank: Bank) -> list[str]:
    """Files of tombstones whose run was interrupted: the same command must be run again."""
    receipts = {one.path for one in bank.storage.list(RECEIPTS)}
    return [path for path in tombstone_files(bank) if receipt_of(path) not in receipts]


def receipt_of(path: str) -> str:
    """Where the receipt of a file of tombstones is."""
    return f"{RECEIPTS}/{path.removeprefix(f'{FOLDER}/').removesuffix('.parquet')}.json"


# -------------------------------------------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class _Wanted:
    """The ids, and how to recognise what belongs to them.

    Attributes:
        ids: distinct. keys: theirs. stones: all that the bank has, with those of these ids.
        mentions: finds the ids in raw bytes.
    """

    ids: tuple[str, ...]
    keys: npt.NDArray[np.int64]
    stones: Tombstones
    mentions: Mentions

    @classmethod
    def of(cls, bank: Bank, doc_ids: Iterable[str]) -> _Wanted:
        ids = tuple(dict.fromkeys(doc_ids))
        _require_ids(ids)
        salt = bank.manifest.salt
        keys = np.array([document_key(one, salt) for one in ids], np.int64)
        known = load_tombstones(bank)
        mine = {tombstone_of(int(key), salt) for key in keys}
        return cls(ids, keys, Tombstones(salt, known.hashes | mine), Mentions(ids))

    def tombstones(self) -> list[bytes]:
        """One an id, in order."""
        return [tombstone_of(int(key), self.stones.salt) for key in self.keys]


@dataclass(frozen=True)
class _Order:
    """What this run is answerable for.

    Attributes:
        path: its file of tombstones. new: tombstone → since when the document was there (None: it was not);
            without those that an earlier run has finished.
        finished: an earlier run's receipt covers all of it. asked: how many ids were given.
    """

    asked: int
    path: str
    new: dict[bytes, int | None]
    finished: bool


def _order(bank: Bank, wanted: _Wanted) -> _Order:
    """Write the tombstones, or take up those of an interrupted run."""
    open_files = set(unfinished(bank))
    before: dict[bytes, int | None] = {}
    earlier: dict[bytes, str] = {}
    for path in tombstone_files(bank):
        for tombstone, since in read_tombstones(bank, path).items():
            if path in open_files:
                before[tombstone] = since
            else:
                earlier[tombstone] = path
    present = _present_since(bank, wanted)
    new: dict[bytes, int | None] = {}
    for tombstone, since in zip(wanted.tombstones(), present, strict=True):
        moments = [one for one in (since, before.get(tombstone)) if one is not None]
        if moments or tombstone not in earlier:
            new[tombstone] = min(moments, default=None)
    if not new:
        return _Order(len(wanted.ids), max(earlier[one] for one in wanted.tombstones()), {}, True)
    same = [path for path in open_files if read_tombstones(bank, path) == new]
    path = same[0] if same else write_tombstones(bank, new.items(), time.time_ns() // 1000)
    for old in open_files - {path}:
        if read_tombstones(bank, old).keys() <= new.keys():
            bank.storage.delete(old)
    return _Order(len(wanted.ids), path, new, False)


def _present_since(bank: Bank, wanted: _Wanted) -> list[int | None]:
    """For each id the moment at which anything of it was added first; None when the bank holds nothing."""
    first: dict[int, int] = {}
    for table in ("codes", "documents", "replay"):
        rows = bank.read(table, ["key", "added_at"])
        keys, added = rows["key"].to_numpy(), rows["added_at"].cast(pa.int64()).to_numpy()
        mine = np.isin(keys, wanted.keys)
        for key, moment in zip(keys[mine].tolist(), added[mine].tolist(), strict=True):
            first[key] = min(first.get(key, moment), moment)
    letters = bank.read("dead_letter")
    moments = letters["added_at"].cast(pa.int64()).to_pylist()
    for row, moment in zip(letters.drop_columns(["added_at"]).to_pylist(), moments, strict=True):
        for place in wanted.mentions.places(row) | _place_of(row["key"], wanted.keys):
            key = int(wanted.keys[place])
            first[key] = min(first.get(key, moment), moment)
    return [first.get(int(key)) for key in wanted.keys]


def _place_of(key: int | None, keys: npt.NDArray[np.int64]) -> set[int]:
    return set() if key is None else set(np.flatnonzero(keys == key).tolist())


def _require_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise UsageError(
            "no documents are named",
            cause="the list of ids is empty",
            fix="give ids as arguments, or one a line with --ids-file",
        )
    for one in ids:
        if not one or len(one.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
            raise UsageError(
                "this is no document's id",
                value=one,
                cause=f"ids are 1 to {MAX_ID_BYTES} bytes of UTF-8",
                fix="give the id as the document was ingested under it",
            )


# ------------------------------------------------------------------------------------------------------------ doing it


@dataclass
class _Done:
    """What was done so far: rows taken out by table, files deleted, and files that were replaced."""

    rows: dict[str, int] = field(default_factory=dict)
    files: int = 0
    replaced: list[str] = field(default_factory=list)

    def add(self, table: str, found: Rewritten) -> None:
        """Count one table."""
        self.rows[table] = found.rows
        self.replaced += found.files


def _take_out(bank: Bank, table: str, wanted: _Wanted) -> Rewritten:
    if table == "dead_letter":
        return _redact(bank, wanted)

    def change(rows: pa.Table) -> pa.Table | None:
        gone = wanted.stones.forgotten(rows["key"].to_numpy())
        return rows.filter(pa.array(~gone)) if gone.any() else None

    found = rewrite_table(bank, table, change, counted=table == "codes")
    found.files = [f"{table}/{path}" for path in found.files]
    return found


def _redact(bank: Bank, wanted: _Wanted) -> Rewritten:
    """Dead letters lose all but their reason, so that the ledger's counts stay true."""
    emptied = 0

    def change(letters: pa.Table) -> pa.Table | None:
        nonlocal emptied
        mine = wanted.stones.forgotten(letter_keys(letters)) & has_key(letters)
        rows = letters.select(["message", "source", "raw"]).to_pylist()
        mine |= np.array([bool(wanted.mentions.places(row)) for row in rows], bool)
        emptied += int(mine.sum())
        return redacted(letters, mine) if mine.any() else None

    found = rewrite_table(bank, "dead_letter", change)
    return Rewritten(emptied, [f"dead_letter/{path}" for path in found.files], found.version)


def _clean_statistics(bank: Bank, stones: Tombstones) -> Rewritten:
    """Samples of vectors that wait for a codebook: those the ledger names are written again, the rest is swept."""
    again: dict[str, str | None] = {}
    named = {path for path in bank.read("ledger", ["statistics"])["statistics"].to_pylist() if path}
    for path in sorted(named):
        if path.startswith(f"{PENDING}/") and bank.storage.exists(path):
            keys = candidate_keys(bank, path)
            if (gone := keys[stones.forgotten(keys)]).size:
                again[path] = without_candidates(bank, path, gone)

    def change(ledger: pa.Table) -> pa.Table | None:
        paths = ledger["statistics"].to_pylist()
        if not any(path in again for path in paths):
            return None
        column = pa.array([again.get(path, path) for path in paths], pa.string())
        place = ledger.schema.get_field_index("statistics")
        return ledger.set_column(place, ledger.schema.field(place), column)

    found = rewrite_table(bank, "ledger", change)
    for path in again:
        bank.storage.delete(path)
    return Rewritten(len(again), [f"ledger/{path}" for path in found.files], found.version)


# ---------------------------------------------------------------------------------------------------------- the receipt


def _finish(bank: Bank, order: _Order, done: _Done) -> ForgetResult:
    """Write the receipt: what was done, and what was learnt from the documents while they were there."""
    path = receipt_of(order.path)
    moments = [since for since in order.new.values() if since is not None]
    forgotten, not_found = len(moments), order.asked - len(moments)
    if not order.finished:
        now = time.time_ns() // 1000
        since = min(moments, default=None)
        told = {
            "forgotten": forgotten,
            "not_found": not_found,
            "forgotten_at": _iso(now),
            "present_since": _iso(since),
            "removed": done.rows,
            "files_deleted": done.files,
            "codebooks": _codebooks_since(bank, since),
            "adapters": _adapters_since(bank, since),
            "note": (
                "codebooks hold sums over many vectors and adapters were trained on what the bank recalled; those"
                " named here were made while a forgotten document was present"
            ),
        }
        bank.storage.replace(path, (json.dumps(told, indent=2) + "\n").encode())
    return {"forgotten": forgotten, "not_found": not_found, "receipt": bank.storage.locate(path)}


def _codebooks_since(bank: Bank, since: int | None) -> list[int]:
    if since is None:
        return []
    moment = _moment(since)
    return [version for version, row in version_rows(bank).items() if version and row["added_at"] >= moment]


def _adapters_since(bank: Bank, since: int | None) -> list[str]:
    """Adapters whose card is younger; cards tell time in whole seconds."""
    from mbc_core.adapters import AdapterRegistry

    if since is None:
        return []
    registry, moment = AdapterRegistry(bank), _moment(since).replace(microsecond=0)
    found = []
    for version in registry.versions():
        try:
            created = datetime.fromisoformat(str(registry.info(version).card["created_at"]))
        except MbcError:
            found.append(version)  # a damaged card tells no time: it may be
            continue
        if created >= moment:
            found.append(version)
    return found


def _moment(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


def _iso(microseconds: int | None) -> str | None:
    if microseconds is None:
        return None
    return _moment(microseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")
