"""Elements of the streaming graph: coders are exact and deterministic, documents survive as they were given."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
from apache_beam.coders import registry
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinySpec, corpus

from pipelines.plain import EncodeRule, encode_documents
from pipelines.plan import rejected_rows
from pipelines.readers import Rejected
from pipelines.records import STAGED, DeadLetters, DocumentBatch, staged_rows
from pipelines.stream_records import (
    KNOWN_ROWS,
    Arrived,
    StreamPart,
    WindowPane,
    arrived_rows,
    document_to_bytes,
    hashes_of,
    keys_of,
    times_of,
)
from schemas.document import Document, document_from_bytes

SALT = b"0123456789abcdef"
DAY = 86_400
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def part() -> StreamPart:
    batches = [DocumentBatch.of(corpus(5, start), SALT, DAY) for start in (0, 50)]
    encoded = tuple(encode_documents(TinySpec().load(), one, EncodeRule(24)) for one in batches)
    known = staged_rows(corpus(3, 90), SALT, DAY).select(KNOWN_ROWS.names)
    letters = DeadLetters(rejected_rows([Rejected("not_json", "no", "a.jsonl", 3, b"raw", "id")], SALT))
    return StreamPart(encoded, (known,), (letters,))


def rows_of(one: StreamPart):
    return (
        [[getattr(batch, name).to_pylist() for name in batch.parts] for batch in one.batches],
        [rows.to_pylist() for rows in one.known],
        [letters.rows.to_pylist() for letters in one.letters],
    )


def test_parts_and_panes_come_through_their_coders_byte_for_byte():
    given_part = part()
    pane = WindowPane("1970-01-01T00:00:00Z", DAY, 3, 2, given_part)
    for one in (given_part, StreamPart(), StreamPart(letters=given_part.letters)):
        coder = registry.get_coder(StreamPart)
        assert coder.is_deterministic()
        assert rows_of(coder.decode(coder.encode(one))) == rows_of(one)
        assert coder.encode(coder.decode(coder.encode(one))) == coder.encode(one)
    coder = registry.get_coder(WindowPane)
    back = coder.decode(coder.encode(pane))
    assert dataclasses.astuple(dataclasses.replace(back, part=StreamPart())) == dataclasses.astuple(
        dataclasses.replace(pane, part=StreamPart())
    )
    assert rows_of(back.part) == rows_of(given_part)
    assert coder.encode(back) == coder.encode(pane)


def test_parts_are_joined_in_order():
    one, other = part(), StreamPart(known=part().known)
    joined = StreamPart.concat([one, other])
    assert (len(joined.batches), len(joined.known), len(joined.letters)) == (2, 2, 1)
    assert StreamPart.concat([]).batches == ()


@given(
    st.builds(
        Document,
        TEXT.filter(bool),
        TEXT.filter(lambda text: text.strip()),
        title=st.none() | TEXT.filter(bool),
        uri=st.none() | TEXT.filter(bool),
        event_time=st.none() | st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
        qa=st.lists(st.tuples(*[TEXT.filter(lambda text: text.strip())] * 2), max_size=2).map(tuple),
    )
)
def test_a_document_survives_its_bytes(document):
    assert document_from_bytes(document_to_bytes(document)) == document


def test_a_document_without_a_date_takes_its_arrivals_and_keeps_its_content_hash():
    dated, undated = Document("a", "Text.", event_time=5 * DAY * 1_000_000), Document("b", "Text.")
    moment = 3 * DAY * 1_000_000 + 7
    rows = arrived_rows([Arrived.of(dated, moment), Arrived.of(undated, moment)], SALT, DAY)
    assert rows.schema.equals(STAGED)
    assert rows["window"].to_pylist() == ["1970-01-06T00:00:00Z", "1970-01-04T00:00:00Z"]
    assert times_of(rows).tolist() == [dated.event_time, moment]
    assert hashes_of(rows).tobytes() == dated.content_hash(SALT) + undated.content_hash(SALT)
    assert keys_of(rows).tolist() == [dated.key(SALT), undated.key(SALT)]
    plain = staged_rows([undated], SALT, DAY)
    assert times_of(plain)[0] < 0 and pa.compute.is_null(plain["event_time"])[0].as_py()
