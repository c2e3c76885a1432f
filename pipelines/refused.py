"""Documents that the bank was told to forget: refused before anything of them is stored, and counted.

What stands for one of them is a dead letter of reason ``forgotten``, with no text, no id and no place in a source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.records import DEAD_LETTER_ROWS
from schemas.document import document_key
from schemas.tables import FORGOTTEN, FORGOTTEN_MESSAGE

_IS_FORGOTTEN = 3  # mbc_core.bank.Status.FORGOTTEN; the bank's package is heavy and not needed to plan
_ID_FIELD = re.compile(rb'"(?:id|doc_id)"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')
_MOST_IDS = 16


class Judge(Protocol):
    """Says what a document is to the bank (``mbc_core.bank.VisibleKeys``)."""

    def status(self, keys: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
        """A status for each of keys int64 [n] and hashes uint8 [n, 16]."""
        ...


def forgotten_keys(keys: npt.NDArray[np.int64], visible: Judge) -> npt.NDArray[np.bool_]:
    """Which keys belong to documents that were to be forgotten: bool [n]."""
    found: npt.NDArray[np.bool_] = visible.status(keys, np.zeros((len(keys), 16), np.uint8)) == _IS_FORGOTTEN
    return found


def forgotten_rows(windows: Iterable[str]) -> pa.RecordBatch:
    """One dead letter a document, by the window it would have been in: rows of ``DEAD_LETTER_ROWS``."""
    return pa.RecordBatch.from_pylist([_blank(window) for window in windows], DEAD_LETTER_ROWS)


def refuse_letters(rows: pa.RecordBatch, visible: Judge, salt: bytes) -> pa.RecordBatch:
    """Dead letters, with nothing left of those whose document was to be forgotten.

    A record that could not be read as a document may still show its id; up to ``_MOST_IDS`` of them are looked at.

    Args:
        rows: of ``DEAD_LETTER_ROWS``. visible: judges keys. salt: of the bank's manifest.
    """
    found = [_keys_in(row, salt) for row in rows.select(["key", "raw"]).to_pylist()]
    keys = np.array([key for one in found for key in one], np.int64)
    if not len(keys) or not (gone := forgotten_keys(keys, visible)).any():
        return rows
    chosen = set(keys[gone].tolist())
    kept = zip(rows.to_pylist(), found, strict=True)
    return pa.RecordBatch.from_pylist(
        [_blank(row["window"]) if chosen.intersection(one) else row for row, one in kept], DEAD_LETTER_ROWS
    )


def _keys_in(row: dict[str, object], salt: bytes) -> set[int]:
    raw = row["raw"] if isinstance(row["raw"], bytes) else b""
    keys = {row["key"]} if isinstance(row["key"], int) else set()
    for place, match in enumerate(_ID_FIELD.finditer(raw)):
        if place == _MOST_IDS:
            break
        try:
            keys.add(document_key(str(json.loads(match[1])), salt))
        except ValueError:
            continue
    return keys


def _blank(window: str) -> dict[str, object]:
    told = {"window": window, "reason": FORGOTTEN, "message": FORGOTTEN_MESSAGE}
    return told | {"source": "", "position": 0, "key": None, "raw": None}
