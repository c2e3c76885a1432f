"""Elements and their coders: equal rows give equal bytes, counts add, samples do not depend on order."""

from __future__ import annotations

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.coders import registry
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinySpec, corpus

from mbc_core.errors import MbcError
from pipelines.coders import ArrowCoder, from_ipc, to_ipc
from pipelines.plain import EncodeRule, deal_by_key, encode_documents, packed_array, smallest_by_priority
from pipelines.records import (
    REPLAY_ROWS,
    CodeBatch,
    DeadLetters,
    DocumentBatch,
    EncodedBatch,
    Tally,
    WindowVectors,
    by_window,
    column,
    concat,
    embedding_array,
    embeddings_of,
    sum_tallies,
)
from pipelines.windows import window_of
from schemas.document import Document

SALT = b"0123456789abcdef"


def encoded(count=20) -> EncodedBatch:
    batch = DocumentBatch.of(corpus(count), SALT, 86_400)
    return encode_documents(TinySpec().load(), batch, EncodeRule(words=24))


def same(left, right) -> bool:
    return all(getattr(left, part).equals(getattr(right, part)) for part in left.parts)


ELEMENTS = {
    DocumentBatch: lambda: DocumentBatch.of(corpus(9), SALT, 86_400),
    EncodedBatch: encoded,
    WindowVectors: lambda: next(by_window(encoded().passages))[1],
}


@pytest.mark.parametrize("kind", ELEMENTS)
def test_elements_survive_their_registered_coder(kind):
    value = ELEMENTS[kind]()
    coder = registry.get_coder(kind)
    assert isinstance(coder, ArrowCoder)
    assert coder.is_deterministic()
    data = coder.encode(value)
    again = coder.decode(data)
    assert type(again) is kind
    assert same(value, again)
    assert coder.encode(again) == data


def test_every_element_class_has_a_coder_and_none_is_pickled():
    for kind in (DocumentBatch, EncodedBatch, WindowVectors, CodeBatch, DeadLetters, Tally):
        assert type(registry.get_coder(kind)).__name__ == f"{kind.__name__}Coder"


@given(
    rows=st.lists(st.tuples(st.one_of(st.none(), st.text(max_size=4)), st.one_of(st.none(), st.floats(0, 1)))),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
)
def test_a_slice_has_the_bytes_of_fresh_rows(rows, before, after):
    schema = pa.schema([("text", pa.string()), ("number", pa.float64())])

    def build(values):
        columns = [[text for text, _ in values], [number for _, number in values]]
        return pa.RecordBatch.from_arrays(
            [pa.array(one, field.type) for one, field in zip(columns, schema, strict=True)], schema=schema
        )

    fresh = build(rows)
    cut = build([("x", 0.5)] * before + rows + [(None, None)] * after).slice(before, len(rows))
    assert to_ipc(cut) == to_ipc(fresh)
    assert from_ipc(to_ipc(cut)).equals(fresh)


def test_embeddings_come_back_without_a_copy_also_from_a_slice():
    vectors = np.arange(20, dtype=np.float32).reshape(5, 4)
    rows = pa.RecordBatch.from_arrays([embedding_array(vectors)], ["embedding"])
    assert (embeddings_of(rows) == vectors).all()
    assert (embeddings_of(rows.slice(2, 2)) == vectors[2:4]).all()
    assert embeddings_of(rows).base is not None


def test_packed_addresses_are_the_rows_of_the_matrix():
    packed = np.random.default_rng(0).integers(0, 256, (7, 27), dtype=np.uint8)
    assert packed_array(packed).to_pylist() == [row.tobytes() for row in packed]
    assert packed_array(packed[:0]).to_pylist() == []


def test_by_window_keeps_every_passage_once():
    batch = encoded()
    parts = dict(by_window(batch.passages))
    assert sum(part.passages.num_rows for part in parts.values()) == batch.passages.num_rows
    for window, part in parts.items():
        keep = [one == window for one in batch.passages["window"].to_pylist()]
        assert (part.embeddings() == batch.embeddings()[keep]).all()


def code_batch(count) -> CodeBatch:
    batch = encoded(count)
    return CodeBatch(batch.documents, batch.passages, batch.replay)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_hold_whole_documents_and_every_row_once(shards):
    batch = code_batch(25)
    parts = dict(deal_by_key(batch, shards))
    assert len(parts) == shards
    for name in CodeBatch.parts:
        whole = sorted(column(getattr(batch, name), "key").tolist())
        assert sorted(key for one in parts.values() for key in column(getattr(one, name), "key").tolist()) == whole
    owners = [set(column(one.codes, "key").tolist()) for one in parts.values()]
    assert sum(len(one) for one in owners) == len(set.union(*owners)) == 25
    assert dict(deal_by_key(batch, shards)).keys() == parts.keys()


def test_replay_sample_is_the_same_in_any_order():
    rows = encoded(60).replay
    assert rows.num_rows > 40
    shuffled = rows.take(pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    first, second = (smallest_by_priority(one, 3) for one in (rows, shuffled))
    assert sorted(map(str, first.to_pylist())) == sorted(map(str, second.to_pylist()))
    taken = first["window"].value_counts().to_pylist()
    assert max(one["counts"] for one in taken) == 3
    for one in taken:
        priorities = sorted(r["priority"] for r in rows.to_pylist() if r["window"] == one["values"])
        assert sorted(r["priority"] for r in first.to_pylist() if r["window"] == one["values"]) == priorities[:3]
    assert smallest_by_priority(pa.RecordBatch.from_pylist([], REPLAY_ROWS), 3).num_rows == 0
    floor = {one["values"]: 2**63 for one in taken[:1]}
    for row in smallest_by_priority(rows, 1000, floor).to_pylist():
        assert row["priority"] <= 2**63 or row["window"] not in floor
    assert smallest_by_priority(rows, 1000, floor).num_rows < rows.num_rows


tallies = st.builds(
    Tally,
    window=st.just("w"),
    documents=st.integers(0, 5),
    passages=st.integers(0, 5),
    duplicates=st.integers(0, 5),
    replaced=st.integers(0, 5),
    dead_letters=st.dictionaries(st.sampled_from(["not_json", "no_id"]), st.integers(1, 3)),
    codebook_version=st.one_of(st.none(), st.just(4)),
)


@given(tallies, tallies, tallies)
def test_tallies_add_in_any_grouping_and_survive_bytes(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert (a + b).missing == a.missing + b.missing
    assert Tally.from_bytes(a.to_bytes()) == a


def test_a_lost_document_is_an_error_that_names_the_window():
    whole = [
        Tally("w", documents_in=3, documents=1),
        Tally("w", duplicates=1, dead_letters={"not_json": 1}),
        Tally("v"),
    ]
    assert [one.window for one in sum_tallies(whole)] == ["v", "w"]
    with pytest.raises(MbcError, match="the window w do not add up: '4 documents in, 1 of them unaccounted for'"):
        sum_tallies([*whole, Tally("w", documents_in=1)])
    with pytest.raises(MbcError, match="do not add up: '0 documents in, -1 of them"):
        sum_tallies([Tally("w", documents=1)])


@pytest.mark.parametrize(
    ("event_time", "seconds", "window"),
    [
        (None, 86_400, "undated"),
        (0, 86_400, "1970-01-01T00:00:00Z"),
        (-1, 86_400, "1969-12-31T00:00:00Z"),
        (1_719_900_000_000_000, 3_600, "2024-07-02T06:00:00Z"),
        (-62_135_596_800_000_000, 7 * 86_400, "0001-01-01T00:00:00Z"),
    ],
)
def test_windows_are_named_by_their_start(event_time, seconds, window):
    assert window_of(event_time, seconds) == window


def test_concat_of_one_is_itself():
    rows = pa.RecordBatch.from_pydict({"x": [1]})
    assert concat([rows]) is rows
    assert concat([rows, rows]).num_rows == 2


def test_a_document_batch_says_its_length():
    batch = DocumentBatch.of([Document("a", "Text.")], SALT, 86_400)
    assert len(batch) == 1
    assert isinstance(beam.coders.registry.get_coder(DocumentBatch).encode(batch), bytes)
