"""Tables: what Delta Lake and the design ask of them."""

from __future__ import annotations

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from schemas.tables import CODES, DOCUMENTS, LEDGER, REPLAY, SORT_ORDER, TABLES


def test_columns_are_those_of_the_design():
    assert CODES.names == ["key", "passage", "event_time", "added_at", "window", "address", "words", "codebook_version"]
    assert DOCUMENTS.names == ["key", "doc_id", "title", "uri", "content_hash", "event_time", "added_at", "text_zstd"]
    assert {"question", "answer", "key", "event_time", "split"} < set(REPLAY.names)
    counts = {"documents", "passages", "duplicates", "replaced", "dead_letters"}
    assert {"ingest_id", "window", "pane"} | counts < set(LEDGER.names)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_back_as_it_was_declared(name, tmp_path):
    table = DeltaTable.create(str(tmp_path / "table"), TABLES[name])
    assert pa.schema(table.schema()).equals(TABLES[name])


def test_every_table_has_an_order_of_its_own_columns():
    assert set(SORT_ORDER) == set(TABLES)
    assert all(set(order) <= set(TABLES[name].names) for name, order in SORT_ORDER.items())
