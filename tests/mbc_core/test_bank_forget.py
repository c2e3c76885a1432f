"""Forgetting: tombstones, mentions, the committer that notices, readers beside it, wrong use."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bank_rows import key_of, make_bank, make_slice, numbered, shown
from hypothesis import given
from hypothesis import strategies as st
from traces import Planted, traces

from mbc_core.adapters import FILES, AdapterRegistry
from mbc_core.bank import (
    Bank,
    SliceId,
    SliceRows,
    begin_slice,
    commit,
    commit_slice,
    save_statistics,
    write_slice_rows,
)
from mbc_core.bank import forget as forget_module
from mbc_core.bank.forget import forget, receipt_of, unfinished
from mbc_core.bank.mentions import Mentions
from mbc_core.bank.recheck import JudgedAt
from mbc_core.bank.tombstones import Tombstones, load_tombstones, read_tombstones, tombstone_files, tombstone_of
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.errors import DamagedFile, UsageError

GONE = "x0004"
KEY = key_of(GONE)


def add(bank: Bank, name: str, documents, **more) -> bool:
    return commit_slice(bank, make_slice(name, "0", documents, **more), name, "0")


def planted(bank: Bank | None = None) -> Planted:
    found = Planted(GONE, [f"About {GONE}", f"What of {GONE}?", f"text of {GONE}", "other words"])
    if bank is not None:
        found.learn(bank)
    return found


@pytest.fixture
def bank(tmp_path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    for number in range(3):
        add(bank, f"r{number}", numbered(3 * number, 3), passages=2, dead=1)
    return bank


# ------------------------------------------------------------------------------------------------------- tombstones


def test_a_tombstone_is_not_the_key_and_needs_the_banks_salt():
    stone = tombstone_of(KEY, b"0" * 16)
    assert len(stone) == 16 and KEY.to_bytes(8, "little", signed=True) not in stone
    assert stone != tombstone_of(KEY, b"1" * 16) and stone != tombstone_of(KEY + 1, b"0" * 16)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30), st.sets(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_forgotten_keys_are_found_in_any_order_and_number(keys, gone):
    stones = Tombstones(b"s" * 16, frozenset(tombstone_of(one, b"s" * 16) for one in gone))
    assert stones.forgotten(np.array(keys, np.int64)).tolist() == [one in gone for one in keys]


def test_an_old_bank_has_no_tombstones(bank):
    assert tombstone_files(bank) == [] and len(load_tombstones(bank)) == 0
    assert unfinished(bank) == []


def test_damaged_tombstones_are_refused(bank):
    forget(bank, [GONE])
    (path,) = tombstone_files(bank)
    bank.storage.replace(path, bank.storage.read_bytes(path)[:-1] + b"X")
    fresh = Bank.open(bank.uri)
    forget_module.load_tombstones.__globals__["_read"].cache_clear()
    with pytest.raises(DamagedFile, match="does not match its digest"):
        fresh.tombstones()


# --------------------------------------------------------------------------------------------------------- mentions


@pytest.mark.parametrize(
    "raw",
    [
        b'{"id": "a/b-7", "text": ""}', b'{"id":"a\\/b-7"', b"a/b-7,some,csv", b'"a/b-7"', b"x a/b-7", b"a/b-7",
        "a/b-7 in UTF-16".encode("utf-16-le"), b'{"doc_id": "a\\u002fb-7"}', b"cut off at a/b-",
    ],
)  # fmt: skip
def test_ids_are_found_however_they_are_spelt(raw):
    assert Mentions(["else", "a/b-7"]).places({"raw": raw, "message": "", "source": ""}) == {1}


@pytest.mark.parametrize("raw", [b"a/b-77", b"xa/b-7", b"a/b-7_", b"a-b-7", b"", b"a/b"])
def test_other_ids_are_not(raw):
    assert Mentions(["else", "a/b-7"]).places({"raw": raw, "message": "", "source": ""}) == set()


def test_ids_are_found_in_message_and_source_and_many_at_once():
    ids = [f"doc{number}" for number in range(1000)]
    letter = {"raw": b"doc3 and doc999", "message": "the id doc17 is bad", "source": "folder/doc5.txt"}
    assert Mentions(ids).places(letter) == {3, 999, 17, 5}
    assert Mentions(["é"]).places({"raw": '{"id": "é"}'.encode("latin-1"), "message": "", "source": ""}) == {0}
    assert Mentions(["12"]).places({"raw": b'{"id": 12}', "message": "", "source": ""}) == {0}


# ---------------------------------------------------------------------------------------------------- what is counted


def test_counts_and_receipts_over_several_calls(bank):
    first = forget(bank, [GONE, "nobody", GONE])
    assert (first["forgotten"], first["not_found"]) == (1, 1)
    receipt = json.loads(Path(first["receipt"]).read_text())
    assert receipt["removed"] == {"codes": 2, "documents": 1, "replay": 1, "dead_letter": 0, "statistics": 0}
    again = forget(bank, [GONE, "nobody"])
    assert again == {"forgotten": 0, "not_found": 2, "receipt": first["receipt"]}
    more = forget(bank, [GONE, "x0005"])
    assert (more["forgotten"], more["not_found"]) == (1, 1) and more["receipt"] != first["receipt"]
    assert shown(bank) == sorted((f"x{n:04d}", p) for n in range(9) for p in range(2) if n not in (4, 5))
    assert unfinished(bank) == []


def test_an_interrupted_run_is_taken_up_with_its_first_moment(bank, monkeypatch):
    since = min(row["added_at"] for row in bank.read("documents").to_pylist() if row["doc_id"] == GONE)
    monkeypatch.setattr(forget_module, "clear_log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forget(bank, [GONE])
    monkeypatch.undo()
    (path,) = unfinished(bank)
    result = forget(bank, ["x0005", GONE])
    assert (result["forgotten"], result["not_found"]) == (2, 0)
    assert unfinished(bank) == [] and not bank.storage.exists(path), "its file was taken over"
    (path,) = tombstone_files(bank)
    assert bank.storage.locate(receipt_of(path)) == result["receipt"]
    moments = read_tombstones(bank, path)
    assert moments[tombstone_of(KEY, bank.manifest.salt)] == round(since.timestamp() * 1e6)


def test_the_receipt_names_codebooks_and_adapters_of_the_time(bank):
    registry = AdapterRegistry(bank)
    files = dict.fromkeys(FILES, b"x")
    version = registry.save_candidate(files, {"steps": 1}, "f" * 64)
    told = json.loads(Path(forget(bank, [GONE])["receipt"]).read_text())
    assert told["adapters"] == [version] and told["codebooks"] == []
    time.sleep(1.1)  # cards tell time in seconds
    add(bank, "late", [("new", "text")])
    assert json.loads(Path(forget(bank, ["new"])["receipt"]).read_text())["adapters"] == []


@pytest.mark.parametrize(("ids", "text"), [([], "no documents are named"), (["a", ""], "this is no document's id")])
def test_wrong_ids_are_refused(bank, ids, text):
    with pytest.raises(UsageError, match=text):
        forget(bank, ids)
    assert tombstone_files(bank) == []


# ------------------------------------------------------------------------------------------ beside a running ingest


def prepared(bank: Bank, rows: SliceRows, slice_id: SliceId) -> SliceRows:
    """The rows as files, as workers write them."""
    tables = {"codes": rows.codes, "documents": rows.documents, "replay": rows.replay, "dead_letter": rows.dead_letters}
    files = {name: [write_slice_rows(bank, name, part, slice_id)] for name, part in tables.items() if part.num_rows}
    return SliceRows(
        files.get("codes", []), files.get("documents", []), files.get("replay", []), files.get("dead_letter", []),
        rows.ledger,
    )  # fmt: skip


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("moment", ["start", "replay", "documents", "dead_letter", "codes", "ledger"])
def test_the_committer_notices_whenever_the_document_was_forgotten(bank, monkeypatch, moment, judged, as_files):
    """Forgotten just before each commit of a slice that revises the document; the slice's other documents stay."""
    lookup, original, told = planted(bank), commit.commit_files, []

    def in_between(bank_, table, *rest):
        if table == moment and not told:
            told.append(table)
            forget(bank, [GONE])
        return original(bank_, table, *rest)

    rows = make_slice("late", "0", [(GONE, "other words"), ("new", "text")], passages=2, dead=1)
    slice_id = begin_slice(bank, "late", "0")
    if as_files:
        rows = prepared(bank, rows, slice_id)
    lookup.payloads += [row["address"] for row in make_slice("x", "0", [(GONE, "other words")]).codes.to_pylist()]
    if moment == "start":
        told.append(moment)
        forget(bank, [GONE])
        if as_files:  # forget found the document in the files, and deleted them: the slice is made anew
            with pytest.raises(DamagedFile, match="missing"):
                commit_slice(bank, rows, "late", "0", slice_id=slice_id)
            slice_id = begin_slice(bank, "late", "0")
            rows = prepared(bank, make_slice("late", "0", [(GONE, "other words"), ("new", "text")], dead=1), slice_id)
    monkeypatch.setattr(commit, "commit_files", in_between)
    given = JudgedAt(bank.table("codes").version()) if judged else None
    try:
        assert commit_slice(bank, rows, "late", "0", slice_id=slice_id, judged=given)
    except DamagedFile as error:  # the same, in the middle
        assert as_files and "missing" in str(error)
        monkeypatch.undo()
        slice_id = begin_slice(bank, "late", "0")
        rows = prepared(bank, make_slice("late", "0", [(GONE, "other words"), ("new", "text")], dead=1), slice_id)
        assert commit_slice(bank, rows, "late", "0", slice_id=slice_id, judged=given)
    assert told
    ids = [name for name, _ in shown(bank)]
    assert GONE not in ids and "new" in ids and len(set(ids)) == 9
    assert traces(bank, lookup, bytes.hex) == []
    ledger = [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == "late"]
    if moment != "ledger":  # else it was visible for a moment, and counts as ingested
        assert [(row["documents"], json.loads(row["dead_letters"])) for row in ledger] == [
            (1, {"forgotten": 1, "no_text": 1})
        ]
        letters = [row for row in bank.read("dead_letter").to_pylist() if row["reason"] == "forgotten"]
        assert [(row["key"], row["raw"], row["source"], row["position"]) for row in letters] == [(None, None, "", 0)]
    assert bank.inspect(verify=True)["problems"] == []


def test_statistics_of_the_slice_lose_the_documents_vectors(bank):
    forget(bank, [GONE])
    keys = np.array([KEY, key_of("new")])
    vectors = np.full((2, bank.manifest.slots, bank.manifest.width), 0.5, np.float32)
    codes = np.zeros((2, bank.manifest.slots), np.uint16)
    found = BatchStatistics.of(bank.codebook(0), vectors, codes, keys, np.zeros(2, np.int32))
    path = save_statistics(bank, "late", "0", "2024-07-01T00:00:00Z", found)
    add(bank, "late", [(GONE, "other words"), ("new", "text")], statistics=path)
    assert not bank.storage.exists(path)
    (named,) = [row["statistics"] for row in bank.read("ledger").to_pylist() if row["statistics"]]
    left = BatchStatistics.from_bytes(bank.storage.read_bytes(named), named)
    assert set(left.candidates.keys.tolist()) == {key_of("new")} and left.vectors == found.vectors
    forget(bank, ["new"])
    (named,) = [row["statistics"] for row in bank.read("ledger").to_pylist() if row["statistics"]]
    assert len(bank.storage.list("codebooks/pending")) == 1
    assert not len(BatchStatistics.from_bytes(bank.storage.read_bytes(named), named).candidates.keys)
    assert bank.codebooks().pending_windows == ("2024-07-01T00:00:00Z",)


def test_readers_read_again_what_was_forgotten_under_them(bank, monkeypatch):
    original, seen = Bank.read_file, []

    def in_between(self, table, path, columns=None):
        if table == "documents" and not seen:
            seen.append(table)
            forget(bank, [GONE])
        return original(self, table, path, columns)

    want = [row for row in bank.passages().to_pylist() if row["doc_id"] != GONE]
    monkeypatch.setattr(Bank, "read_file", in_between)
    assert bank.passages().to_pylist() == want and seen


def test_a_missing_file_is_still_an_error(bank):
    (path, _), *_ = bank.files("documents")
    bank.storage.delete(f"documents/{path}")
    with pytest.raises(DamagedFile, match="is missing"):
        bank.passages()


def test_as_of_reads_of_other_documents_stay_the_same(bank):
    moments = sorted(set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()))
    add(bank, "again", [("x0001", "changed"), (GONE, "changed")], passages=1)
    want = {one: [row for row in bank.passages(one).to_pylist() if row["doc_id"] != GONE] for one in (*moments, None)}
    forget(bank, [GONE])
    assert {one: bank.passages(one).to_pylist() for one in want} == want
    assert len(want[moments[0]]) == 6 and bank.documents([KEY]) == {}
