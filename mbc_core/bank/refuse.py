"""Documents that were to be forgotten do not come back: the committer takes them out of a slice, and counts them.

The plan has judged them already; here is what was forgotten since. :class:`ForgottenWatch` looks before every commit
to a table that can hold a document, with the table loaded first: see :mod:`mbc_core.bank.tombstones`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import DeltaTable

from mbc_core.bank.delta_log import files_of
from mbc_core.bank.recheck import losses, read_rows
from mbc_core.bank.slices import SliceRows
from mbc_core.bank.statistics_files import without_candidates
from mbc_core.bank.tombstones import Tombstones, load_tombstones, tombstone_files
from schemas.tables import DEAD_LETTER, FORGOTTEN, FORGOTTEN_MESSAGE

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_TABLES = ("codes", "documents", "replay")


class ForgottenWatch:
    """Whether a slice holds a document that was to be forgotten; asked again and again, it reads only what is new.

    Args:
        bank: opened. rows: of the slice.
    """

    def __init__(self, bank: Bank, rows: SliceRows) -> None:
        self._bank, self._rows = bank, rows
        self._files: list[str] = []
        self._keys: npt.NDArray[np.int64] | None = None

    def overtaken(self, table: DeltaTable) -> bool:
        """Whether the slice must be judged again; ``table`` was loaded before this call."""
        files = tombstone_files(self._bank)
        if files == self._files:
            return False
        if self._keys is None:
            self._keys = _keys_of(self._bank, self._rows)
        found = bool(load_tombstones(self._bank).forgotten(self._keys).any())
        self._files = files
        return found


def without_forgotten(bank: Bank, rows: SliceRows) -> SliceRows:
    """The slice without the documents that were to be forgotten, each a dead letter that says nothing of it.

    Returns:
        Rows (no longer prepared files); the very ``rows`` when nothing was to be forgotten.
    """
    if not tombstone_files(bank):
        return rows
    stones = load_tombstones(bank)
    if not stones.forgotten(_keys_of(bank, rows)).any():
        return rows
    codes, documents, replay = (read_rows(bank, table, getattr(rows, table)) for table in _TABLES)
    gone = np.unique(documents["key"].to_numpy()[stones.forgotten(documents["key"].to_numpy())])
    return SliceRows(
        codes=_without(codes, stones),
        documents=_without(documents, stones),
        replay=_without(replay, stones),
        dead_letters=_letters(bank, rows, stones, len(gone)),
        ledger=_recounted(bank, rows.ledger, losses(codes, gone), gone),
    )


def drop_prepared(bank: Bank, rows: SliceRows, committed: SliceRows) -> None:
    """Delete the prepared files of a slice that was committed without them: they hold what was to be forgotten."""
    used = set(committed.ledger["statistics"].to_pylist())
    for path in set(rows.ledger["statistics"].to_pylist()) - used - {None}:
        bank.storage.delete(path)
    for table, given in (*((one, getattr(rows, one)) for one in _TABLES), ("dead_letter", rows.dead_letters)):
        if isinstance(given, pa.Table) or not given:
            continue
        counted = files_of(bank.table(table))
        for one in given:
            if one.path not in counted:
                bank.storage.delete(f"{table}/{one.path}")


def forgotten_letters(count: int, ingest_id: str | None = None) -> pa.Table:
    """Dead letters for so many documents that were to be forgotten: no text, no id, no source."""
    row = {"reason": FORGOTTEN, "message": FORGOTTEN_MESSAGE, "source": "", "position": 0, "key": None, "raw": None}
    schema = pa.schema([one for one in DEAD_LETTER if one.name not in ("added_at", "ingest_id")])
    table = pa.Table.from_pylist([row] * count, schema)
    if ingest_id is None:
        return table
    return table.append_column(DEAD_LETTER.field("ingest_id"), pa.array([ingest_id] * count, pa.string()))


def redacted(letters: pa.Table, chosen: npt.NDArray[np.bool_]) -> pa.Table:
    """Dead letters with nothing left of the chosen ones but their reason, so that counts stay."""
    blank = {"message": FORGOTTEN_MESSAGE, "source": "", "position": 0, "key": None, "raw": None}
    mask = pa.array(chosen)
    for name, value in blank.items():
        field = letters.schema.field(name)
        kept = letters[name].to_pylist()
        column = [value if out else old for out, old in zip(mask.to_pylist(), kept, strict=True)]
        letters = letters.set_column(letters.schema.get_field_index(name), field, pa.array(column, field.type))
    return letters


def letter_keys(letters: pa.Table) -> npt.NDArray[np.int64]:
    """Keys of dead letters; 0 stands for those that have none, whose places :func:`has_key` tells."""
    keys: npt.NDArray[np.int64] = letters["key"].fill_null(0).to_numpy()
    return keys


def has_key(letters: pa.Table) -> npt.NDArray[np.bool_]:
    """Which dead letters know the key of their document."""
    valid: npt.NDArray[np.bool_] = letters["key"].is_valid().to_numpy()
    return valid


def _keys_of(bank: Bank, rows: SliceRows) -> npt.NDArray[np.int64]:
    """Keys of every document the slice holds something of."""
    documents = read_rows(bank, "documents", rows.documents)["key"].to_numpy()
    letters = read_rows(bank, "dead_letter", rows.dead_letters)
    return np.concatenate([documents, letter_keys(letters)[has_key(letters)]])


def _without(rows: pa.Table, stones: Tombstones) -> pa.Table:
    return rows.filter(pa.array(~stones.forgotten(rows["key"].to_numpy())))


def _letters(bank: Bank, rows: SliceRows, stones: Tombstones, count: int) -> pa.Table:
    known = read_rows(bank, "dead_letter", rows.dead_letters)
    known = redacted(known, stones.forgotten(letter_keys(known)) & has_key(known))
    if not count:
        return known
    more = forgotten_letters(count, rows.ledger["ingest_id"][0].as_py())
    names = more.column_names
    return pa.concat_tables([known.select(names), more.select(names).cast(known.select(names).schema)])


def _recounted(
    bank: Bank, ledger: pa.Table, lost: dict[str, tuple[set[int], int]], gone: npt.NDArray[np.int64]
) -> pa.Table:
    """The ledger rows with the forgotten documents as dead letters of their windows, and no vectors of theirs."""
    rows = []
    for row in ledger.to_pylist():
        keys, passages = lost.get(row["window"], (set(), 0))
        letters = json.loads(row["dead_letters"] or "{}")
        if keys:
            letters[FORGOTTEN] = letters.get(FORGOTTEN, 0) + len(keys)
        fewer = {"documents": row["documents"] - len(keys), "passages": row["passages"] - passages}
        path = row["statistics"]
        if path:
            row["statistics"] = without_candidates(bank, path, gone)
        rows.append(row | fewer | {"dead_letters": json.dumps(letters, sort_keys=True)})
    return pa.Table.from_pylist(rows, ledger.schema)
