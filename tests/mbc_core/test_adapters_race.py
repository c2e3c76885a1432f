"""Promotions by several processes at once, and by processes that are killed: one wins, and the table stays whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapter_cards import BASE, candidate_folder, save
from adapter_race import tell, wait
from bank_rows import make_bank
from test_bank_s3 import endpoint, place  # noqa: F401 - fixtures

from mbc_core.adapters import LIVE, AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.bank.sweep import delete_older
from mbc_core.cli import cli, run

SCRIPT = str(Path(__file__).with_name("adapter_race.py"))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def race(registry: AdapterRegistry, folder: Path, rounds: int, processes: int = 3) -> None:
    """In each round all processes promote at once; exactly one may win, and its adapter is live then."""
    versions = [save(registry, f"weights {number}") for number in range(processes)]
    running = [start("promote", registry._bank.uri, version, rounds, folder) for version in versions]
    for version in versions:
        wait(folder / f"ready-{version}")
    winners = []
    for number in range(rounds):
        tell(folder / f"go-{number}", registry.live(BASE) or "")
        outcomes = {version: wait(folder / f"done-{number}-{version}") for version in versions}
        assert sorted(outcomes.values()) == ["lost"] * (processes - 1) + ["won"], outcomes
        winners += [version for version, outcome in outcomes.items() if outcome == "won"]
        assert registry.live(BASE) == winners[-1]
    told = [one.communicate(timeout=60) for one in running]
    assert [one.returncode for one in running] == [0] * processes, told
    rows = registry._bank.read(LIVE).to_pylist()
    assert [row["version"] for row in sorted(rows, key=lambda row: row["added_at"])] == winners
    assert registry.problems() == []


@pytest.mark.slow
def test_of_several_processes_that_promote_at_once_one_wins(tmp_path):
    race(AdapterRegistry(make_bank(tmp_path / "bank")), tmp_path, rounds=8)


@pytest.mark.slow
def test_of_several_processes_that_promote_at_once_on_s3_one_wins(place, tmp_path):  # noqa: F811
    race(AdapterRegistry(make_bank(place)), tmp_path, rounds=4)


def test_promote_list_and_roll_back_on_s3(place):  # noqa: F811
    bank = make_bank(place)
    registry = AdapterRegistry(bank)
    one = save(registry, "one")
    two = save(registry, "two", one)
    for version in (one, two):
        registry.promote(version, "better")
    other = AdapterRegistry(Bank.open(place))
    assert other.live(BASE) == two and other.ancestors(two) == [one, "shipped"]
    assert other.rollback(BASE, "worse") == one
    assert [info.state for info in registry.list()] == ["live", "rolled back"]
    assert bank.inspect(verify=True)["problems"] == []


@pytest.mark.slow
def test_of_two_adaptations_that_end_at_once_one_goes_live_and_the_other_stays_a_candidate(tmp_path, capsys):
    """The last step of `mbc adapt`, twice at once in processes of their own: both passed the gate."""
    bank = make_bank(tmp_path / "bank")
    folders = [candidate_folder(tmp_path / f"candidate{number}", bank, "shipped", seed=number) for number in range(2)]
    running = [start("add", bank.uri, folder, tmp_path) for folder in folders]
    for folder in folders:
        wait(tmp_path / f"ready-{folder.name}")
    tell(tmp_path / "go-0", "")
    told = [one.communicate(timeout=120) for one in running]
    assert sorted(one.returncode for one in running) == [0, 1], told
    (won, _), (_, lost) = sorted(told, key=lambda one: not one[0])
    assert json.loads(won)["promoted"]
    assert "is live" in lost or "was changed by someone else" in lost, lost
    infos = {info.state: info for info in AdapterRegistry(bank).list()}
    assert set(infos) == {"live", "candidate"}
    assert all(info.lineage.reason == "promoted" for info in infos.values()), "what the gate said stays on the card"
    assert run(cli, ["adapters", "list", "--bank", bank.uri]) == 0
    shown = capsys.readouterr().out
    assert "live" in shown and "passed, not" in shown


def is_whole(bank: Bank, registry: AdapterRegistry, allowed: set[str | None]) -> None:
    assert registry.live(BASE) in allowed
    assert all(info.version for info in registry.list())
    problems = bank.inspect(verify=True)["problems"]
    assert problems == [], problems


@pytest.mark.slow
@pytest.mark.parametrize("step", range(5))
def test_killed_at_any_step_of_a_promotion_the_old_one_stays_or_the_new_one_is_live(tmp_path, step):
    bank = make_bank(tmp_path / "bank")
    registry = AdapterRegistry(bank)
    old, new = save(registry, "old"), save(registry, "new")
    registry.promote(old, "better")
    process = start("die", bank.uri, new, step)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if step < 4 else 0), errors
    is_whole(bank, AdapterRegistry(Bank.open(bank.uri)), {old} if step < 3 else {new})
    registry.promote(new, "once more")
    assert registry.live(BASE) == new
    delete_older(bank, 0.0)
    is_whole(bank, registry, {new})


@pytest.mark.slow
def test_killed_at_moments_of_chance_the_table_is_whole(tmp_path):
    bank = make_bank(tmp_path / "bank")
    registry = AdapterRegistry(bank)
    one, two = save(registry, "one"), save(registry, "two")
    for number in range(4):
        process = start("forever", bank.uri, one, two)
        process.stdout.readline()
        time.sleep(0.031 * number)
        process.kill()
        process.communicate()
        is_whole(bank, AdapterRegistry(Bank.open(bank.uri)), {one, two})
        registry.promote(two, "after the kill")
        assert registry.live(BASE) == two
    count = bank.read(LIVE).num_rows
    assert count == len(set(bank.read(LIVE)["added_at"].to_pylist())), "no two changes at one moment"
