"""Which rows count: a document is visible when codes hold it, and of its revisions the newest one is read.

A revision is the pair (key, added_at): one slice adds all rows of a document at one moment. Codes are always read
before documents: whatever codes show, documents already hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank.tombstones import Tombstones
from mbc_core.errors import DamagedFile, UsageError

HASH_BYTES = 16


class Status(IntEnum):
    """What a document is to the bank."""

    NEW = 0
    DUPLICATE = 1
    REVISION = 2
    FORGOTTEN = 3
    """It was to be forgotten: refused, whatever its content."""


@dataclass(frozen=True, slots=True)
class VisibleKeys:
    """The newest visible revision of every document.

    Attributes:
        keys: int64 [n], strictly ascending.
        hashes: uint64 [n, 2], the 16 bytes of each content hash.
        tombstones: the documents that must not come back; None when there are none.
    """

    keys: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    tombstones: Tombstones | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def status(self, keys: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """Judge many documents at once.

        Args:
            keys: int64 [m]. hashes: uint8 [m, 16], their content hashes.

        Returns:
            int8 [m]: values of :class:`Status`.

        Raises:
            UsageError: another shape.
        """
        keys = np.ascontiguousarray(keys, dtype=np.int64)
        pairs = hash_pairs(hashes)
        if keys.shape != (len(pairs),):
            raise UsageError(
                "keys and content hashes do not belong together",
                value=(keys.shape, pairs.shape),
                cause="one hash is needed a key",
                fix="give keys int64 [m] and hashes uint8 [m, 16]",
            )
        result = np.full(len(keys), Status.NEW, np.int8)
        if len(self.keys):
            place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            known = self.keys[place] == keys
            same = known & (self.hashes[place] == pairs).all(axis=1)
            result[known] = Status.REVISION
            result[same] = Status.DUPLICATE
        if self.tombstones is not None:
            result[self.tombstones.forgotten(keys)] = Status.FORGOTTEN
        return result

    def with_tombstones(self, tombstones: Tombstones) -> VisibleKeys:
        """The same, refusing what was to be forgotten."""
        return replace(self, tombstones=tombstones if len(tombstones) else None)


def hash_pairs(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Content hashes uint8 [m, 16] → uint64 [m, 2], which compare faster.

    Raises:
        UsageError: another shape or dtype.
    """
    if hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES or hashes.dtype != np.uint8:
        raise UsageError(
            "content hashes have another shape",
            value=(hashes.shape, str(hashes.dtype)),
            cause=f"a content hash is {HASH_BYTES} bytes",
            fix="give uint8 [m, 16]",
        )
    return np.ascontiguousarray(hashes).view(np.uint64).reshape(-1, 2)


def binary_matrix(column: pa.ChunkedArray, width: int, what: str) -> npt.NDArray[np.uint8]:
    """A binary column whose values all have ``width`` bytes → uint8 [n, width], without a loop.

    Raises:
        DamagedFile: a value has another length.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(array):
        return np.zeros((0, width), np.uint8)
    if array.null_count or pc.any(pc.not_equal(pc.binary_length(array), width)).as_py():
        raise DamagedFile(
            f"the column `{what}` holds a value of another length",
            value=sorted({size for size in pc.binary_length(array).to_pylist() if size != width}, key=str)[:4],
            cause=f"each value has {width} bytes; the rows were written with other settings",
            fix="restore the table from a copy of the bank",
        )
    values = pc.cast(array, pa.binary(width))
    return np.frombuffer(values.buffers()[1], np.uint8)[values.offset * width :][: len(values) * width].reshape(
        -1, width
    )


def newest_revisions(codes: pa.Table, as_of: int | None = None) -> npt.NDArray[np.bool_]:
    """Mask over rows of codes: those of each key's newest revision that was added at or before ``as_of``.

    Args:
        codes: with the columns ``key`` and ``added_at``.
        as_of: microseconds since the epoch; None takes all.
    """
    keys, added = _int64(codes["key"]), _int64(codes["added_at"])
    alive = np.ones(len(keys), bool) if as_of is None else added <= as_of
    order = np.lexsort((added, keys))
    order = order[alive[order]]
    newest = np.zeros(len(keys), bool)
    if len(order):
        last = np.append(keys[order][1:] != keys[order][:-1], True)
        group = np.cumsum(np.append(False, last[:-1]))
        newest[order] = added[order] == added[order][last][group]
    return newest


def titled(documents: pa.Table) -> pa.Table:
    """A null title stands for one that equals the id, or for none: show the id."""
    titles = pc.coalesce(documents["title"], documents["doc_id"])
    return documents.set_column(documents.schema.get_field_index("title"), "title", titles)


def join_documents(rows: pa.Table, documents: pa.Table, columns: list[str], where: str) -> pa.Table:
    """``rows`` with ``columns`` of the documents row of the same (key, added_at).

    Raises:
        DamagedFile: a row has no document.
    """
    place = revision_places(rows, documents)
    if (place < 0).any():
        raise DamagedFile(
            "codes refer to documents that the bank does not hold",
            value=f"{int((place < 0).sum())} rows",
            cause=f"files of {where}/documents were removed",
            fix="restore the documents table from a copy; `mbc inspect --verify` names what is missing",
        )
    taken = documents.select(columns).take(pa.array(place, pa.int64()))
    for name in columns:
        rows = rows.append_column(documents.schema.field(name), taken[name])
    return rows


def revision_places(rows: pa.Table, documents: pa.Table) -> npt.NDArray[np.int64]:
    """For each row the index of the documents row with its (key, added_at); -1 where there is none: int64 [n]."""
    keys, added = _int64(documents["key"]), _int64(documents["added_at"])
    order = np.lexsort((added, keys))
    keys, added = keys[order], added[order]
    distinct = np.append(True, (keys[1:] != keys[:-1]) | (added[1:] != added[:-1]))[: len(keys)]
    order, keys, added = order[distinct], keys[distinct], added[distinct]
    wanted_keys, wanted_added = _int64(rows["key"]), _int64(rows["added_at"])
    first, after = np.searchsorted(keys, wanted_keys, "left"), np.searchsorted(keys, wanted_keys, "right")
    found = np.full(len(wanted_keys), -1, np.int64)
    # A key has few revisions: look at its first, second, … at once for all rows.
    for step in range(int((after - first).max(initial=0))):
        place = np.minimum(first + step, len(keys) - 1)
        hit = (first + step < after) & (added[place] == wanted_added)
        found[hit] = order[place[hit]]
    return found


def visible_keys(codes: pa.Table, documents: Callable[[], pa.Table]) -> VisibleKeys:
    """The visible documents.

    Args:
        codes: columns key, added_at.
        documents: reads key, added_at, content_hash; called after codes were read.
    """
    chosen = codes.filter(pa.array(newest_revisions(codes)))
    keys, first = np.unique(_int64(chosen["key"]), return_index=True)
    chosen = chosen.take(pa.array(first, pa.int64()))
    joined = join_documents(chosen, documents(), ["content_hash"], "the bank")
    return VisibleKeys(keys, hash_pairs(binary_matrix(joined["content_hash"], HASH_BYTES, "content_hash")))


def _int64(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    array: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
    return array
