"""Two processes into one bank at the same time: nothing is lost, nothing is there twice, the counts add up."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kill import Server, everything, runs_into, write_inputs

from mbc_core.bank import Bank
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
