"""`inspect --verify`: each kind of damage alone is found, by the name of what is damaged and with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bank_crash import next_codebook
from bank_rows import SLOTS, codebook, key_of, make_bank, make_slice, numbered, window

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import (
    Bank,
    PreparedFile,
    begin_slice,
    commit_files,
    commit_slice,
    register_codebook,
    save_statistics,
    write_slice_rows,
)
from mbc_core.bank.parquet import conform, delta_statistics, digest, to_bytes
from mbc_core.bank.tombstones import tombstone_of, write_tombstones
from mbc_core.bank.verify import verify
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codes import quantize
from mbc_core.errors import DamagedFile


class Even:
    """A lexicon that reads nothing but even bytes."""

    digest = "bb" * 32

    def read(self, stored: bytes) -> str:
        if any(one % 2 for one in stored):
            raise DamagedFile("odd", cause="a test", fix="none")
        return stored.hex()


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Two slices with dead letters, waiting statistics, an adapter that is live, and a second codebook version."""
    bank = make_bank(tmp_path / "bank")
    path = save_statistics(bank, "one", "0", window(0), statistics())
    commit_slice(bank, make_slice("one", "0", numbered(0, 5), passages=2, dead=3, statistics=path), "one", "0")
    commit_slice(bank, make_slice("two", "0", [("x0000", "revised"), ("new", "text")], day=2), "two", "0")
    register_codebook(bank, next_codebook(), ingest_id="two", slice_name="0")
    files = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}
    registry = AdapterRegistry(bank)
    registry.promote(registry.save_candidate(files, {}, "base"), "better")
    assert bank.inspect(verify=True)["problems"] == []
    return bank


def statistics() -> BatchStatistics:
    book = codebook()
    z = np.random.default_rng(1).standard_normal((6, SLOTS, book.width)).astype(np.float32)
    return BatchStatistics.of(book, z, quantize(z, book.codewords), np.arange(6), np.zeros(6, np.int32))


def root(bank: Bank) -> Path:
    return Path(bank.uri)


def shard(bank: Bank, table: str) -> Path:
    return root(bank) / table / bank.files(table)[0][0]


def problems(bank: Bank) -> list[str]:
    found = Bank.open(bank.uri).inspect(verify=True)
    assert found["ok"] == (not found["problems"])
    assert json.loads(json.dumps(found)) == found
    return found["problems"]


def one_problem(bank: Bank, *texts: str) -> None:
    """Exactly one line says all of this; others may follow from the same damage."""
    found = problems(bank)
    matching = [line for line in found if all(text in line for text in texts)]
    assert len(matching) == 1, found
    assert "Likely cause: " in matching[0] and "Fix: " in matching[0]


TABLES = ["codes", "documents", "replay", "ledger", "dead_letter", "codebook_versions", "adapters/live"]


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_file_of_any_table(bank, table):
    path = shard(bank, table)
    path.unlink()
    one_problem(bank, f"the bank's file {path} is missing", "Fix: restore the file from a copy")


@pytest.mark.parametrize("table", TABLES)
def test_a_flipped_bit_in_any_table(bank, table):
    path = shard(bank, table)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    one_problem(bank, f"the bank's file {path} does not match its digest", "Fix: restore the file from a copy")


def test_a_file_cut_short(bank):
    path = shard(bank, "documents")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:77])
    one_problem(bank, f"{path} has 77 bytes; the log of `documents` recorded {size}", "Fix: restore the file")


def test_a_lost_log(bank):
    for one in (root(bank) / "replay/_delta_log").iterdir():
        one.unlink()
    one_problem(bank, f"the bank's table {root(bank)}/replay is not there", "Fix: restore it from a copy")


def commit_rows(bank: Bank, table: str, rows: pa.Table, *, records: int | None = None) -> str:
    """Append a file as another program could: a whole commit that no slice stands behind."""
    data = to_bytes(table, conform(table, rows))
    path = f"hand/x-{digest(data)}.parquet"
    bank.storage.write_new(f"{table}/{path}", data)
    told = json.loads(delta_statistics(rows)) | ({} if records is None else {"numRecords": records})
    commit_files(bank, table, [PreparedFile(path, len(data), rows.num_rows, json.dumps(told))], f"hand/{path}")
    return f"{root(bank)}/{table}/{path}"


def test_a_log_that_counts_other_rows(bank):
    rows = bank.read("replay").slice(0, 2)
    where = commit_rows(bank, "replay", rows, records=9)
    one_problem(bank, f"{where} holds 2 rows; the log of `replay` recorded 9", "Fix: restore the table from a copy")


def changed(bank: Bank, **columns: object) -> pa.Table:
    """The first row of codes as a new document, with other values."""
    (row,) = bank.read("codes").slice(0, 1).to_pylist()
    return pa.Table.from_pylist([row | columns], bank.read("codes").schema)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"address": b"short"}, "1 addresses do not have 27 bytes in {where}"),
        ({"words": b"1234567"}, "1 passages have a broken word payload (at most 6 bytes) in {where}"),
        ({"window": "2024-07-09T00:00:00Z"}, "1 passages are in another window than their time says in {where}"),
        ({"window": "soon"}, "1 passages are in another window than their time says in {where}"),
        ({"codebook_version": 7}, "codes name codebook version 7, which is not registered"),
        ({"passage": 1}, "passages are there twice in codes"),
        ({"passage": 5}, "1 documents lack a passage in codes"),
        ({"key": 12345}, "1 rows of codes have no row in documents"),
        ({}, "the ledger says that slice 0 added 10 passages; codes hold 11 (ingest one)"),
    ],
)
def test_rows_of_codes_that_cannot_be(bank, columns, text):
    where = commit_rows(bank, "codes", changed(bank, **columns))
    one_problem(bank, text.format(where=where))


def test_words_that_cannot_be_decoded_are_counted_by_file(bank):
    odd = sum(any(one % 2 for one in words) for words in bank.read("codes")["words"].to_pylist()[:10])
    found = [line for line in verify(bank, Even())["problems"] if f"{root(bank)}/codes/one/" in line]
    assert len(found) == 1 and f"the words of {odd} passages cannot be decoded in {shard(bank, 'codes')}" in found[0]
    assert "Likely cause: they were written with another lexicon" in found[0] and "Fix: restore the file" in found[0]
    information = "\n".join(bank.inspect(verify=True)["information"])
    assert "The words were not decoded, only measured: the bank was made with another lexicon" in information


def test_another_salt(bank):
    text = (root(bank) / "manifest.json").read_text()
    (root(bank) / "manifest.json").write_text(text.replace(bank.manifest.key_salt, "f" * 32))
    one_problem(
        bank, f"7 rows of {root(bank)}/documents have another key than their id gives", "Fix: restore manifest.json"
    )


def test_content_hashes_of_another_length(bank):
    (row,) = bank.read("documents").slice(0, 1).to_pylist()
    commit_rows(bank, "documents", pa.Table.from_pylist([row | {"content_hash": b"x"}], bank.read("documents").schema))
    one_problem(bank, f"1 content hashes of {root(bank)}/documents do not have 16 bytes")


# -------------------------------------------------------------------------------------------- codebooks and adapters


def codebook_file(bank: Bank, version: int) -> Path:
    (path,) = (root(bank) / "codebooks").glob(f"{version:05d}-*.safetensors")
    return path


def test_a_missing_codebook(bank):
    path = codebook_file(bank, 1)
    path.unlink()
    one_problem(bank, f"the file {path} of codebook version 1 is missing", "Fix: restore the file from a copy")


def test_a_damaged_codebook(bank):
    path = codebook_file(bank, 0)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    one_problem(bank, str(path), "Fix: ")


def test_a_codebook_under_another_number(bank):
    rows = bank.read("codebook_versions").to_pylist()
    (row,) = [one for one in rows if one["version"] == 1]
    commit_rows(
        bank,
        "codebook_versions",
        pa.Table.from_pylist([row | {"version": 2, "parent": 1}], bank.read("codebook_versions").schema),
    )
    one_problem(bank, f"the file {codebook_file(bank, 1)} of codebook version 2 says it is version 1")


def test_a_gap_in_the_chain(bank):
    rows = bank.read("codebook_versions").to_pylist()
    commit_rows(
        bank,
        "codebook_versions",
        pa.Table.from_pylist([rows[-1] | {"version": 5}], bank.read("codebook_versions").schema),
    )
    one_problem(bank, "the bank's chain of codebook versions has gaps: [0, 1, 5]", "Fix: restore the table from a copy")


@pytest.mark.parametrize("damage", ["missing", "edited"])
def test_waiting_statistics(bank, damage):
    (path,) = (root(bank) / "codebooks/pending/one").iterdir()
    if damage == "missing":
        path.unlink()
        one_problem(bank, f"the statistics {path} of window {window(0)} in one/0 are missing", "Fix: restore the file")
    else:
        path.write_bytes(path.read_bytes() + b" ")
        one_problem(bank, f"the bank's file {path} does not match its digest")


def test_statistics_that_a_version_took_in_may_be_gone(bank):
    later = replace(next_codebook(), version=2, parent=1, built_from=(window(0),), last_window=window(0))
    register_codebook(bank, later, ingest_id="two", slice_name="0")
    (path,) = (root(bank) / "codebooks/pending/one").iterdir()
    path.unlink()
    assert problems(bank) == []


def test_an_adapter_whose_file_is_damaged_or_gone(bank):
    (version,) = AdapterRegistry(bank).versions()
    path = root(bank) / "adapters" / version / "adapter_model.safetensors"
    path.write_bytes(b"other")
    one_problem(bank, f"the adapter's file {path} does not match its digest", "Fix: restore it from a copy")
    for one in path.parent.iterdir():
        one.unlink()
    assert f"adapter {version} was made live, but its folder is gone" in "\n".join(problems(bank))


# ------------------------------------------------------------------------------------------------------------- ledger


def test_a_ledger_row_that_does_not_add_up(bank):
    wrong = make_slice("three", "0", numbered(10, 2))
    rows = [row | {"documents_in": 9} for row in wrong.ledger.to_pylist()]
    commit_slice(bank, replace(wrong, ledger=pa.Table.from_pylist(rows, wrong.ledger.schema)), "three", "0")
    one_problem(bank, f"ledger row three/0 window {window(0)}: 9 documents in, but 2 accounted for", "Fix: compare")


@pytest.mark.parametrize(("column", "value"), [("documents", 3), ("passages", 1)])
def test_a_ledger_that_tells_more_than_codes_hold(bank, column, value):
    wrong = make_slice("three", "0", numbered(10, 2))
    rows = [
        row | {column: value, "documents_in": row["documents_in"] + (column == "documents")}
        for row in wrong.ledger.to_pylist()
    ]
    commit_slice(bank, replace(wrong, ledger=pa.Table.from_pylist(rows, wrong.ledger.schema)), "three", "0")
    one_problem(bank, f"slice 0 added {value} {column}; codes hold 2 (ingest three)", "Fix: restore the tables codes")


def test_codes_without_a_ledger(bank):
    rows = make_slice("three", "0", numbered(10, 2))
    begun = begin_slice(bank, "three", "0")
    for table, given in (("documents", rows.documents), ("codes", rows.codes)):
        commit_files(bank, table, [write_slice_rows(bank, table, given, begun)], begun.app_id(table))
    one_problem(bank, "1 slices are in codes but not in the ledger", "Fix: run it again with the same ingest id")


def test_dead_letters_that_the_ledger_counts_and_the_table_lacks(bank):
    wrong = make_slice("three", "0", numbered(10, 1), dead=2)
    commit_slice(bank, replace(wrong, dead_letters=wrong.dead_letters.slice(0, 1)), "three", "0")
    one_problem(bank, "ingest three has 2 dead letters; the table dead_letter holds 1", "Fix: restore the tables")


# ---------------------------------------------------------------------------------------------------------- forgotten


def test_a_forgotten_document_that_is_still_there(bank):
    write_tombstones(bank, [(tombstone_of(key_of("x0001"), bank.manifest.salt), None)], 1_800_000_000_000_000)
    one_problem(bank, f"2 rows of {root(bank)}/codes belong to forgotten documents", "Fix: run `mbc forget`")
    one_problem(bank, f"1 rows of {root(bank)}/documents belong to forgotten documents")
    one_problem(bank, f"1 rows of {root(bank)}/replay belong to forgotten documents")
    one_problem(
        bank, "was interrupted", "the run died before its receipt was written", "Fix: run the same `mbc forget`"
    )


def test_a_damaged_file_of_tombstones(bank):
    path = root(bank) / write_tombstones(bank, [], 1_800_000_000_000_000)
    path.write_bytes(path.read_bytes()[:-9])
    one_problem(bank, f"the bank's file {path} does not match its digest")


# -------------------------------------------------------------------------------------------------------- no problems


def test_leftovers_are_information(bank):
    pq.write_table(bank.read("codes"), shard(bank, "codes").with_name("left.parquet"))
    (root(bank) / "documents/one/.tmp-1-abc").write_bytes(b"half")
    found = bank.inspect(verify=True)
    assert (found["ok"], found["problems"]) == (True, [])
    (line,) = [line for line in found["information"] if "belong to nothing" in line]
    assert line.startswith("2 files of ") and "codes/one/left.parquet" in line and "`mbc compact` deletes them" in line


def test_versions_used_up_are_information(bank, monkeypatch):
    monkeypatch.setattr("mbc_core.bank.verify.MOST_VERSIONS", 2)
    found = bank.inspect(verify=True)
    assert found["ok"] is True
    assert any(line.startswith("2 codebook versions are used up") for line in found["information"])
