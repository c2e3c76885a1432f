"""What a document is: the JSON Schema for people and tools, and the strict reader the pipeline uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

from mbc_core.errors import BadDocument

MAX_TEXT_BYTES = 4 * 1024 * 1024
MAX_ID_BYTES = 1024

DOCUMENT_JSON_SCHEMA: dict[str, object] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "MBC document",
    "type": "object",
    "anyOf": [{"required": ["id"]}, {"required": ["doc_id"]}],
    "required": ["text"],
    "properties": {
        "id": {"type": ["string", "integer"], "minLength": 1},
        "doc_id": {"type": ["string", "integer"], "minLength": 1},
        "text": {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES},
        "title": {"type": ["string", "null"]},
        "uri": {"type": ["string", "null"]},
        "timestamp": {"type": ["string", "null"], "description": "ISO 8601; UTC when it has no zone"},
        "qa": {
            "type": ["array", "null"],
            "items": {
                "type": "object",
                "required": ["question", "answer"],
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
            },
        },
    },
    "additionalProperties": True,
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document, checked.

    Attributes:
        doc_id: the caller's id, unique per document; the same id again is a revision.
        text: the whole text, never empty after stripping.
        title, uri: for people; not encoded.
        event_time: microseconds since the epoch, UTC; None when the document has no date.
        qa: (question, answer) pairs that came with the document.
    """

    doc_id: str
    text: str
    title: str | None = None
    uri: str | None = None
    event_time: int | None = None
    qa: tuple[tuple[str, str], ...] = ()

    def key(self, salt: bytes) -> int:
        """Signed 64-bit keyed hash of the id; opaque without the bank's ``salt`` (16 bytes)."""
        return document_key(self.doc_id, salt)

    def content_hash(self, salt: bytes) -> bytes:
        """16 bytes; equal exactly when every field the caller gave is equal."""
        fields = [self.text, self.title, self.uri, self.event_time, [list(pair) for pair in self.qa]]
        canonical = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(canonical, digest_size=16, key=salt).digest()


def document_key(doc_id: str, salt: bytes) -> int:
    """Signed 64-bit keyed BLAKE2b hash of ``doc_id`` under the bank's ``salt``."""
    digest = hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "little", signed=True)


def document_from_bytes(line: bytes) -> Document:
    """Read one JSON object from UTF-8 bytes.

    Raises:
        BadDocument: with reason ``not_utf8``, ``not_json``, ``not_an_object``, or one of
            :func:`document_from_mapping`'s.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(
            "not_utf8",
            "the line is not UTF-8",
            value=line[:60],
            cause=f"byte {error.start} starts no UTF-8 character",
            fix="re-encode the file as UTF-8",
        ) from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise BadDocument(
            "not_json",
            "the line is not JSON",
            value=text[:60],
            cause=str(error),
            fix="write one JSON object a line (JSON Lines)",
        ) from error
    if not isinstance(fields, dict):
        raise BadDocument(
            "not_an_object",
            "the line is JSON but not an object",
            value=text[:60],
            cause="a list, string or number stands where a document is expected",
            fix='write {"id": …, "text": …} on each line',
        )
    return document_from_mapping(fields)


def document_from_mapping(fields: Mapping[str, object]) -> Document:
    """Check the fields of one document.

    Raises:
        BadDocument: with reason ``no_id``, ``bad_id``, ``no_text``, ``text_too_long``, ``bad_timestamp``
            or ``bad_field``.
    """
    return Document(
        doc_id=_doc_id(fields),
        text=_text(fields),
        title=_optional_string(fields, "title"),
        uri=_optional_string(fields, "uri"),
        event_time=parse_timestamp(fields.get("timestamp")),
        qa=_qa(fields),
    )


def parse_timestamp(value: object) -> int | None:
    """ISO 8601 text, a date or a datetime → microseconds since the epoch, UTC when it names no zone; None stays None.

    Raises:
        BadDocument: reason ``bad_timestamp``.
    """
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str | date):  # a datetime is a date; numbers could be seconds, days or years
            raise ValueError(f"a {type(value).__name__} is not a date")
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise BadDocument(
            "bad_timestamp",
            "the timestamp is not a date",
            value=value,
            cause="it is not ISO 8601",
            fix="write it like 2024-07-01 or 2024-07-01T09:30:00Z",
        ) from error
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _doc_id(fields: Mapping[str, object]) -> str:
    value = fields.get("id")
    value = fields.get("doc_id") if value is None else value
    if value is None or value == "":
        raise BadDocument(
            "no_id",
            "the document has no id",
            value=sorted(map(str, fields))[:8],
            cause="neither `id` nor `doc_id` is set",
            fix="give each document a stable, unique `id`",
        )
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int)
        or len(str(value).encode("utf-8", "replace")) > MAX_ID_BYTES
        or _has_lone_surrogate(str(value))
    ):
        raise BadDocument(
            "bad_id",
            "the id is not a short string or an integer",
            value=value,
            cause=f"ids are strings of at most {MAX_ID_BYTES} bytes of UTF-8",
            fix="use the record's name or number as id",
        )
    return str(value)


def _text(fields: Mapping[str, object]) -> str:
    value = fields.get("text")
    if not isinstance(value, str) or not value.strip():
        raise BadDocument(
            "no_text",
            "the document has no text",
            value=value,
            cause="`text` is missing, empty or not a string",
            fix="put the document's text into `text`",
        )
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise BadDocument(
            "text_too_long",
            "the text is too long",
            value=f"{size} bytes",
            cause=f"the limit is {MAX_TEXT_BYTES} bytes a document",
            fix="split it into documents such as chapters, each with its own id",
        )
    if _has_lone_surrogate(value):
        raise BadDocument(
            "not_utf8",
            "the text holds a lone surrogate",
            value=value[:40],
            cause="it was cut inside an escaped character",
            fix="re-export the document as UTF-8",
        )
    return value


def _optional_string(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is None or (isinstance(value, str) and not _has_lone_surrogate(value)):
        return value or None
    raise BadDocument(
        "bad_field",
        f"`{name}` is not a string of UTF-8",
        value=value,
        cause="another type stands in this field, or a character was cut in half",
        fix=f"make `{name}` a string or leave it out",
    )


def _qa(fields: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    value = fields.get("qa")
    if value is None:
        return ()
    pairs = []
    for item in value if isinstance(value, list) else [None]:
        question, answer = (item.get("question"), item.get("answer")) if isinstance(item, dict) else (None, None)
        if not (_is_filled(question) and _is_filled(answer)):
            raise BadDocument(
                "bad_field",
                "`qa` is not a list of question and answer strings",
                value=value,
                cause="an entry lacks `question` or `answer`",
                fix='write [{"question": "…", "answer": "…"}] or leave `qa` out',
            )
        pairs.append((str(question), str(answer)))
    return tuple(pairs)


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _has_lone_surrogate(value)


def _has_lone_surrogate(text: str) -> bool:
    """Half of a character, as JSON escapes can spell it: no UTF-8 can hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
