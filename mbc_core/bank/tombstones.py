"""Who was forgotten, without saying who.

A tombstone is a keyed hash of a document's key, 16 bytes: whoever holds the bank can test a guess, nobody can read the
id off it. Tombstones are plain files below ``tombstones/``, written once; what counts is their union, so that they can
be merged or written twice without harm. A bank without the folder has none.

Who commits documents looks here after it has loaded the table and commits only if nothing came between (see
:mod:`mbc_core.bank.recheck`); who forgets writes its tombstones first and then commits to every table. So whichever
comes first, no forgotten document stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mbc_core.bank import parquet
from mbc_core.bank.storage import Storage
from schemas.tables import TOMBSTONES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

FOLDER = "tombstones"
TOMBSTONE_BYTES = 16
_PURPOSE = b"mbc.forgotten"


@dataclass(frozen=True, slots=True)
class Tombstones:
    """The documents that a bank was told to forget.

    Attributes:
        salt: 16 bytes, of the bank's manifest. hashes: one an id.
    """

    salt: bytes
    hashes: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self.hashes)

    def forgotten(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For each document key [n] whether it was to be forgotten: bool [n]."""
        if not self.hashes or not len(keys):
            return np.zeros(len(keys), bool)
        distinct, places = np.unique(keys, return_inverse=True)
        found = np.array([tombstone_of(key, self.salt) in self.hashes for key in distinct.tolist()], bool)
        mask: npt.NDArray[np.bool_] = found[places]
        return mask


def tombstone_of(key: int, salt: bytes) -> bytes:
    """The tombstone of a document key under the bank's ``salt``."""
    told = int(key).to_bytes(8, "little", signed=True)
    return hashlib.blake2b(told, digest_size=TOMBSTONE_BYTES, key=salt, person=_PURPOSE).digest()


def load_tombstones(bank: Bank) -> Tombstones:
    """All tombstones of the bank as they are now.

    Raises:
        DamagedFile: a file of theirs does not match its digest.
    """
    hashes = (_read(bank.storage, path)[0] for path in tombstone_files(bank))
    return Tombstones(bank.manifest.salt, frozenset().union(*hashes))


def tombstone_files(bank: Bank) -> list[str]:
    """Paths of the files below ``tombstones/``, oldest first."""
    return [one.path for one in bank.storage.list(FOLDER) if one.path.endswith(".parquet")]


def read_tombstones(bank: Bank, path: str) -> dict[bytes, int | None]:
    """Tombstone → since when the bank had held the document (microseconds since the epoch), or None."""
    hashes, rows = _read(bank.storage, path)
    return {tombstone: since for tombstone, since in rows if tombstone in hashes}


def write_tombstones(bank: Bank, present_since: Iterable[tuple[bytes, int | None]], moment: int) -> str:
    """Write one file of tombstones; every commit from now on sees them.

    Args:
        present_since: tombstone and since when the document was there. moment: of forgetting; both microseconds.

    Returns:
        The file's path.
    """
    rows = sorted(present_since)
    columns = ([row[0] for row in rows], [row[1] for row in rows], [moment] * len(rows))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, TOMBSTONES, strict=True)]
    data = parquet.to_bytes("tombstones", pa.Table.from_arrays(arrays, schema=TOMBSTONES))
    path = f"{FOLDER}/{moment}-{parquet.digest(data)}.parquet"
    bank.storage.write_new(path, data)
    return path


@lru_cache(maxsize=4096)  # the files never change
def _read(storage: Storage, path: str) -> tuple[frozenset[bytes], tuple[tuple[bytes, int | None], ...]]:
    data, where = storage.read_bytes(path), storage.locate(path)
    parquet.check_digest(data, path.removesuffix(".parquet").rsplit("-", 1)[-1], where)
    rows = parquet.from_bytes(data, where, schema=TOMBSTONES)
    since = rows["present_since"].cast(pa.int64()).to_pylist()
    pairs = tuple(zip(rows["tombstone"].to_pylist(), since, strict=True))
    return frozenset(tombstone for tombstone, _ in pairs), pairs
