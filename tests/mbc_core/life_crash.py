"""Forgets, or compacts, and kills itself (SIGKILL) after a given number of steps; run by test_bank_life_crash.py.

    python life_crash.py forget|compact STEP BANK [STEP BANK …]

Each process is forked before anything has started a thread. Prints one JSON line a bank: how many steps were taken.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from life_steps import Steps

from mbc_core.bank import Bank
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget

GONE = "x0004"


def work(what: str, bank: Bank) -> dict:
    if what == "forget":
        return dict(forget(bank, [GONE, "never-there"]))
    return dict(compact(bank, history=0, safe_age=0))


def main(what: str, places: list[str]) -> None:
    for step, place in zip(places[::2], places[1::2], strict=True):
        report = Path(f"{place}.steps.json")
        child = os.fork()
        if child == 0:
            steps = Steps(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
            tick = steps.tick

            def noted(name: str, steps: Steps = steps, tick=tick, report: Path = report) -> None:
                report.write_text(json.dumps([*steps.taken, name]))
                tick(name)

            steps.tick = noted  # type: ignore[method-assign]
            steps.watch(pytest.MonkeyPatch())
            work(what, Bank.open(place))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        taken = json.loads(report.read_text()) if report.exists() else []
        print(json.dumps({"exit": os.waitstatus_to_exitcode(status), "steps": taken}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
