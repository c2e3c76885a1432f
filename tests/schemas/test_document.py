"""Documents: what is accepted, what becomes a dead letter and why, and identities that never change."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, date, datetime, timedelta, timezone

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import BadDocument
from schemas.document import (
    DOCUMENT_JSON_SCHEMA,
    MAX_ID_BYTES,
    MAX_TEXT_BYTES,
    Document,
    document_from_bytes,
    document_from_mapping,
    document_key,
    parse_timestamp,
)
from schemas.tables import DEAD_LETTER_REASONS

SALT = bytes(range(16))


def test_every_field_is_read():
    line = {
        "id": "a",
        "text": "Some text.",
        "title": "A title",
        "uri": "https://example.org/a",
        "timestamp": "2024-07-01T09:30:00.25+02:00",
        "qa": [{"question": "Who?", "answer": "They."}],
        "unknown": [1],
    }
    assert document_from_bytes(json.dumps(line).encode()) == Document(
        "a", "Some text.", "A title", "https://example.org/a", 1_719_819_000_250_000, (("Who?", "They."),)
    )


@pytest.mark.parametrize(
    ("fields", "doc_id"),
    [
        ({"id": 7}, "7"),
        ({"id": 0}, "0"),
        ({"doc_id": "x"}, "x"),
        ({"id": None, "doc_id": "y"}, "y"),
        ({"id": "é"}, "é"),
    ],
)
def test_ids(fields, doc_id):
    assert document_from_mapping(fields | {"text": "t"}).doc_id == doc_id


BAD_LINES = [
    (b"", "not_json", "the line is not JSON"),
    (b"{", "not_json", "the line is not JSON"),
    (b'{"id": ' + b"1" * 5000 + b', "text": "t"}', "not_json", "the line is not JSON"),
    (b"[" * 100_000, "not_json", "the line is not JSON"),
    (b'{"id": "a\xff", "text": "t"}', "not_utf8", "byte 9 starts no UTF-8 character"),
    (b'["id", "text"]', "not_an_object", "the line is JSON but not an object"),
    (b"null", "not_an_object", "the line is JSON but not an object"),
    (b'{"text": "t"}', "no_id", r"the document has no id: \['text'\]"),
    (b'{"id": "", "text": "t"}', "no_id", "the document has no id"),
    (b'{"id": true, "text": "t"}', "bad_id", "the id is not a short string or an integer: True"),
    (b'{"id": 1.5, "text": "t"}', "bad_id", "the id is not a short string or an integer: 1.5"),
    (b'{"id": "' + b"x" * (MAX_ID_BYTES + 1) + b'", "text": "t"}', "bad_id", r"1\d\d\d characters"),
    (rb'{"id": "\ud800", "text": "t"}', "bad_id", "the id is not a short string"),
    (b'{"id": "a"}', "no_text", "the document has no text: None"),
    (b'{"id": "a", "text": "  \\n"}', "no_text", "the document has no text"),
    (b'{"id": "a", "text": ["t"]}', "no_text", "the document has no text"),
    (rb'{"id": "a", "text": "half \udc00"}', "not_utf8", "the text holds a lone surrogate"),
    (b'{"id": "a", "text": "' + b"x" * 10_000_000 + b'"}', "text_too_long", "10000000 bytes"),
    (
        b'{"id": "a", "text": "t", "timestamp": "yesterday"}',
        "bad_timestamp",
        "the timestamp is not a date: 'yesterday'",
    ),
    (b'{"id": "a", "text": "t", "timestamp": 1719792000}', "bad_timestamp", "write it like 2024-07-01 or"),
    (b'{"id": "a", "text": "t", "timestamp": "2024-02-30"}', "bad_timestamp", "the timestamp is not a date"),
    (b'{"id": "a", "text": "t", "timestamp": "0001-01-01T00:00+14:00"}', "bad_timestamp", "is not a date"),
    (b'{"id": "a", "text": "t", "title": 3}', "bad_field", "`title` is not a string of UTF-8: 3"),
    (rb'{"id": "a", "text": "t", "uri": "\ud83d"}', "bad_field", "`uri` is not a string of UTF-8"),
    (b'{"id": "a", "text": "t", "qa": {"question": "q"}}', "bad_field", "`qa` is not a list"),
    (b'{"id": "a", "text": "t", "qa": [{"question": "q"}]}', "bad_field", "`qa` is not a list"),
    (b'{"id": "a", "text": "t", "qa": [{"question": "q", "answer": " "}]}', "bad_field", "`qa` is not a list"),
    (rb'{"id": "a", "text": "t", "qa": [{"question": "\udfff", "answer": "a"}]}', "bad_field", "`qa` is not a list"),
]


@pytest.mark.parametrize(
    ("line", "reason", "message"), BAD_LINES, ids=[f"{one[1]}-{n}" for n, one in enumerate(BAD_LINES)]
)
def test_bad_lines_name_their_reason(line, reason, message):
    with pytest.raises(BadDocument, match=message) as caught:
        document_from_bytes(line)
    assert caught.value.reason == reason and reason in DEAD_LETTER_REASONS
    assert "Fix: " in str(caught.value) and len(str(caught.value)) < 1000
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


def test_the_longest_text_is_accepted():
    assert len(document_from_mapping({"id": "a", "text": "x" * MAX_TEXT_BYTES}).text) == MAX_TEXT_BYTES


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("1970-01-01", 0),
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1969-12-31T23:59:59.999999", -1),
        ("1970-01-01T01:00:00+01:00", 0),
        (date(1970, 1, 2), 86_400_000_000),
        (datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 5), 5),
        (" 1970-01-02 ", 86_400_000_000),
    ],
)
def test_timestamps(value, expected):
    assert parse_timestamp(value) == expected


zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 30), timezones=zones))
def test_timestamps_survive_writing_and_reading(moment):
    micros = parse_timestamp(moment.isoformat())
    assert micros is not None
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros) == moment
    assert pa.scalar(micros, pa.timestamp("us")).cast(pa.int64()).as_py() == micros


def test_keys_are_those_of_before():
    """Typed out: a key that changed would make every stored document a stranger."""
    assert document_key("doc", SALT) == 3388809709781274785
    assert document_key("doc", bytes(16)) != document_key("doc", SALT)
    one = Document("doc", "text", event_time=5)
    assert one.key(SALT) == document_key("doc", SALT)
    assert one.content_hash(SALT).hex() == "c04fb46e019ebada6a36bbd7ddbbf5b6"


document = st.builds(
    Document,
    doc_id=st.just("a"),
    text=st.sampled_from(["x", "y"]),
    title=st.sampled_from([None, "x", "y"]),
    uri=st.sampled_from([None, "x"]),
    event_time=st.sampled_from([None, 0, 1]),
    qa=st.sampled_from([(), (("x", "y"),), (("y", "x"),)]),
)


@given(document, document)
def test_content_hashes_are_equal_exactly_when_contents_are(one, other):
    assert (one.content_hash(SALT) == other.content_hash(SALT)) == (one == other)


def test_the_json_schema_agrees_with_the_reader():
    assert DOCUMENT_JSON_SCHEMA["required"] == ["text"]
    properties = DOCUMENT_JSON_SCHEMA["properties"]
    assert isinstance(properties, dict)
    assert set(properties) == {"id", "doc_id", "text", "title", "uri", "timestamp", "qa"}
