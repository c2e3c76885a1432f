"""Commits one slice and kills itself (SIGKILL) after a given number of steps; run by test_bank_crash.py.

    python bank_crash.py BANK [BANK …]

The n-th bank's process dies after its n-th step (0: before the first); the banks are copies of one another. Prints
one JSON line a bank: how it ended and which steps it had taken. Each process is forked before anything has started
a thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from bank_rows import codebook, make_slice, numbered

from mbc_core.bank import Bank, commit, commit_slice, register_codebook
from mbc_core.bank import storage as storage_module
from mbc_core.codebook.files import Codebook

NAME = "0"


def next_codebook() -> Codebook:
    """Version 1, as a deterministic update would publish it."""
    first = codebook()
    return Codebook(
        version=1,
        parent=0,
        codewords=first.codewords,
        count=first.count,
        sum=first.sum,
        reset_at=first.reset_at,
        built_from=("2024-06-01T00:00:00Z",),
        last_window="2024-06-01T00:00:00Z",
    )


def add_slice(bank: Bank) -> None:
    """All that one slice writes: a new codebook version, then its rows."""
    register_codebook(bank, next_codebook(), ingest_id="run", slice_name=NAME)
    commit_slice(bank, make_slice("run", NAME, numbered(0, 6), passages=2, dead=1, version=1), "run", NAME)


def die_after(step: int, report: Path) -> None:
    """Count files linked and Delta commits as steps, also the moment when a file is written but has no name yet."""
    steps: list[str] = []

    def note(what: str) -> None:
        steps.append(what)
        report.write_text(json.dumps(steps))
        if len(steps) > step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_link(temporary: Path, final: Path) -> bool:
        note(f"wrote {final.parent.name}, unnamed")
        written = link(temporary, final)
        note(f"named {final.name}")
        return written

    def counted_commit(*arguments: object) -> bool:
        won = commit_files(*arguments)
        note(f"committed {arguments[1]}")
        return won

    link, commit_files = storage_module._link_new, commit.commit_files
    storage_module._link_new = counted_link
    commit.commit_files = counted_commit
    sys.modules["mbc_core.bank.codebooks"].commit_files = counted_commit
    note("start")


def main(places: list[str]) -> None:
    for step, place in enumerate(places):
        report = Path(f"{place}.steps.json")
        child = os.fork()
        if child == 0:
            die_after(step, report)
            add_slice(Bank.open(place))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(
            json.dumps(
                {"signal": signal_number, "exit": os.waitstatus_to_exitcode(status)}
                | {"steps": json.loads(report.read_text())}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
