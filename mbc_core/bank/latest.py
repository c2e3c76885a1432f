"""The newest revision of every document, kept up to date by reading only the files that were added since.

A stream judges every pane it commits against what the bank shows at that moment. Reading the whole bank each time
would cost more the longer the stream runs; here each file is read once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import DeltaTable

from mbc_core.bank.delta_log import files_of
from mbc_core.bank.slices import COMPACTED, ingest_of
from mbc_core.bank.visible import HASH_BYTES, binary_matrix, hash_pairs, revision_places
from mbc_core.errors import DamagedFile, StorageError

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_DOCUMENT_COLUMNS = ["key", "added_at", "content_hash", "event_time"]
_READS = 4
_UNDATED = np.iinfo(np.int64).min

Int64 = npt.NDArray[np.int64]


class Standing(IntEnum):
    """What a document of a stream is to the bank."""

    NEW = 0
    DUPLICATE = 1
    REVISION = 2
    FORGOTTEN = 3
    """It was to be forgotten: refused. Up to here the values are those of :class:`mbc_core.bank.Status`."""
    OLDER = 4
    """The same ingest has added a newer revision already: this one is replaced before it is stored."""


@dataclass(frozen=True, slots=True)
class _Revisions:
    """One entry a document, keys strictly ascending.

    Attributes:
        keys, added, times: int64 [n]. hashes: uint8 [n, 16]. mine: bool [n], added by this ingest.
    """

    keys: Int64
    added: Int64
    times: Int64
    hashes: npt.NDArray[np.uint8]
    mine: npt.NDArray[np.bool_]

    @classmethod
    def none(cls) -> _Revisions:
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty, np.zeros((0, HASH_BYTES), np.uint8), np.zeros(0, bool))

    def merged(self, others: Iterable[_Revisions]) -> _Revisions:
        """Of each key the revision added last."""
        every = [self._columns(), *(one._columns() for one in others)]
        parts = [np.concatenate(some) for some in zip(*every, strict=True)]
        keys, added = parts[0], parts[1]
        order = np.lexsort((added, keys))
        last = order[np.append(keys[order][1:] != keys[order][:-1], True)[: len(order)]]
        return _Revisions(*(part[last] for part in parts))

    def _columns(self) -> tuple[npt.NDArray[np.generic], ...]:
        return self.keys, self.added, self.times, self.hashes, self.mine


class LatestRevisions:
    """What a bank shows, as one ingest sees it.

    :meth:`refresh` belongs to one thread; :meth:`standing` may be asked by others meanwhile.

    Args:
        bank: opened. ingest_id: the ingest that asks.
    """

    def __init__(self, bank: Bank, ingest_id: str) -> None:
        self._bank, self._ingest_id = bank, ingest_id
        self._tombstones = bank.tombstones()
        self._begin()

    def _begin(self) -> None:
        self._revisions = _Revisions.none()
        self._codes: set[str] = set()
        self._documents: set[str] = set()
        self._waiting: pa.Table | None = None
        self._table: DeltaTable | None = None

    def __len__(self) -> int:
        return len(self._revisions.keys)

    def refresh(self) -> DeltaTable:
        """Read what was added since the last call; all of it when files were removed (compacted, forgotten).

        Returns:
            The table ``codes`` as it was read.

        Raises:
            DamagedFile: a file is missing, or codes refer to documents that the bank does not hold.
        """
        self._tombstones = self._bank.tombstones()
        for _ in range(_READS):
            table = self._bank.table("codes")
            try:
                self._read_to(table)
                return table
            except (DamagedFile, StorageError):
                if self._bank.table("codes").version() == table.version():
                    raise
                self._begin()  # files were merged or rewritten while they were read
        raise StorageError(
            "the bank was rewritten every time it was read",
            value=f"{_READS} attempts",
            cause="`mbc compact` or `mbc forget` runs on it over and over",
            fix="run it less often",
        )

    def standing(self, keys: Int64, hashes: npt.NDArray[np.uint8], times: Int64) -> npt.NDArray[np.int8]:
        """Judge many documents at once.

        Args:
            keys: int64 [m]. hashes: uint8 [m, 16]. times: int64 [m], microseconds, the least value for none.

        Returns:
            int8 [m]: values of :class:`Standing`.
        """
        now = self._revisions
        result = np.full(len(keys), Standing.NEW, np.int8)
        if len(now.keys) and len(keys):
            place = np.minimum(np.searchsorted(now.keys, keys), len(now.keys) - 1)
            known = now.keys[place] == keys
            result[known] = Standing.REVISION
            # Of equal times the later one stands: a text was corrected and kept its date.
            result[known & now.mine[place] & (now.times[place] > times)] = Standing.OLDER
            same = known & (hash_pairs(now.hashes[place]) == hash_pairs(hashes)).all(axis=1)
            result[same] = Standing.DUPLICATE
        result[self._tombstones.forgotten(keys)] = Standing.FORGOTTEN
        return result

    def status(self, keys: Int64, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """As ``VisibleKeys.status``, which knows no times: values of :class:`mbc_core.bank.Status`."""
        return self.standing(keys, hashes, np.full(len(keys), np.iinfo(np.int64).max))

    def _read_to(self, table: DeltaTable) -> None:
        if self._table is not None and table.version() == self._table.version():
            return
        paths = set(files_of(table))
        if not self._codes <= paths:
            self._begin()
        moments: Int64 | None = None
        added = []
        for path in sorted(paths - self._codes):
            codes = self._bank.read_file("codes", path, ["key", "added_at"]).group_by(["key", "added_at"]).aggregate([])
            mine = np.full(codes.num_rows, ingest_of(path) == self._ingest_id)
            if ingest_of(path) == COMPACTED:
                moments = self._bank.moments_of(self._ingest_id) if moments is None else moments
                mine = np.isin(codes["added_at"].cast(pa.int64()).to_numpy(), moments)
            added.append(self._join(codes, mine))
        self._revisions, self._codes, self._table = self._revisions.merged(added), paths, table

    def _join(self, codes: pa.Table, mine: npt.NDArray[np.bool_]) -> _Revisions:
        documents = self._waiting
        place = np.full(codes.num_rows, -1) if documents is None else revision_places(codes, documents)
        if (place < 0).any():
            documents = self._more_documents()
            place = revision_places(codes, documents)
        if documents is None or (place < 0).any():
            raise DamagedFile(
                "codes refer to documents that the bank does not hold",
                value=f"{int((place < 0).sum())} rows",
                cause=f"files of {self._bank.uri}/documents were removed",
                fix="restore the documents table from a copy; `mbc inspect --verify` names what is missing",
            )
        found = documents.take(pa.array(place, pa.int64()))
        self._waiting = documents.filter(pa.array(~np.isin(np.arange(documents.num_rows), place)))
        return _Revisions(
            found["key"].to_numpy(),
            found["added_at"].cast(pa.int64()).to_numpy(),
            found["event_time"].cast(pa.int64()).fill_null(_UNDATED).to_numpy(),
            binary_matrix(found["content_hash"], HASH_BYTES, "content_hash"),
            mine,
        )

    def _more_documents(self) -> pa.Table:
        """Rows of documents that no code row has asked for yet: of runs under way, or that died."""
        fresh = {path for path, _ in self._bank.files("documents")} - self._documents
        self._documents |= fresh
        added = [self._bank.read_file("documents", path, _DOCUMENT_COLUMNS) for path in sorted(fresh)]
        known = [] if self._waiting is None else [self._waiting]
        if not known and not added:
            return self._bank.read("documents", _DOCUMENT_COLUMNS)
        return pa.concat_tables([*known, *added]).combine_chunks()
