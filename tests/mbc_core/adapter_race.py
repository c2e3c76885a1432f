"""One process of test_adapters_race.py.

python adapter_race.py promote BANK VERSION ROUNDS FOLDER   each round: promote VERSION if the round's live one is live
python adapter_race.py add BANK CANDIDATE FOLDER            take a candidate's folder in, as `mbc adapters add` does
python adapter_race.py die BANK VERSION STEP                promote, killed by SIGKILL after STEP storage operations
python adapter_race.py forever BANK VERSION OTHER           promote one after the other until killed

Rounds begin when FOLDER/go-N appears, which holds the version that is live; what came of it goes to FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank, commit
from mbc_core.bank import storage as storage_module
from mbc_core.errors import LostRace


def wait(path: Path) -> str:
    until = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.0005)
    return path.read_text()


def tell(path: Path, text: str) -> None:
    staging = path.with_suffix(".writing")
    staging.write_text(text)
    staging.replace(path)


def promote(place: str, version: str, rounds: int, folder: Path) -> None:
    registry = AdapterRegistry(Bank.open(place))
    tell(folder / f"ready-{version}", "")
    for number in range(rounds):
        live = wait(folder / f"go-{number}") or None
        try:
            registry.promote(version, f"round {number}", expected=live)
            outcome = "won"
        except LostRace:
            outcome = "lost"
        tell(folder / f"done-{number}-{version}", outcome)


def add(place: str, candidate: Path, folder: Path) -> None:
    from mbc_core.cli import cli, run

    tell(folder / f"ready-{candidate.name}", "")
    wait(folder / "go-0")
    sys.exit(run(cli, ["adapters", "add", str(candidate), "--bank", place, "--json"]))


def die(place: str, version: str, step: int) -> None:
    registry, taken = AdapterRegistry(Bank.open(place)), 0

    def note() -> None:
        nonlocal taken
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        taken += 1

    write_new, transact = storage_module.Storage.write_new, commit.DeltaTable.create_write_transaction

    def counted_write(self, path, data):
        note()
        done = write_new(self, path, data)
        note()
        return done

    def counted_commit(self, *args, **kwargs):
        note()
        transact(self, *args, **kwargs)
        note()

    storage_module.Storage.write_new = counted_write
    commit.DeltaTable.create_write_transaction = counted_commit
    registry.promote(version, "better")


def forever(place: str, version: str, other: str) -> None:
    registry = AdapterRegistry(Bank.open(place))
    while True:
        for one in (version, other):
            registry.promote(one, "again")
            print(one, flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "promote":
        promote(rest[0], rest[1], int(rest[2]), Path(rest[3]))
    elif what == "add":
        add(rest[0], Path(rest[1]), Path(rest[2]))
    elif what == "die":
        die(rest[0], rest[1], int(rest[2]))
    else:
        forever(rest[0], rest[1], rest[2])
