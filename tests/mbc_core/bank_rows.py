"""Small banks and slices for the tests of the bank; imported by test processes too, so nothing runs on import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mbc_core.bank import Bank, SliceRows
from mbc_core.codebook.files import Codebook
from schemas.document import document_key
from schemas.manifest import Manifest
from schemas.tables import CODES, DEAD_LETTER, DOCUMENTS, LEDGER, REPLAY

SLOTS, CODEWORDS, WIDTH, WORDS = 24, 32, 4, 3
ADDRESS = 27
DAY = 86_400_000_000
FIRST = 1_719_792_000_000_000  # 2024-07-01, microseconds
SALT = "00112233445566778899aabbccddeeff"


def manifest(**changes: object) -> Manifest:
    fields = {
        "profile": "default",
        "encoder": "tiny@0123456789ab/float32/sentences-256",
        "slots": SLOTS,
        "codewords": CODEWORDS,
        "width": WIDTH,
        "words": WORDS,
        "rotation": "aa" * 32,
        "lexicon": "bb" * 32,
        "salience": "cc" * 32,
        "key_salt": SALT,
    }
    return Manifest(**{**fields, **changes})


def codebook(seed: int = 0, codewords: int = CODEWORDS) -> Codebook:
    rng = np.random.default_rng(seed)
    return Codebook.first(rng.standard_normal((codewords, WIDTH)).astype(np.float32), np.full(codewords, 50.0))


def make_bank(where: Path) -> Bank:
    return Bank.create(where, manifest(), codebook())


def key_of(doc_id: str) -> int:
    return document_key(doc_id, bytes.fromhex(SALT))


def hash_of(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()[:16]


def window(day: int) -> str:
    return f"2024-07-{1 + day:02d}T00:00:00Z"


def make_slice(
    ingest_id: str,
    name: str,
    documents: Sequence[tuple[str, str]],
    *,
    passages: int = 1,
    day: int = 0,
    dead: int = 0,
    statistics: str | None = None,
    version: int = 0,
    pane: int = 0,
) -> SliceRows:
    """A slice of (doc_id, content) pairs, all in one window; the payloads follow from the contents."""
    codes, rows, replay = [], [], []
    for number, (doc_id, content) in enumerate(documents):
        moment = FIRST + day * DAY + number * 1_000_000
        key = key_of(doc_id)
        for passage in range(passages):
            seed = hashlib.sha512(f"{content}#{passage}".encode()).digest()
            codes.append(
                {
                    "key": key,
                    "passage": passage,
                    "event_time": moment,
                    "window": window(day),
                    "address": seed[:ADDRESS],
                    "words": seed[ADDRESS : ADDRESS + 2 * WORDS],
                    "codebook_version": version,
                }
            )
        rows.append(
            {"key": key, "doc_id": doc_id, "title": f"About {doc_id}", "uri": None, "content_hash": hash_of(content)}
            | {"event_time": moment, "text_zstd": None}
        )
        replay.append(
            {"question": f"What of {doc_id}?", "answer": content, "key": key, "event_time": moment}
            | {"window": window(day), "split": "train"}
        )
    letters = [
        {"reason": "no_text", "message": "the document has no text", "source": "s.jsonl", "position": position}
        | {"key": None, "raw": b"{}", "ingest_id": ingest_id}
        for position in range(dead)
    ]
    ledger = {
        "ingest_id": ingest_id,
        "slice": name,
        "window": window(day),
        "pane": pane,
        "documents_in": len(documents) + dead,
        "documents": len(documents),
        "passages": len(documents) * passages,
        "duplicates": 0,
        "replaced": 0,
        "dead_letters": json.dumps({"no_text": dead} if dead else {}),
        "codebook_version": version,
        "statistics": statistics,
    }
    return SliceRows(
        codes=_table(codes, CODES),
        documents=_table(rows, DOCUMENTS),
        replay=_table(replay, REPLAY),
        dead_letters=_table(letters, DEAD_LETTER),
        ledger=_table([ledger], LEDGER),
    )


def numbered(start: int, count: int, content: str = "text") -> list[tuple[str, str]]:
    # No id is hexadecimal: file names are, at random, and traces of forgotten ids are looked for in all files.
    return [(f"x{number:04d}", f"{content} of x{number:04d}") for number in range(start, start + count)]


def shown(bank: Bank) -> list[tuple[str, int]]:
    """(doc_id, passage) of every visible passage, sorted."""
    passages = bank.passages()
    return sorted(zip(passages["doc_id"].to_pylist(), passages["passage"].to_pylist(), strict=True))


def _table(rows: list[dict[str, object]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, pa.schema([one for one in schema if one.name != "added_at"]))
