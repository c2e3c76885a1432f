"""Embeddings between the two passes over them: what is read back is what was written, and nothing stays behind."""

from __future__ import annotations

import errno
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.coders.typecoders import registry
from apache_beam.testing.util import assert_that
from tiny import RULE, SLOTS, TinySpec, codebook, corpus, rotation, settings, write_corpus

from mbc_core.errors import StorageError
from pipelines import graph
from pipelines.codebook_store import MemoryCodebooks
from pipelines.graph import options_of
from pipelines.ingest import run_ingest
from pipelines.plain import EncodeRule, encode_documents
from pipelines.records import DocumentBatch, EncodedBatch, by_window
from pipelines.spill import Spill, SpilledBatch, SpilledVectors
from pipelines.transforms import Quantize, UpdateCodebook

SALT = b"0123456789abcdef"


def encoded(count: int, start: int = 0) -> EncodedBatch:
    documents = DocumentBatch.of(corpus(count, start), SALT, 86_400)
    return encode_documents(TinySpec().load(), documents, EncodeRule(words=24))


def rows(batch: pa.RecordBatch) -> list:
    return sorted(map(str, batch.to_pylist()))


def test_a_batch_comes_back_as_it_was_but_for_the_order_of_its_passages(tmp_path):
    batch = encoded(40)
    found = SpilledBatch.write(tmp_path, batch).load()
    for part in EncodedBatch.parts:
        assert getattr(found, part).schema.equals(getattr(batch, part).schema)
        assert rows(getattr(found, part)) == rows(getattr(batch, part))


def test_each_window_is_read_alone(tmp_path):
    batch = encoded(60)
    spilled = SpilledBatch.write(tmp_path, batch)
    expected = {window: rows(one.passages) for window, one in by_window(batch.passages)}
    assert len(expected) == len(spilled.windows) == 5
    assert {window: rows(one.load().passages) for window, one in spilled.by_window()} == expected
    vectors = next(iter(spilled.by_window()))[1].load().embeddings()
    assert vectors.dtype == np.float32 and vectors.flags.c_contiguous


def test_a_batch_without_passages_or_questions_can_be_spilled(tmp_path):
    batch = encode_documents(TinySpec().load(), DocumentBatch.of([], SALT, 86_400), EncodeRule(words=24))
    found = SpilledBatch.write(tmp_path, batch)
    assert found.windows == () and found.load().passages.num_rows == 0


def test_a_retried_bundle_writes_the_same_files(tmp_path):
    first = SpilledBatch.write(tmp_path, encoded(9))
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert SpilledBatch.write(tmp_path, encoded(9)) == first
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before
    assert SpilledBatch.write(tmp_path, encoded(9, start=9)) != first


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipelines.spill.pq.ParquetWriter", full)
    with pytest.raises(StorageError, match=r"cannot be staged on the local disk.*the disk is full"):
        SpilledBatch.write(tmp_path, encoded(3))


@pytest.mark.parametrize("value", [SpilledBatch("/a/b", ("undated", "1970-01-01T00:00:00Z")), SpilledVectors("/a", 3)])
def test_names_travel_by_a_deterministic_coder(value):
    coder = registry.get_coder(type(value))
    assert coder.is_deterministic()
    assert coder.decode(coder.encode(value)) == value


def test_spilled_batches_give_the_same_versions_and_codes(tmp_path):
    """The same transforms, once over batches in memory and once over batches on disk."""
    batches = [encoded(30, start) for start in (0, 30, 60)]

    def keep(name):  # the check runs on a copy of itself: what it saw must leave by a file
        return lambda found: (tmp_path / name).write_text("\n".join(sorted(map(str, found))))

    for name in ("memory", "disk"):
        with beam.Pipeline(options=options_of([])) as pipeline:
            given = pipeline | beam.Create(batches).with_output_types(EncodedBatch)
            if name == "disk":
                given = given | Spill(tmp_path)
            codebooks = given | UpdateCodebook(MemoryCodebooks([codebook().to_bytes()], rule=RULE), rotation(), SLOTS)
            codes = given | Quantize(codebooks, rotation(), SLOTS)
            shown = codes | beam.FlatMap(lambda one: map(str, one.codes.to_pylist()))
            assert_that(shown, keep(f"{name} codes"), "codes")
            assert_that(codebooks.choices, keep(f"{name} choices"), "choices")
    for what in ("codes", "choices"):
        assert (tmp_path / f"disk {what}").read_text() == (tmp_path / f"memory {what}").read_text() != ""


def test_a_local_run_shuffles_names_and_leaves_nothing_behind(tmp_path, monkeypatch):
    folders = []

    def build(*args):
        folders.append(args[3])
        return plain_build(*args)

    plain_build = graph.build
    monkeypatch.setattr(graph, "build", build)
    given = settings(tmp_path, slice_documents=50)
    source = write_corpus(tmp_path / "a.jsonl", corpus(80))
    assert run_ingest([source], str(tmp_path / "bank"), given)["documents"] == 80
    assert len(folders) == 2
    assert not any(Path(one).exists() for one in folders)
    assert list((tmp_path / "staging").iterdir()) == []
