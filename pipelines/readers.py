"""Reading sources: JSON Lines, Parquet, CSV and text files → checked documents, each bad record with its reason.

Plain Python, no Beam: the local plan pass and the distributed reader both call :func:`read_source`. A reader never
raises over one bad record or one bad file: it yields a :class:`Rejected` and goes on, so that counts add up.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mbc_core.errors import BadDocument
from pipelines.sources import STDIN, Source, open_store
from schemas.document import MAX_TEXT_BYTES, Document, document_from_bytes, document_from_mapping

MAX_LINE_BYTES = 8 * MAX_TEXT_BYTES
"""Longest JSON line that is parsed: escapes may write one character as six bytes."""

MAX_RAW_BYTES = 64 * 1024
"""How much of a rejected record its dead letter keeps."""

_FIELDS = ("id", "doc_id", "text", "title", "uri", "timestamp", "qa")
_BUFFER = 1 << 20
_SMALL_BUFFER = 1 << 16  # when a file breaks off, what is in the buffer is lost
_UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record, or one whole file, that cannot be ingested.

    Attributes:
        reason: one of ``schemas.tables.DEAD_LETTER_REASONS``.
        message: what is wrong, the likely cause and the fix.
        source: the file; position: 1-based line or row, 0 for the file as a whole.
        raw: the record's first bytes, at most ``MAX_RAW_BYTES``.
        doc_id: the document's id where it could be read (so that it can be forgotten).
    """

    reason: str
    message: str
    source: str
    position: int
    raw: bytes = b""
    doc_id: str | None = None


Record = Document | Rejected


def read_source(source: Source, stdin: IO[bytes] | None = None) -> Iterator[Record]:
    """Every record of one source, in order: a checked :class:`Document`, or a :class:`Rejected` with its reason.

    A file that vanishes or breaks off gives one :class:`Rejected` for the rest of it. Blank lines are no records;
    an empty file is one rejected record, so that it does not pass unseen.

    Args:
        source: what to read.
        stdin: the stream read for ``-``; standard input by default.
    """
    count = 0
    try:
        for record in _READERS[source.kind](source, stdin):
            count += 1
            yield record
    except FileNotFoundError as error:
        yield _whole(source, "source_vanished", f"the file is gone: {error}", count)
        return
    except _UNREADABLE as error:
        reason = f"reading stopped after {count} records: {error or type(error).__name__}"
        yield _whole(source, "source_unreadable", reason, count)
        return
    if not count:
        yield _whole(source, "no_text", "the file is empty", 0)


def _whole(source: Source, reason: str, what: str, position: int) -> Rejected:
    return Rejected(reason, f"{what}. Fix: restore {source.path} and ingest it again.", source.path, position)


def _read_jsonl(source: Source, stdin: IO[bytes] | None) -> Iterator[Record]:
    with open_bytes(source.path, stdin) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is no part of the record
                if line.lstrip().startswith(b"["):
                    raise pa.ArrowInvalid(
                        "the file starts with [: it is one JSON array, not JSON Lines; convert it: jq -c '.[]'"
                    )
            if not line.strip():
                continue
            yield _checked_line(line, source, number)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of at most ``MAX_LINE_BYTES`` + 1 bytes; the rest of a longer line is skipped, never held."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        tail = line
        while len(tail) > MAX_LINE_BYTES and not tail.endswith(b"\n"):
            tail = stream.readline(MAX_LINE_BYTES + 1)
        yield line


def _checked_line(line: bytes, source: Source, number: int) -> Record:
    if len(line) > MAX_LINE_BYTES:
        message = f"the line is longer than {MAX_LINE_BYTES} bytes. Fix: split the document into chapters."
        return Rejected("text_too_long", message, source.path, number, line[:MAX_RAW_BYTES])
    try:
        return document_from_bytes(line)
    except BadDocument as error:
        return Rejected(error.reason, str(error), source.path, number, line[:MAX_RAW_BYTES], _id_in(line))


def _id_in(line: bytes) -> str | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _id_of(fields) if isinstance(fields, dict) else None


def _id_of(fields: Mapping[str, object]) -> str | None:
    value = fields.get("id", fields.get("doc_id"))
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _checked_fields(fields: Mapping[str, object], source: Source, number: int) -> Record:
    """A row of CSV or Parquet; its `qa` may be JSON text, its other fields may be null."""
    try:
        qa = fields.get("qa")
        present = {name: value for name, value in fields.items() if value is not None}
        if isinstance(qa, str):
            present["qa"] = json.loads(qa) if qa.strip() else None
        return document_from_mapping(present)
    except (BadDocument, ValueError, RecursionError) as error:
        reason = error.reason if isinstance(error, BadDocument) else "bad_field"
        message = str(error) if isinstance(error, BadDocument) else f"`qa` is not JSON. Likely cause: {error}."
        raw = json.dumps(dict(fields), default=str).encode("utf-8", "replace")[:MAX_RAW_BYTES]
        return Rejected(reason, message, source.path, number, raw, _id_of(fields))


def _read_csv(source: Source, stdin: IO[bytes] | None) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with open_bytes(source.path, stdin) as stream:
        # Bytes that are not UTF-8 come through as lone surrogates, so that only their row is rejected.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        # Strict: else an unclosed quote would quietly swallow the rows up to the next one, or to the end.
        rows = csv.DictReader(text, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                yield _checked_row(row, source, number)
        except csv.Error as error:
            raise pa.ArrowInvalid(f"line {rows.line_num}: {error}; an unclosed quote is the usual cause") from error


def _checked_row(row: dict[str | None, object], source: Source, number: int) -> Record:
    extra = row.pop(None, None)
    fields = {str(name): value for name, value in row.items() if value != ""}
    raw = ",".join(str(value) for value in fields.values()).encode("utf-8", "surrogateescape")[:MAX_RAW_BYTES]
    if extra is not None:
        message = f"the row has more fields than the header ({extra!r:.60}). Fix: quote fields that hold commas."
        return Rejected("bad_field", message, source.path, number, raw, _id_of(fields))
    if any("\udc80" <= char <= "\udcff" for value in fields.values() for char in str(value)):
        return Rejected("not_utf8", "the row is not UTF-8. Fix: re-encode the file.", source.path, number, raw)
    return _checked_fields(fields, source, number)


def _read_parquet(source: Source, stdin: IO[bytes] | None) -> Iterator[Record]:
    with _open_parquet(source.path) as handle:
        file = pq.ParquetFile(handle)
        columns = [name for name in file.schema_arrow.names if name in _FIELDS]
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in _rows(_whole_microseconds(batch)):
                number += 1
                if isinstance(row, bytes):
                    message = "a string of the row is not UTF-8. Fix: re-encode the file."
                    yield Rejected("not_utf8", message, source.path, number, row[:MAX_RAW_BYTES])
                else:
                    yield _checked_fields(row, source, number)


def _whole_microseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Nanosecond times become microseconds: Python's datetime holds no more."""
    columns = [
        column.cast(pa.timestamp("us", column.type.tz), safe=False) if pa.types.is_timestamp(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _rows(batch: pa.RecordBatch) -> Iterable[dict[str, object] | bytes]:
    """Rows as dictionaries; a row with a string that is not UTF-8 as that string's bytes."""
    try:
        return cast(list[dict[str, object] | bytes], batch.to_pylist())
    except UnicodeDecodeError:
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(batch: pa.RecordBatch) -> dict[str, object] | bytes:
    try:
        return cast(dict[str, object], batch.to_pylist()[0])
    except UnicodeDecodeError as error:
        return bytes(error.object)


def _read_text(source: Source, stdin: IO[bytes] | None) -> Iterator[Record]:
    with open_bytes(source.path, stdin) as stream:
        raw = stream.read(MAX_TEXT_BYTES + 1)
    name = PurePosixPath(source.path)
    try:
        text = raw[: MAX_TEXT_BYTES + 1].removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        reason, message = "not_utf8", f"the file is not UTF-8 (byte {error.start}). Fix: re-encode it."
        if len(raw) <= MAX_TEXT_BYTES or error.start < MAX_TEXT_BYTES - 4:
            yield Rejected(reason, message, source.path, 0, raw[:MAX_RAW_BYTES], source.path)
            return
        text = raw.decode("utf-8", "replace")  # the cut itself split a character: judged by its length below
    try:
        fields = {"id": source.path, "text": text, "title": name.stem, "uri": source.path}
        yield document_from_mapping(fields)
    except BadDocument as error:
        yield Rejected(error.reason, str(error), source.path, 0, raw[:MAX_RAW_BYTES], source.path)


_READERS = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}


# ---------------------------------------------------------------------------------------------------- opening files


@contextmanager
def open_bytes(path: str, stdin: IO[bytes] | None = None) -> Iterator[IO[bytes]]:
    """A buffered binary stream of the decompressed content; gzip and zstd are known by their first bytes."""
    with ExitStack() as open_files:
        if path == STDIN:
            raw = stdin if stdin is not None else sys.stdin.buffer
        elif "://" in path:
            filesystem, inner = open_store(path)
            raw = open_files.enter_context(filesystem.open_input_stream(inner, compression=None))
        else:
            raw = open_files.enter_context(Path(path).open("rb"))
        # Arrow's streams are not RawIOBase in name, but all that the wrapper calls is there.
        buffered = raw if hasattr(raw, "peek") else io.BufferedReader(cast(io.RawIOBase, raw), _BUFFER)
        magic = cast(io.BufferedReader, buffered).peek(4)[:4]
        if magic.startswith(b"\x1f\x8b"):
            yield cast(IO[bytes], open_files.enter_context(gzip.GzipFile(fileobj=buffered)))
        elif magic == b"\x28\xb5\x2f\xfd":
            # Arrow's reader, because zstandard's takes a file that was cut short for one that ends there.
            source = open_files.enter_context(pa.PythonFile(buffered, mode="r"))
            plain = open_files.enter_context(pa.CompressedInputStream(source, "zstd"))
            yield io.BufferedReader(cast(io.RawIOBase, plain), _SMALL_BUFFER)
        else:
            yield cast(IO[bytes], buffered)


def _open_parquet(path: str) -> pa.NativeFile:
    if "://" in path:
        filesystem, inner = open_store(path)
        return filesystem.open_input_file(inner)
    Path(path).stat()  # FileNotFoundError with the path's name, as for every other kind
    return pa.OSFile(path, "rb")
