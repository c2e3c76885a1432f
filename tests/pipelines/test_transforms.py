"""The public transforms in somebody else's pipeline: each equals its plain twin."""

from __future__ import annotations

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that
from tiny import POISON, RULE, SLOTS, TinySpec, codebook, corpus, rotation

from mbc_core.codebook.files import Codebook
from mbc_core.codes import pack, quantize, to_slots
from pipelines.codebook_store import MemoryCodebooks
from pipelines.encoding import EncoderSpec, acquire, resolve, resolve_device
from pipelines.graph import error_of, options_of
from pipelines.plain import EncodeRule, encode_documents, encode_or_reject
from pipelines.read import StagedBatches
from pipelines.records import DocumentBatch, column, concat
from pipelines.transforms import Encode, Quantize, UpdateCodebook
from schemas.document import Document

SALT = b"0123456789abcdef"
RULES = EncodeRule(words=24)


def batches(documents, size) -> list[DocumentBatch]:
    return [DocumentBatch.of(documents[at : at + size], SALT, 86_400) for at in range(0, len(documents), size)]


def test_pipeline():
    return beam.Pipeline(options=options_of([]))


test_pipeline.__test__ = False


def rows_of(batch):
    return sorted(
        (row["key"], row["passage"], row["words"], tuple(row["embedding"])) for row in batch.passages.to_pylist()
    )


def test_encode_is_its_plain_twin_in_any_bundles():
    documents = corpus(30)
    whole = rows_of(encode_documents(TinySpec().load(), batches(documents, 30)[0], RULES))

    def check(found):
        assert sorted(row for one in found for row in rows_of(one)) == whole

    with test_pipeline() as pipeline:
        encoded = pipeline | beam.Create(batches(documents, 4)) | Encode(TinySpec(), RULES)
        assert_that(encoded.batches, check)
        assert_that(encoded.dead_letters, lambda found: found == [] or pytest.fail(str(found)))


def test_a_document_that_cannot_be_encoded_does_not_take_its_neighbours_along():
    documents = [*corpus(5), Document("bad", f"{POISON}!", event_time=0), *corpus(5, start=50)]
    batch, letters = encode_or_reject(TinySpec().load(), batches(documents, 11)[0], RULES)
    assert batch.documents["doc_id"].to_pylist() == [one.doc_id for one in documents if one.doc_id != "bad"]
    (row,) = letters.rows.to_pylist()
    assert (row["reason"], row["window"], row["raw"]) == ("encode_failed", "1970-01-01T00:00:00Z", b"POISON!")


@pytest.mark.parametrize("trouble", [MemoryError("out of memory"), OSError(5, "input/output error")])
def test_trouble_of_the_machine_is_no_dead_letter(trouble):
    class Broken:
        width = 4

        def count_pieces(self, text):
            return 1

        def encode(self, texts, progress=None):
            raise trouble

    loaded = TinySpec().load()
    broken = type(loaded)(Broken(), loaded.lexicon)
    with pytest.raises(type(trouble)):
        encode_or_reject(broken, batches(corpus(3), 3)[0], RULES)


def test_a_bank_without_word_codes_stores_none_but_still_asks_questions():
    batch = encode_documents(TinySpec().load(), batches(corpus(10), 10)[0], EncodeRule(words=0))
    assert set(batch.passages["words"].to_pylist()) == {b""}
    assert batch.replay.num_rows == 10
    assert (
        encode_documents(TinySpec().load(), batches(corpus(9), 9)[0], EncodeRule(0, replay=False)).replay.num_rows == 0
    )


def test_quantize_with_one_codebook_is_the_core():
    documents = corpus(20)
    plain = encode_documents(TinySpec().load(), batches(documents, 20)[0], RULES)
    book = codebook()
    expected = pack(quantize(to_slots(plain.embeddings(), rotation(), SLOTS), book.codewords))
    keys = zip(column(plain.passages, "key").tolist(), column(plain.passages, "passage").tolist(), strict=True)
    wanted = {place: row.tobytes() for place, row in zip(keys, expected, strict=True)}

    def check(found):
        rows = [row for one in found for row in one.codes.to_pylist()]
        assert {(row["key"], row["passage"]): row["address"] for row in rows} == wanted
        assert {row["codebook_version"] for row in rows} == {0}

    with test_pipeline() as pipeline:
        encoded = pipeline | beam.Create(batches(documents, 3)) | Encode(TinySpec(), RULES)
        assert_that(encoded.batches | Quantize(book, rotation(), SLOTS), check)


def test_update_codebook_lags_two_windows_and_feeds_quantize():
    """Version choices written out: nobody may see a codebook made from the window before its own."""
    documents = [
        Document(f"{day}-{number}", f"Day{day} word{number} other{number % 5} more.", event_time=day * 86_400_000_000)
        for day in range(6)
        for number in range(45)
    ]
    store = MemoryCodebooks([codebook().to_bytes()], rule=RULE)
    names = [f"1970-01-0{day + 1}T00:00:00Z" for day in range(6)]

    def check_choices(found):
        assert sorted(found) == list(zip(names, [0, 0, 1, 2, 3, 4], strict=True))

    def check_versions(found):
        books = {version: Codebook.from_bytes(data, "test") for version, data in found}
        assert sorted(books) == [0, 1, 2, 3, 4]
        assert books[2].built_from == (names[1],)

    def check_codes(found):
        versions = {(row["window"], row["codebook_version"]) for one in found for row in one.codes.to_pylist()}
        assert sorted(versions) == list(zip(names, [0, 0, 1, 2, 3, 4], strict=True))

    with test_pipeline() as pipeline:
        encoded = pipeline | beam.Create(batches(documents, 17)) | Encode(TinySpec(), RULES)
        codebooks = encoded.batches | UpdateCodebook(store, rotation(), SLOTS)
        assert_that(codebooks.choices, check_choices, "choices")
        assert_that(codebooks.versions, check_versions, "versions")
        assert_that(encoded.batches | Quantize(codebooks, rotation(), SLOTS), check_codes, "codes")


def test_nothing_in_nothing_out():
    with test_pipeline() as pipeline:
        none = pipeline | beam.Create([]).with_output_types(DocumentBatch)
        encoded = none | Encode(TinySpec(), RULES)
        codebooks = encoded.batches | UpdateCodebook(MemoryCodebooks([codebook().to_bytes()]), rotation(), SLOTS)
        codes = encoded.batches | Quantize(codebooks, rotation(), SLOTS)
        assert_that(codes, lambda found: found == [] or pytest.fail(str(found)))


def test_the_encoder_is_loaded_once_a_process():
    assert acquire(TinySpec("one")).encoder is acquire(TinySpec("one")).encoder


def test_references_resolve_on_the_machine_that_uses_them(tmp_path):
    from mbc_core import weights

    assert resolve("weights:lexicon.json.gz") == weights.path("lexicon.json.gz")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")
    assert hash(EncoderSpec()) == hash(EncoderSpec())


def test_staged_batches_are_bounded_and_of_like_length(tmp_path):
    documents = [*corpus(40), Document("long", "word " * 3000)]
    rows = concat([one.documents for one in batches(documents, 41)])
    staged = StagedBatches.write(tmp_path / "b", rows, most=8, characters=5000)
    found = [staged.read(number).documents for number in range(staged.batches)]
    assert max(one.num_rows for one in found) == 8
    sizes = [len(text) for one in found for text in one["text"].to_pylist()]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 15_000, "a document larger than the bound still travels, alone"
    assert found[-1].num_rows == 1
    assert sorted(key for one in found for key in column(one, "key").tolist()) == sorted(np.sort(column(rows, "key")))


def test_errors_are_rebuilt_from_a_workers_traceback():
    text = (
        "Traceback (most recent call last):\n  File x\nmbc_core.errors.StorageError: the disk: 'x'. Fix: free some. "
        "[while running 'WriteCodes/WriteShard'].\n"
    )
    found = error_of(text)
    assert type(found).__name__ == "StorageError"
    assert str(found) == "the disk: 'x'. Fix: free some."
    assert error_of("ValueError: something else") is None
