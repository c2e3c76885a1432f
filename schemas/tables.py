"""Arrow schemas of every table in a bank. Writers and readers import them; nothing else spells a column name.

Delta Lake has no unsigned integers, so keys are signed 64-bit and code payloads are packed binary.
Times are microseconds since the epoch, UTC.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 1

TIME = pa.timestamp("us", tz="UTC")

UNDATED = "undated"
"""Name of the window that holds documents without a time, in batch."""

FORGOTTEN = "forgotten"
"""Reason of the dead letters that stand for documents which were to be forgotten: they hold no text and no id."""

FORGOTTEN_MESSAGE = "the bank was told to forget this document"

DEAD_LETTER_REASONS = (
    "not_json",
    "not_utf8",
    "not_an_object",
    "no_id",
    "bad_id",
    "no_text",
    "text_too_long",
    "bad_timestamp",
    "bad_field",
    "encode_failed",
    "source_vanished",
    "source_unreadable",
    "too_late",
    FORGOTTEN,
)

CODES = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("passage", pa.int32(), nullable=False),
        pa.field("event_time", TIME),
        pa.field("added_at", TIME, nullable=False),
        pa.field("window", pa.string(), nullable=False),
        pa.field("address", pa.binary(), nullable=False),
        pa.field("words", pa.binary(), nullable=False),
        pa.field("codebook_version", pa.int32(), nullable=False),
    ]
)
"""One row a passage. Only these make a document visible; of a key's revisions (key, added_at) the newest is read."""

DOCUMENTS = pa.schema(
    [
        pa.field("key", pa.int64(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("content_hash", pa.binary(), nullable=False),
        pa.field("event_time", TIME),
        pa.field("added_at", TIME, nullable=False),
        pa.field("text_zstd", pa.binary()),
    ]
)
"""One row a revision: join codes on (key, added_at). A null title: the id is the title, or there is none. Rows that
no row of codes joins were left by an interrupted run and count for nothing.
"""

REPLAY = pa.schema(
    [
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("key", pa.int64(), nullable=False),
        pa.field("event_time", TIME),
        pa.field("window", pa.string(), nullable=False),
        pa.field("added_at", TIME, nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""Questions and answers of a revision: join codes on (key, added_at), as with documents."""

CODEBOOK_VERSIONS = pa.schema(
    [
        pa.field("version", pa.int32(), nullable=False),
        pa.field("parent", pa.int32()),
        pa.field("built_from", pa.list_(pa.string()), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("vectors", pa.int64(), nullable=False),
        pa.field("used", pa.int32(), nullable=False),
        pa.field("perplexity", pa.float64(), nullable=False),
        pa.field("resets", pa.int32(), nullable=False),
        pa.field("error", pa.float64()),
        pa.field("ingest_id", pa.string(), nullable=False),
        pa.field("slice", pa.string(), nullable=False),
        pa.field("added_at", TIME, nullable=False),
    ]
)
"""One row a version; append-only. ``ingest_id`` and ``slice`` published it; both are empty for version 0."""

LEDGER = pa.schema(
    [
        pa.field("ingest_id", pa.string(), nullable=False),
        pa.field("slice", pa.string(), nullable=False),
        pa.field("window", pa.string(), nullable=False),
        pa.field("pane", pa.int32(), nullable=False),
        pa.field("documents_in", pa.int64(), nullable=False),
        pa.field("documents", pa.int64(), nullable=False),
        pa.field("passages", pa.int64(), nullable=False),
        pa.field("duplicates", pa.int64(), nullable=False),
        pa.field("replaced", pa.int64(), nullable=False),
        pa.field("dead_letters", pa.string(), nullable=False),
        pa.field("codebook_version", pa.int32()),
        pa.field("statistics", pa.string()),
        pa.field("added_at", TIME, nullable=False),
    ]
)
"""One row a window of a committed slice. ``dead_letters`` is JSON, {reason: documents}; ``statistics`` is the file of
the window's codebook statistics until a version takes them in.
"""

DEAD_LETTER = pa.schema(
    [
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("key", pa.int64()),
        pa.field("raw", pa.binary()),
        pa.field("ingest_id", pa.string(), nullable=False),
        pa.field("added_at", TIME, nullable=False),
    ]
)
"""What could not be ingested. Rows count when the ledger has their (ingest_id, added_at)."""

LIVE_ADAPTER = pa.schema(
    [
        pa.field("base_digest", pa.string(), nullable=False),
        pa.field("version", pa.string()),
        pa.field("action", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("added_at", TIME, nullable=False),
    ]
)
"""Promotions and rollbacks in order of ``added_at``; a null version means that the release's own adapter is live."""

TOMBSTONES = pa.schema(
    [
        pa.field("tombstone", pa.binary(), nullable=False),
        pa.field("present_since", TIME),
        pa.field("forgotten_at", TIME, nullable=False),
    ]
)
"""One row a document that was to be forgotten: a keyed hash of its key (16 bytes), and since when the bank had held
it (null: it did not). Plain Parquet files below ``tombstones/``, in no Delta table; a bank without them has none.
"""

TABLES: dict[str, pa.Schema] = {
    "codes": CODES,
    "documents": DOCUMENTS,
    "replay": REPLAY,
    "codebook_versions": CODEBOOK_VERSIONS,
    "ledger": LEDGER,
    "dead_letter": DEAD_LETTER,
    "adapters/live": LIVE_ADAPTER,
}
"""Folder below the bank's root → schema of the Delta table there."""

SORT_ORDER: dict[str, tuple[str, ...]] = {
    "codes": ("window", "event_time", "key", "passage"),
    "documents": ("event_time", "key"),
    "replay": ("window", "key", "question", "answer"),
    "codebook_versions": ("version",),
    "ledger": ("window",),
    "dead_letter": ("source", "position"),
    "adapters/live": (),
}
"""Order of the rows within one file: neighbours that resemble each other compress well."""
