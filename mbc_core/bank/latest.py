"""The newest revision of every document, kept up to date by reading only the files that were added since.

A stream judges every pane it commits against what the bank shows at that moment. Reading the whole bank each time
would cost more the longer the stream runs; here each file is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.bank.commit import ingest_of
from mbc_core.bank.visible import HASH_BYTES, binary_matrix, hash_pairs, revision_places
from mbc_core.errors import DamagedFile

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_DOCUMENT_COLUMNS = ["key", "added_at", "content_hash", "event_time"]
_UNDATED = np.iinfo(np.int64).min

Int64 = npt.NDArray[np.int64]


class Standing(IntEnum):
    """What a document of a stream is to the bank."""

    NEW = 0
    DUPLICATE = 1
    REVISION = 2
    OLDER = 3
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

    def merged(self, other: _Revisions) -> _Revisions:
        """Of each key the revision added last."""
        parts = [np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)]
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
        self._forget()
        self.version = -1

    def _forget(self) -> None:
        self._revisions = _Revisions.none()
        self._seen: dict[str, set[str]] = {"codes": set(), "documents": set()}
        self._documents: pa.Table | None = None

    def __len__(self) -> int:
        return len(self._revisions.keys)

    def refresh(self) -> int:
        """Read what was added since the last call; all of it when files were removed (compacted, forgotten).

        Returns:
            The version of the table ``codes`` that was read.

        Raises:
            DamagedFile: codes refer to documents that the bank does not hold.
        """
        delta = self._bank.table("codes")
        if delta.version() == self.version:
            return self.version
        paths = set(pa.table(delta.get_add_actions())["path"].to_pylist())
        if not self._seen["codes"] <= paths:
            self._forget()
        fresh = sorted(paths - self._seen["codes"])
        revisions = self._revisions
        for mine in (False, True):
            chosen = [path for path in fresh if (ingest_of(path) == self._ingest_id) is mine]
            if chosen:
                revisions = revisions.merged(self._join(self._read("codes", chosen, ["key", "added_at"]), mine))
        self._revisions, self.version = revisions, delta.version()
        self._seen["codes"] |= set(fresh)
        return self.version

    def standing(self, keys: Int64, hashes: npt.NDArray[np.uint8], times: Int64) -> npt.NDArray[np.int8]:
        """Judge many documents at once.

        Args:
            keys: int64 [m]. hashes: uint8 [m, 16]. times: int64 [m], microseconds, the least value for none.

        Returns:
            int8 [m]: values of :class:`Standing`.
        """
        now = self._revisions
        result = np.full(len(keys), Standing.NEW, np.int8)
        if not len(now.keys) or not len(keys):
            return result
        place = np.minimum(np.searchsorted(now.keys, keys), len(now.keys) - 1)
        known = now.keys[place] == keys
        result[known] = Standing.REVISION
        newer = (now.times[place] > times) | ((now.times[place] == times) & _greater(now.hashes[place], hashes))
        result[known & now.mine[place] & newer] = Standing.OLDER
        same = known & (hash_pairs(now.hashes[place]) == hash_pairs(hashes)).all(axis=1)
        result[same] = Standing.DUPLICATE
        return result

    def _join(self, codes: pa.Table, mine: bool) -> _Revisions:
        rows = codes.group_by(["key", "added_at"]).aggregate([])
        documents = self._documents
        place = np.full(rows.num_rows, -1) if documents is None else revision_places(rows, documents)
        if (place < 0).any():
            documents = self._more_documents()
            place = revision_places(rows, documents)
        if documents is None or (place < 0).any():
            raise DamagedFile(
                "codes refer to documents that the bank does not hold",
                value=f"{int((place < 0).sum())} rows",
                cause=f"files of {self._bank.uri}/documents were removed",
                fix="restore the documents table from a copy; `mbc inspect --verify` names what is missing",
            )
        found = documents.take(pa.array(place, pa.int64()))
        self._documents = documents.filter(pa.array(~np.isin(np.arange(documents.num_rows), place)))
        return _Revisions.none().merged(
            _Revisions(
                found["key"].to_numpy(),
                found["added_at"].cast(pa.int64()).to_numpy(),
                found["event_time"].cast(pa.int64()).fill_null(_UNDATED).to_numpy(),
                binary_matrix(found["content_hash"], HASH_BYTES, "content_hash"),
                np.full(rows.num_rows, mine),
            )
        )

    def _more_documents(self) -> pa.Table:
        """Rows of documents that no code row has asked for yet: of runs under way, or that died."""
        fresh = sorted({path for path, _ in self._bank.files("documents")} - self._seen["documents"])
        self._seen["documents"] |= set(fresh)
        added = self._read("documents", fresh, _DOCUMENT_COLUMNS)
        return added if self._documents is None else pa.concat_tables([self._documents, added]).combine_chunks()

    def _read(self, table: str, paths: list[str], columns: list[str]) -> pa.Table:
        wanted = set(paths)
        return self._bank.read(table, columns, wanted.__contains__)


def _greater(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which hashes [n, 16] are greater, compared byte by byte."""
    left, right = (np.ascontiguousarray(half).view(">u8") for half in (one, other))
    greater: npt.NDArray[np.bool_] = (left[:, 0] > right[:, 0]) | (
        (left[:, 0] == right[:, 0]) & (left[:, 1] > right[:, 1])
    )
    return greater
