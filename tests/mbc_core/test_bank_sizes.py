"""Bytes a passage on storage, logs included, with the demo's own documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bank_rows import SALT

from mbc_core.assets import Assets
from mbc_core.bank import Bank, SliceRows, commit_slice
from mbc_core.codebook.files import Codebook
from mbc_core.codes import code_size
from mbc_core.corpus import demo_documents, load_articles
from schemas.document import Document, document_from_mapping
from schemas.manifest import PROFILES, Manifest
from schemas.tables import CODES, DEAD_LETTER, DOCUMENTS, LEDGER, REPLAY

SLICE = 5_000
MAC_FLOATS_SMOLLM2_T12 = 27_648


def _bank(where: Path, profile: str) -> Bank:
    slots, words = PROFILES[profile].slots, PROFILES[profile].words
    book = Codebook.first(np.eye(512, 384 // slots, dtype=np.float32), np.ones(512))
    settings = Manifest(profile, "e", slots, 512, 384 // slots, words, "r", key_salt=SALT)
    return Bank.create(where, settings, book)


def _fill(bank: Bank, documents: list[Document]) -> None:
    """One passage a document: random addresses (incompressible, as codes nearly are), word codes by a Zipf law."""
    rng = np.random.default_rng(0)
    law = 1 / (np.arange(61_440) + 2.7)
    for start in range(0, len(documents), SLICE):
        part = documents[start : start + SLICE]
        words = rng.choice(61_440, (len(part), bank.manifest.words), p=law / law.sum()).astype("<u2")
        common = {
            "key": [one.key(bank.manifest.salt) for one in part],
            "event_time": [one.event_time for one in part],
        }
        windows = [np.datetime64(one.event_time, "us").astype("datetime64[D]") for one in part]
        codes = {
            "passage": [0] * len(part),
            "window": [f"{day}T00:00:00Z" for day in windows],
            "address": [rng.bytes(code_size(bank.manifest.slots)) for _ in part],
            "words": [one.tobytes() for one in words],
            "codebook_version": [int((day - windows[0]).astype(int)) % 7 for day in windows],
        }
        rows = {
            "doc_id": [one.doc_id for one in part],
            "title": [one.title for one in part],
            "uri": [one.uri for one in part],
            "content_hash": [one.content_hash(bank.manifest.salt) for one in part],
            "text_zstd": [None] * len(part),
        }
        ledger = {"ingest_id": "size", "slice": str(start), "window": "undated", "pane": 0, "documents_in": len(part)}
        ledger |= {"documents": len(part), "passages": len(part), "duplicates": 0, "replaced": 0}
        ledger |= {"dead_letters": "{}", "codebook_version": 0, "statistics": None}
        commit_slice(
            bank,
            SliceRows(
                codes=_columns(common | codes, CODES),
                documents=_columns(common | rows, DOCUMENTS),
                replay=_columns({}, REPLAY),
                dead_letters=_columns({}, DEAD_LETTER),
                ledger=_columns({name: [value] for name, value in ledger.items()}, LEDGER),
            ),
            "size",
            str(start),
        )


def _columns(columns: dict[str, list], schema: pa.Schema) -> pa.Table:
    schema = pa.schema([one for one in schema if one.name != "added_at"])
    return pa.table([pa.array(columns.get(one.name, []), one.type) for one in schema], schema=schema)


def _stored(bank: Bank, table: str, column: str) -> int:
    """Compressed bytes of one column in all files of a table."""
    total = 0
    for path, _ in bank.files(table):
        metadata = pq.ParquetFile(Path(bank.uri) / table / path).metadata
        for group in range(metadata.num_row_groups):
            parts = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
            total += sum(part.total_compressed_size for part in parts if part.path_in_schema == column)
    return total


@pytest.fixture(scope="module")
def documents(assets: Assets) -> list[Document]:
    return [document_from_mapping(one) for one in demo_documents(load_articles(assets.wiki))]


def test_default_profile(tmp_path, documents):
    bank = _bank(tmp_path / "bank", "default")
    _fill(bank, documents)
    found = bank.inspect()
    count = found["passages"]
    assert count == len(documents) == 10_033
    words = _stored(bank, "codes", "words") / count
    rest = found["bytes_per_passage"]["codes_table"] - code_size(24) - words
    print(json.dumps(found["bytes_per_passage"] | {"words_stored": words, "rest": rest}))
    assert words <= 48 and rest <= 11
    assert found["bytes_per_passage"]["codes_table"] <= 86


def test_paper_profile_is_at_most_three_thousandths_of_the_floats(tmp_path, documents):
    bank = _bank(tmp_path / "bank", "paper")
    _fill(bank, documents)
    found = bank.inspect()["bytes_per_passage"]
    print(json.dumps(found))
    assert found["all_in"] <= 0.003 * MAC_FLOATS_SMOLLM2_T12
