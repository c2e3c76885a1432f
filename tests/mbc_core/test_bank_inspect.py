"""inspect: its figures against what was added, and its keys against the published list."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bank_rows import ADDRESS, CODEWORDS, SLOTS, WORDS, make_bank, make_slice, numbered, window

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank, begin_slice, commit_slice, write_slice_rows
from mbc_core.bank.sweep import unreferenced
from mbc_core.errors import StorageError, UsageError
from schemas import results


class Numbers:
    """A lexicon whose words are the codes themselves."""

    digest = "bb" * 32

    def read(self, stored):
        return " ".join(str(stored[at] + 256 * stored[at + 1]) for at in range(0, len(stored), 2))


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    commit_slice(bank, make_slice("one", "0", numbered(0, 5), passages=2, dead=3), "one", "0")
    commit_slice(bank, make_slice("two", "0", [("x0000", "revised"), ("new", "text")], day=2), "two", "0")
    return bank


def test_counts_are_those_of_visible_documents(bank):
    found = bank.inspect()
    assert (found["documents"], found["passages"], found["dead_letters"], found["windows"]) == (6, 10, 3, 2)
    book = {"version": 0, "K": CODEWORDS, "T": SLOTS, "used": CODEWORDS, "resets": 0}
    assert found["codebook"] == book | {"perplexity": pytest.approx(CODEWORDS)}
    assert found["adapter"] is None


def test_bytes_are_those_of_the_store(bank):
    def below(*folders):
        paths = [path for folder in folders for path in (Path(bank.uri) / folder).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in paths)

    sizes = bank.inspect()["bytes"]
    assert sizes["codes"] == below("codes") and sizes["documents"] == below("documents")
    assert sizes["replay"] == below("replay") and sizes["adapters"] == below("adapters")
    assert sizes["codebooks"] == below("codebooks", "codebook_versions")
    assert sizes["total"] == below(".") == sum(size for name, size in sizes.items() if name != "total")
    per = bank.inspect()["bytes_per_passage"]
    assert per == {
        "address": ADDRESS,
        "words": 2 * WORDS,
        "codes_table": sizes["codes"] / 10,
        "all_in": (sizes["codes"] + sizes["documents"]) / 10,
    }


def test_keys_are_the_published_ones(bank):
    found = bank.inspect(verify=True)
    assert set(found) == set(results.VerifiedInspectResult.__annotations__)
    assert set(found["bytes"]) == set(results.BankBytes.__annotations__)
    assert set(found["bytes_per_passage"]) == set(results.BytesPerPassage.__annotations__)
    assert json.loads(json.dumps(found)) == found
    assert (found["ok"], found["problems"]) == (True, [])


def test_an_empty_bank(tmp_path):
    found = make_bank(tmp_path / "empty").inspect(verify=True)
    assert (found["documents"], found["passages"], found["windows"], found["ok"]) == (0, 0, 0, True)
    assert found["bytes_per_passage"] == {"address": 0.0, "words": 0.0, "codes_table": 0.0, "all_in": 0.0}


def test_dead_letters_of_an_attempt_that_died_do_not_count(bank):
    from mbc_core.bank import commit_files

    rows = make_slice("three", "0", [], dead=5)
    begun = begin_slice(bank, "three", "0")
    file = write_slice_rows(bank, "dead_letter", rows.dead_letters, begun)
    commit_files(bank, "dead_letter", [file], begun.app_id("dead_letter"))
    assert bank.read("dead_letter").num_rows == 8
    assert bank.inspect()["dead_letters"] == 3


def test_files_that_no_log_names_are_listed_but_do_no_harm(bank):
    assert unreferenced(bank) == []
    file = write_slice_rows(bank, "codes", make_slice("x", "0", numbered(9, 1)).codes, begin_slice(bank, "x", "0"))
    assert [one.path for one in unreferenced(bank)] == [f"codes/{file.path}"]
    found = bank.inspect(verify=True)
    assert (found["ok"], found["problems"]) == (True, [])
    assert f"1 files of {file.size} bytes belong to nothing" in found["information"][-1]
    assert f"codes/{file.path}" in found["information"][-1]


def test_the_live_adapter_is_named(bank):
    registry = AdapterRegistry(bank)
    version = registry.save_candidate(
        {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}, {}, "base"
    )
    assert bank.inspect()["adapter"] is None
    registry.promote(version, "better")
    assert bank.inspect()["adapter"] == version
    (Path(bank.uri) / "adapters" / version / "adapter_config.json").write_bytes(b"[]")
    assert "adapter_config.json does not match its digest" in "".join(bank.inspect(verify=True)["problems"])


def test_export_as_json_lines_decodes_every_column(bank):
    out = io.BytesIO()
    assert bank.export(out, "jsonl", Numbers()) == 10
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    passages = bank.passages().to_pylist()
    for row, stored in zip(rows, passages, strict=True):
        payload = stored["words"]
        codes = [int.from_bytes(payload[at : at + 2], "little") for at in range(0, len(payload), 2)]
        assert row["words"] == " ".join(map(str, codes))
        bits = int.from_bytes(stored["address"], "little")
        assert row["codes"] == [bits >> (9 * slot) & 511 for slot in range(SLOTS)]
        same = ("doc_id", "title", "uri", "passage", "window", "codebook_version")
        assert {name: row[name] for name in same} == {name: stored[name] for name in same}
    assert {row["window"] for row in rows} == {window(0), window(2)}
    assert {row["event_time"] for row in rows if row["doc_id"] == "new"} == {"2024-07-03T00:00:01Z"}


def test_export_as_parquet_holds_the_same_rows(bank, tmp_path):
    out, lines = tmp_path / "deep" / "out.parquet", io.BytesIO()
    assert bank.export(out, "parquet", Numbers()) == 10
    bank.export(lines, "jsonl", Numbers())
    table = pq.read_table(out, use_threads=False)
    expected = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert table.drop_columns(["event_time", "added_at"]).to_pylist() == [
        {name: value for name, value in row.items() if name not in ("event_time", "added_at")} for row in expected
    ]
    assert [one.name for one in out.parent.iterdir()] == ["out.parquet"]


def test_export_as_of(bank):
    first = min(bank.read("codes")["added_at"].cast("int64").to_pylist())
    out = io.BytesIO()
    assert bank.export(out, "jsonl", Numbers(), as_of=first) == 10
    assert {json.loads(line)["doc_id"] for line in out.getvalue().splitlines()} == {one for one, _ in numbered(0, 5)}


def test_export_refuses_another_lexicon_format_or_place(bank, tmp_path):
    class Other(Numbers):
        digest = "dd" * 32

    with pytest.raises(UsageError, match=r"the lexicon is not the one this bank was made with: 'dddddddddddd'"):
        bank.export(io.BytesIO(), "jsonl", Other())
    with pytest.raises(UsageError, match=r"the lexicon is not the one this bank was made with: None"):
        bank.export(io.BytesIO(), "jsonl")
    with pytest.raises(UsageError, match=r"the export format is unknown: 'xml'.*--format parquet or --format jsonl"):
        bank.export(io.BytesIO(), "xml", Numbers())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="refused to write"):
        bank.export(tmp_path / "file" / "out", "jsonl", Numbers())
