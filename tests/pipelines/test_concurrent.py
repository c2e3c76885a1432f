"""Two processes into one bank at the same time: nothing is lost, nothing is there twice, the counts add up."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_reader
from test_kill import Server, everything, runs_into, write_inputs
from tiny import TinyEncoder, rotation

from mbc_core.bank import Bank
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget
from mbc_core.lexicon import Lexicon
from mbc_core.memory import Memory
from mbc_core.training.adapt import AdaptRun
from pipelines.adapt import run_adapt
from schemas.document import document_key


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    both = [Server(tmp_path_factory.mktemp(f"server-{number}")) for number in range(2)]
    yield both
    for one in both:
        one.close()


def at_once(servers: list[Server], folder: Path, runs: list[dict]) -> list[dict]:
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(server.attempt, folder / f"work-{number}", [run])
            for number, (server, run) in enumerate(zip(servers, runs, strict=True))
        ]
        return [one.result() for one in asked]


def revisions(bank: Bank) -> Counter:
    """How often each content of each document was stored."""
    codes = {(row["key"], row["added_at"]) for row in bank.read("codes", ["key", "added_at"]).to_pylist()}
    rows = bank.read("documents", ["key", "added_at", "content_hash"]).to_pylist()
    return Counter((row["key"], row["content_hash"]) for row in rows if (row["key"], row["added_at"]) in codes)


def check_whole(bank: Bank) -> None:
    assert bank.inspect(verify=True)["problems"] == []
    stored = bank.read("codes", ["key", "passage", "added_at"]).to_pylist()
    assert len({tuple(row.values()) for row in stored}) == len(stored)


@pytest.mark.parametrize("turn", range(2))
def test_two_different_inputs_into_the_same_windows_at_once(servers, tmp_path, turn):
    inputs = write_inputs(tmp_path)
    runs = runs_into(tmp_path / "bank", inputs if turn == 0 else inputs[::-1])
    answers = at_once(servers, tmp_path, runs)
    assert [one["exit"] for one in answers] == [0, 0]
    bank = Bank.open(tmp_path / "bank")
    check_whole(bank)
    lines = [
        json.loads(line) for path in inputs for line in path.read_bytes().splitlines() if line.startswith(b'{"id"')
    ]
    wanted = {document_key(line["id"], bank.manifest.salt) for line in lines if "text" in line}
    assert set(bank.documents()) == wanted and len(wanted) == 85
    counted = revisions(bank)
    assert set(counted.values()) == {1}, "equal content is stored once"
    results = [one["result"][0] for one in answers]
    assert sum(one["documents"] for one in results) == len(counted)
    assert sum(one["documents"] + one["duplicates"] for one in results) == 95
    assert sum(one["dead_letters"] for one in results) == 2


def test_the_same_input_twice_at_once(servers, tmp_path):
    (first, _) = write_inputs(tmp_path)
    alone = servers[0].attempt(tmp_path / "work", runs_into(tmp_path / "alone", [first]))
    answers = at_once(servers, tmp_path, runs_into(tmp_path / "bank", [first, first]))
    assert [one["exit"] for one in answers] == [0, 0]
    bank = Bank.open(tmp_path / "bank")
    check_whole(bank)
    assert everything(bank) == everything(Bank.open(tmp_path / "alone"))
    same = ("documents_in", "documents", "duplicates", "dead_letters", "slices")
    for one in answers:
        assert {name: one["result"][0][name] for name in same} == {name: alone["result"][0][name] for name in same}


def compacting(bank: Bank, work: Path) -> None:
    compact(bank, history=0)


def forgetting(bank: Bank, work: Path) -> None:
    forget(bank, FORGOTTEN)


def asking(bank: Bank, work: Path) -> None:
    memory = Memory.open(bank, TinyEncoder(), lexicon=Lexicon([]), rotation=rotation())
    found = [(one.key, one.passage) for one in memory.recall(["Word1 Word2"], 1000)[0]]
    assert len(found) == len(set(found)) == len(memory)


def adapting(bank: Bank, work: Path) -> None:
    pieces = {"encoder": TinyEncoder(), "lexicon": Lexicon([]), "rotation": rotation()}
    run_adapt(bank, AdaptRun(steps=1, batch=4), language_model=tiny_reader.language_model(), **pieces)


FORGOTTEN = ["doc-3", "doc-65", "doc-77"]


@pytest.mark.slow
@pytest.mark.parametrize("other", [compacting, forgetting, asking, adapting])
def test_ingest_while_something_else_goes_on(servers, tmp_path, other):
    inputs = write_inputs(tmp_path)
    runs = runs_into(tmp_path / "bank", inputs)
    servers[0].attempt(tmp_path / "work", runs[:1])
    bank, times = Bank.open(tmp_path / "bank"), 0
    with ThreadPoolExecutor(1) as threads:
        ingest = threads.submit(servers[0].attempt, tmp_path / "work", runs[1:])
        while not ingest.done() or not times:
            other(bank, tmp_path)
            times += 1
    answer = ingest.result()
    assert answer["exit"] == 0
    (result,) = answer["result"]
    other(bank, tmp_path)
    check_whole(bank)
    gone = {document_key(one, bank.manifest.salt) for one in FORGOTTEN} if other is forgetting else set()
    assert len(bank.documents()) == 85 - len(gone) and not gone & set(bank.documents())
    parts = ("documents", "duplicates", "replaced", "dead_letters")
    assert result["documents_in"] == 37 == sum(result[name] for name in parts)
    alone = servers[0].attempt(tmp_path / "work", runs_into(tmp_path / "alone", inputs))
    assert alone["exit"] == 0
    wanted = {row["key"]: row["content_hash"] for row in Bank.open(tmp_path / "alone").documents().values()}
    found = {row["key"]: row["content_hash"] for row in bank.documents().values()}
    assert found == {key: content for key, content in wanted.items() if key not in gone}
