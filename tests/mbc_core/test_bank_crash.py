"""SIGKILL after every single step of adding a slice, then a rerun: each row once, nothing half-added is seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bank_crash import NAME, add_slice
from bank_rows import make_bank, make_slice, numbered, shown

from mbc_core.bank import Bank, commit_slice, finished_slices

MOST_STEPS = 25
OLD = [("old", 0)]
NEW = sorted((f"x{number:04d}", passage) for number in range(6) for passage in range(2))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[tuple[Bank, dict]]:
    """Copies of a bank with one old slice, each left by a process that died one step later than the one before."""
    root = tmp_path_factory.mktemp("crash")
    template = make_bank(root / "template")
    commit_slice(template, make_slice("before", "0", [("old", "text")], day=3), "before", "0")
    places = [root / f"bank-{step:02d}" for step in range(MOST_STEPS)]
    for place in places:
        shutil.copytree(template.uri, place)
    script = Path(__file__).with_name("bank_crash.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, places)], capture_output=True, text=True, timeout=120, check=True
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return [(Bank.open(place), report) for place, report in zip(places, reports, strict=True)]


def test_every_step_was_the_last_one_once(killed):
    steps = killed[-1][1]["steps"]
    assert killed[-1][1]["exit"] == 0, "raise MOST_STEPS: the last process was killed too"
    deaths = [report["steps"] for _, report in killed if report["signal"] == 9]
    assert [len(taken) for taken in deaths] == list(range(1, len(steps) + 1))
    committed = [step for step in steps if step.startswith("committed")]
    tables = ["codebook_versions", "replay", "documents", "dead_letter", "codes", "ledger"]
    assert committed == [f"committed {table}" for table in tables]


def test_nothing_is_seen_before_codes_are_committed_and_all_of_it_after(killed):
    for bank, report in killed:
        after = "committed codes" in report["steps"]
        assert shown(bank) == (sorted(OLD + NEW) if after else OLD), report["steps"][-1]
        assert len(bank.visible()) == (7 if after else 1)
        assert bank.replay().num_rows == (7 if after else 1)
        assert len(bank.documents()) == (7 if after else 1)


def test_a_rerun_adds_each_row_once(killed):
    for bank, report in killed:
        add_slice(bank)
        last = report["steps"][-1]
        assert shown(bank) == sorted(OLD + NEW), last
        assert finished_slices(bank, "run") == {NAME}, last
        for table in ("documents", "replay"):
            keys = Counter(bank.read(table)["key"].to_pylist())
            assert set(keys.values()) == {1} and len(keys) == 7, (table, last)
        assert bank.read("dead_letter").num_rows == 1, last
        assert sorted(bank.read("ledger")["documents"].to_pylist()) == [1, 6], last
        assert bank.read("codebook_versions")["version"].to_pylist() == [0, 1], last
        found = bank.inspect(verify=True)
        assert (found["problems"], found["documents"], found["passages"]) == ([], 7, 13), last
        versions = {table: bank.table(table).version() for table in ("codes", "documents", "ledger")}
        add_slice(bank)
        assert {table: bank.table(table).version() for table in versions} == versions, last


def test_a_run_resumed_after_a_crash_plans_like_the_first(killed):
    """What the interrupted ingest itself made visible, or published, is left out when its rerun decides."""
    bank = killed[-1][0]
    assert [len(bank.visible()), len(bank.visible(ignore_ingest="run")), len(bank.visible(ignore_ingest="else"))] == [
        7,
        1,
        7,
    ]
    assert numbered(0, 1)[0][0] in {row["doc_id"] for row in bank.documents().values()}
