"""Two runs at once: what one has made visible since the other judged its duplicates is judged again at the commit.

A run judges its documents before it encodes them, and commits them minutes later. Just before the commit of codes,
:class:`Recheck` looks at the files that others have added since. If one of them holds a document of the slice, the
slice is judged anew by :func:`judged_again`: what has become a duplicate is left out and counted so, and the rest gets
a new moment, after the other run's. The commit itself is refused by the log if yet another one came between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import DeltaTable

from mbc_core.bank.slices import Rows, SliceId, SliceRows, begin_slice, ingest_of
from mbc_core.bank.visible import HASH_BYTES, Status, binary_matrix
from mbc_core.errors import MbcError
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank


@dataclass(frozen=True, slots=True)
class JudgedAt:
    """What a slice's duplicates were judged against.

    Attributes:
        version: of the table ``codes`` when it was read; -1 when nothing was.
        own: whether commits of this very ingest are looked at too. A batch run has judged its own documents among
            each other; a stream has not.
    """

    version: int
    own: bool = False


class Recheck:
    """Looks, before each attempt to commit codes, at what others have added since the last look.

    Args:
        bank: opened. slice_id, rows: what is to be committed.
        judged: what its duplicates were judged against.
    """

    def __init__(self, bank: Bank, slice_id: SliceId, rows: SliceRows, judged: JudgedAt) -> None:
        self._bank, self._rows = bank, rows
        self._own = None if judged.own else slice_id.ingest_id
        self._seen = _paths_at(bank, judged.version)
        self._keys: npt.NDArray[np.int64] | None = None

    def overtaken(self, codes: DeltaTable) -> bool:
        """Whether files of ``codes`` that were not looked at yet hold a document of the slice."""
        fresh = {path for path in _paths(codes) if path not in self._seen}
        self._seen |= fresh
        return any(self._holds_mine(path) for path in sorted(fresh) if ingest_of(path) != self._own)

    def _holds_mine(self, path: str) -> bool:
        if self._keys is None:
            self._keys = _keys(read_rows(self._bank, "documents", self._rows.documents))
        return bool(np.isin(_keys(self._bank.read_file("codes", path, ["key"])), self._keys).any())


def judged_again(bank: Bank, rows: SliceRows, slice_id: SliceId) -> tuple[SliceRows, SliceId, JudgedAt]:
    """The slice as it must be committed now: without what has become a duplicate, added after all that is visible.

    Returns:
        Rows (no longer prepared files) with a ledger that counts the duplicates; the new moment; and what they were
        judged against.
    """
    judged = JudgedAt(bank.table("codes").version(), own=True)  # before it is read
    documents = read_rows(bank, "documents", rows.documents)
    hashes = binary_matrix(documents["content_hash"], HASH_BYTES, "content_hash")
    known = bank.visible().status(_keys(documents), hashes) == Status.DUPLICATE
    gone = _keys(documents)[known]
    codes = read_rows(bank, "codes", rows.codes)
    again = SliceRows(
        codes=_without(codes, gone),
        documents=_without(documents, gone),
        replay=_without(read_rows(bank, "replay", rows.replay), gone),
        dead_letters=read_rows(bank, "dead_letter", rows.dead_letters),
        ledger=_recounted(rows.ledger, codes, gone),
    )
    return again, begin_slice(bank, slice_id.ingest_id, slice_id.name, slice_id.pane), judged


def read_rows(bank: Bank, table: str, given: Rows) -> pa.Table:
    """The rows themselves, from prepared files where they are given so."""
    if isinstance(given, pa.Table):
        return given
    return pa.concat_tables([TABLES[table].empty_table(), *(bank.read_file(table, one.path) for one in given)])


def _paths(table: DeltaTable) -> set[str]:
    return set(pa.table(table.get_add_actions())["path"].to_pylist())


def _paths_at(bank: Bank, version: int) -> set[str]:
    """Files of ``codes`` at an older version; none when its log is no longer kept, so that all are looked at."""
    if version < 0:
        return set()
    try:
        return _paths(bank.table("codes", version))
    except MbcError:
        return set()


def _keys(rows: pa.Table) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = rows["key"].to_numpy()
    return keys


def _without(rows: pa.Table, keys: npt.NDArray[np.int64]) -> pa.Table:
    return rows.filter(pa.array(~np.isin(_keys(rows), keys), pa.bool_())) if len(keys) else rows


def losses(codes: pa.Table, gone: npt.NDArray[np.int64]) -> dict[str, tuple[set[int], int]]:
    """Window → the documents ``gone`` that it loses, and their passages."""
    passages = codes.filter(pa.array(np.isin(_keys(codes), gone), pa.bool_()))
    lost: dict[str, tuple[set[int], int]] = {}
    for key, window in zip(passages["key"].to_pylist(), passages["window"].to_pylist(), strict=True):
        keys, count = lost.get(window, (set(), 0))
        lost[window] = (keys | {key}, count + 1)
    return lost


def _recounted(ledger: pa.Table, codes: pa.Table, gone: npt.NDArray[np.int64]) -> pa.Table:
    """The ledger rows with the documents ``gone`` counted as duplicates of their windows."""
    if not len(gone):
        return ledger
    lost = losses(codes, gone)
    rows = []
    for row in ledger.to_pylist():
        keys, count = lost.get(row["window"], (set(), 0))
        fewer = {"documents": row["documents"] - len(keys), "passages": row["passages"] - count}
        rows.append(row | fewer | {"duplicates": row["duplicates"] + len(keys)})
    return pa.Table.from_pylist(rows, ledger.schema)
