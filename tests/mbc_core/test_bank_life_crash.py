"""Forget and compact die (SIGKILL) before and after every single step, are run again, and nothing is amiss."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from bank_rows import make_bank, make_slice, numbered, shown
from life_crash import GONE, work
from life_steps import Died, Steps
from traces import Planted, traces

from mbc_core.bank import Bank, commit_slice
from mbc_core.bank.forget import unfinished

OTHERS = sorted((f"x{number:04d}", passage) for number in range(9) for passage in range(2) if number != 4)
EVERYBODY = sorted([*OTHERS, (GONE, 0), (GONE, 1)])


def template(folder: Path) -> Bank:
    bank = make_bank(folder)
    for number in range(3):
        documents = numbered(3 * number, 3)
        commit_slice(bank, make_slice(f"r{number}", "0", documents, passages=2, dead=1), f"r{number}", "0")
    commit_slice(bank, make_slice("again", "0", [(GONE, "other words of x0004")], passages=2), "again", "0")
    return bank


def wanted(bank: Bank) -> Planted:
    found = Planted(GONE, ["About x0004", "What of x0004?", "text of x0004", "other words"])
    found.learn(bank)
    return found


def check(bank: Bank, what: str, lookup: Planted, died_at: str) -> None:
    """The work is done, whatever the moment of the death was."""
    moments = Counter(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist())
    if what == "forget":
        assert traces(bank, lookup, bytes.hex) == [], died_at
        assert shown(bank) == OTHERS, died_at
        assert unfinished(bank) == [] and sum(moments.values()) == 16, died_at
    else:
        assert shown(bank) == EVERYBODY, died_at
        assert len(bank.files("codes")) == len(bank.files("documents")) == 1, died_at
        assert sum(moments.values()) == 18, died_at
    assert bank.inspect(verify=True)["problems"] == [], died_at
    assert bank.visible().keys.size == len({name for name, _ in shown(bank)}), died_at


def count_steps(bank: Bank, what: str, folder: Path) -> list[str]:
    shutil.copytree(bank.uri, folder)
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps().watch(patch)
        work(what, Bank.open(folder))
    return steps.taken


@pytest.mark.parametrize("what", ["forget", "compact"])
def test_a_death_at_some_steps(tmp_path, what):
    """Every tenth step in this process; all of them, by SIGKILL, in the slow test below."""
    bank = template(tmp_path / "template")
    lookup, steps = wanted(bank), count_steps(bank, what, tmp_path / "whole")
    assert len(steps) > 40
    for stop in range(3, len(steps), 10):
        place = tmp_path / f"bank-{stop}"
        shutil.copytree(bank.uri, place)
        copy = Bank.open(place)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
            Steps(stop).watch(patch)
            work(what, copy)
        seen = shown(copy)  # in between, readers see all of a document or nothing
        assert seen in (EVERYBODY, OTHERS), steps[stop]
        result = work(what, copy)
        if what == "forget":
            assert (result["forgotten"], result["not_found"]) == (1, 1), steps[stop]
        check(copy, what, lookup, steps[stop])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["forget", "compact"])
def test_killed_after_every_step(tmp_path, what):
    bank = template(tmp_path / "template")
    lookup, steps = wanted(bank), count_steps(bank, what, tmp_path / "whole")
    stops = list(range(len(steps)))
    places = [tmp_path / f"bank-{stop}" for stop in stops]
    for place in places:
        shutil.copytree(bank.uri, place)
    command = [sys.executable, str(Path(__file__).with_name("life_crash.py")), what]
    told = [str(one) for pair in zip(stops, places, strict=True) for one in pair]
    done = subprocess.run([*command, *told], capture_output=True, text=True, timeout=1200, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["exit"] for report in reports] == [-9] * len(stops)
    assert [len(report["steps"]) for report in reports] == [stop + 1 for stop in stops]
    for place, report in zip(places, reports, strict=True):
        copy = Bank.open(place)
        assert shown(copy) in (EVERYBODY, OTHERS), report["steps"][-1]
        work(what, copy)
        check(copy, what, lookup, report["steps"][-1])
        if len(report["steps"]) % 10 == 0:  # and once more: nothing changes
            again = work(what, copy)
            if what == "forget":
                assert (again["forgotten"], again["not_found"]) == (0, 2)
            check(copy, what, lookup, report["steps"][-1])
