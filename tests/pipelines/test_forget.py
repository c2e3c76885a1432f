"""A document is planted, forgotten, and looked for: in every file, decoded, and in every old version of every table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from oracle import empty_bank
from tiny import corpus, settings, to_line
from traces import Planted, traces

from mbc_core.bank import Bank, SliceId, write_slice_rows
from mbc_core.bank import storage as storage_module
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.lexicon import Lexicon
from pipelines.ingest import run_ingest
from schemas.document import Document, document_key
from schemas.tables import TABLES

ID = "planted-document/77"
WORDS = ("Zyxomma", "Quexalotl", "Brimborion")
TITLE, URI, QUESTION, ANSWER = "The Brigadoon Ledger", "https://example.org/brigadoon", "Who grew Tlachtli?", "Ompax"
DAY = 86_400_000_000


def planted(day: int, text: str) -> Document:
    return Document(ID, text, TITLE, URI, day * DAY, ((QUESTION, ANSWER),))


PLANTED = planted(2, f"{WORDS[0]} met {WORDS[1]}.")
REVISED = planted(3, f"{WORDS[0]} met {WORDS[1]} and then {WORDS[2]}.")
BAD = [
    json.dumps({"id": ID, "text": WORDS[2], "timestamp": "yesterday"}).encode(),  # its id can be read
    f'{{"id": "{ID}", "text": "{WORDS[1]}'.encode(),  # no JSON, only the raw record names it
    b'{"id": "other", "text": ""}',
]


def decode(stored: bytes) -> str:
    return Lexicon([]).read(stored)


def lookup() -> Planted:
    return Planted(ID, (*WORDS, TITLE, URI, QUESTION, ANSWER))


def source(folder: Path, name: str, documents, bad=()) -> str:
    path = folder / name
    path.write_bytes(b"".join(map(to_line_with_uri, documents)) + b"".join(line + b"\n" for line in bad))
    return str(path)


def to_line_with_uri(document: Document) -> bytes:
    return json.dumps(json.loads(to_line(document)) | {"uri": document.uri}).encode() + b"\n"


def add(bank: Bank, path: str, **changes) -> dict:
    return run_ingest([path], bank.uri, replace(settings(Path(path).parent), keep_text=True, **changes))


@pytest.fixture
def bank(tmp_path) -> Bank:
    """Three runs: the planted document, bad records that name it, then its revision among others; old things too."""
    bank = empty_bank(tmp_path / "bank", settings(tmp_path))
    add(bank, source(tmp_path, "a.jsonl", [*corpus(30), PLANTED], BAD))
    add(bank, source(tmp_path, "b.jsonl", [*corpus(10, start=30), REVISED]))
    leave_behind(bank)
    return bank


def leave_behind(bank: Bank) -> None:
    """What crashes leave: files that no log names, a file still without a name, statistics of a dead slice."""
    slice_id = SliceId("dead", "0", 0, 1_700_000_000_000_000)
    key = document_key(ID, bank.manifest.salt)
    for table in ("codes", "documents", "replay", "dead_letter"):
        rows = bank.read(table)
        mine = rows.filter(pa.array([one == key for one in rows["key"].to_pylist()]))
        write_slice_rows(bank, table, mine, slice_id)
    orphan = next(one for one in bank.storage.list("documents/dead"))
    data = bank.storage.read_bytes(orphan.path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for name, part in (("a", data), ("b", data[:-20])):
        temporary = f"{storage_module._TEMPORARY}{gone.stdout.decode().strip()}-{name}"
        Path(bank.storage.locate("documents/dead"), temporary).write_bytes(part)
    width, codewords = bank.manifest.width, bank.manifest.codewords
    vectors = np.ones((1, bank.manifest.slots, width), np.float32)
    codes = np.zeros((1, bank.manifest.slots), np.uint16)
    found = BatchStatistics.of(bank.codebook(0), vectors, codes, np.array([key]), np.zeros(1, np.int32))
    assert found.sums.shape == (codewords, width)
    bank.storage.write_new("codebooks/pending/dead/0-w-00.safetensors", found.to_bytes())
    bank.storage.write_new("index/side.faiss", b"rebuildable " + key.to_bytes(8, "little", signed=True))


def others(table: pa.Table) -> list[dict]:
    return [row for row in table.to_pylist() if row["doc_id"] != ID]


def test_nothing_of_a_forgotten_document_is_left_anywhere(bank, tmp_path):
    wanted = lookup()
    wanted.learn(bank)
    before = traces(bank, wanted, decode)
    places = {line.split("/")[0].split("@")[0].split(":")[0] for line in before}
    assert places >= {"codes", "documents", "replay", "dead_letter", "codebooks", "index"}
    assert any("_delta_log" in line for line in before) and any("@" in line for line in before)
    assert any(".tmp-" in line for line in before)
    assert any(line.startswith("codebooks/pending/run-") for line in before), "statistics that the ledger names"
    moments = sorted(set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()))
    shown = {moment: others(bank.passages(moment)) for moment in (*moments, None)}
    waiting = {one.path for one in bank.storage.list("codebooks/pending")}

    result = bank.forget([ID])

    assert (result["forgotten"], result["not_found"]) == (1, 0)
    assert traces(bank, wanted, decode) == []
    assert {moment: bank.passages(moment).to_pylist() for moment in shown} == shown
    assert not [row for row in bank.replay().to_pylist() if row["question"] == QUESTION]
    assert bank.inspect(verify=True)["problems"] == []
    assert waiting and len(bank.storage.list("codebooks/pending")) == len(waiting) - 1
    bank.codebooks()  # the statistics that wait are whole
    letters = bank.read("dead_letter").to_pylist()
    assert sorted((row["reason"], (row["raw"] or b"").strip()) for row in letters) == [
        ("bad_timestamp", b""),
        ("no_text", BAD[2]),
        ("not_json", b""),
    ]


def test_the_receipt_names_what_was_learnt_meanwhile_and_not_the_document(bank):
    text = Path(bank.forget([ID])["receipt"]).read_text()
    receipt = json.loads(text)
    assert receipt["codebooks"] == list(range(1, 1 + len(receipt["codebooks"]))) and receipt["codebooks"]
    assert (receipt["forgotten"], receipt["adapters"]) == (1, [])
    assert receipt["removed"]["codes"] >= 2 and receipt["removed"]["dead_letter"] == 2
    key = document_key(ID, bank.manifest.salt)
    assert not any(one in text for one in (ID, TITLE, URI, *WORDS, str(key)))


def test_ingesting_it_again_is_refused_and_counted(bank, tmp_path):
    wanted = lookup()
    wanted.learn(bank)
    bank.forget([ID])
    for path, documents in ((tmp_path / "a.jsonl", 31), (tmp_path / "b.jsonl", 11)):
        for again in (False, True):
            result = add(bank, str(path))
            known = documents - 1
            assert (result["documents"], result["duplicates"], result["replaced"]) == (0, known, 0), again
            assert result["dead_letters_by_reason"]["forgotten"] == 1
            assert result["documents_in"] == known + result["dead_letters"]
            assert traces(bank, wanted, decode) == []
    fresh = source(tmp_path, "c.jsonl", [PLANTED, *corpus(3, start=90)], BAD)
    result = add(bank, fresh)
    assert (result["documents"], result["dead_letters"], result["documents_in"]) == (3, 4, 7)
    assert result["dead_letters_by_reason"] == {"forgotten": 3, "no_text": 1}
    assert traces(bank, wanted, decode) == []
    assert bank.inspect(verify=True)["problems"] == []
    assert bank.tombstones().forgotten(np.array([document_key(ID, bank.manifest.salt)])).all()


def test_an_ingest_that_was_under_way_leaves_the_document_out(bank, tmp_path, monkeypatch):
    """Forgotten after the plan and after the slice's files were written, just before the commit."""
    from pipelines import sink

    wanted = lookup()
    wanted.learn(bank)
    bank.forget(["somebody else"])
    commit = sink.commit_slice
    told = []

    def forget_first(*args, **kwargs):
        if not told:
            told.append(bank.forget([ID])["forgotten"])
        return commit(*args, **kwargs)

    monkeypatch.setattr(sink, "commit_slice", forget_first)
    changed = replace(REVISED, text=f"{WORDS[2]} alone.")
    result = add(bank, source(tmp_path, "d.jsonl", [changed, *corpus(5, start=60)]))
    assert told == [1]
    assert (result["documents"], result["dead_letters_by_reason"]) == (5, {"forgotten": 1})
    assert result["documents_in"] == 6
    assert traces(bank, wanted, decode) == []
    assert bank.inspect(verify=True)["problems"] == []


def test_the_command_line(bank, tmp_path):
    ids = tmp_path / "ids"
    ids.write_text(f"{ID}\nnever-there\n", "utf-8")
    command = [sys.executable, "-m", "mbc_core.cli", "forget", "doc-3", "--ids-file", str(ids), "--bank", bank.uri]
    done = subprocess.run([*command, "--json"], capture_output=True, check=True, env=os.environ | {"NO_COLOR": "1"})
    result = json.loads(done.stdout)
    assert (result["forgotten"], result["not_found"]) == (2, 1)
    assert not {ID, "doc-3"} & set(bank.passages()["doc_id"].to_pylist())
    assert all(bank.table(one) for one in TABLES)
