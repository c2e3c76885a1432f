"""Ingests in processes of their own that are killed (SIGKILL) at given moments; run by test_kill.py and others.

Importing everything takes seconds, an ingest of a few dozen documents less than one: so one process imports it all,
and forks a child for each attempt. Requests and answers are JSON, one a line, on standard input and output:

    {"runs": [{"sources": […], "bank": …, "settings": {…}}, …], "work": folder, "kill": [mark, seconds] or null}
    {"signal": 9 or 0, "exit": code, "marks": ["run 0", "wrote codes", "committed codes", …], "result": [counts, …]}

A child tells its parent of every file written and every Delta commit (a *mark*); the parent waits for mark number
``mark``, then so many seconds, and kills. Nothing of this is known to the product's code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tiny import settings

from mbc_core.bank import commit
from mbc_core.bank.storage import Storage
from pipelines.ingest import run_ingest

COUNTS = ("documents_in", "documents", "duplicates", "replaced", "dead_letters", "slices", "slices_skipped")


def tell_marks(pipe: int) -> None:
    """Report every file and commit of this process on ``pipe``."""
    write, transact = Storage.write_new, commit.DeltaTable.create_write_transaction

    def write_new(self, path, data):
        done = write(self, path, data)
        os.write(pipe, f"wrote {path.rsplit('/', 2)[0].split('/')[0]}\n".encode())
        return done

    def create_write_transaction(self, *arguments, **named):
        transact(self, *arguments, **named)
        os.write(pipe, f"committed {self.table_uri.rstrip('/').rsplit('/', 1)[-1]}\n".encode())

    Storage.write_new = write_new
    commit.DeltaTable.create_write_transaction = create_write_transaction


def attempt(request: dict, marks: int, results: int) -> None:
    """The child: one ingest after the other, as the commands of a user."""
    tell_marks(marks)
    found = []
    for number, run in enumerate(request["runs"]):
        os.write(marks, f"run {number}\n".encode())
        given = settings(Path(request["work"]), **run.get("settings", {}))
        done = run_ingest(run["sources"], run["bank"], given, show_progress=False)
        found.append({name: done[name] for name in COUNTS})
    os.write(results, json.dumps(found).encode())


def serve(request: dict, log: int) -> dict:
    """Fork, watch, kill when the moment comes."""
    settings(Path(request["work"]))  # the encoder's files are there before anything can die
    marks_in, marks_out = os.pipe()
    results_in, results_out = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            attempt(request, marks_out, results_out)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(marks_out)
    os.close(results_out)
    marks = _watch(child, marks_in, request.get("kill"))
    _, status = os.waitpid(child, 0)
    result = os.read(results_in, 1 << 16)
    os.close(results_in)
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "exit": os.waitstatus_to_exitcode(status),
        "marks": marks,
        "result": json.loads(result) if result else None,
    }


def _watch(child: int, pipe: int, kill: list | None) -> list[str]:
    """Marks until the child is gone; after ``kill[0]`` of them (not counting "run …") it has ``kill[1]`` seconds."""
    counted, marks = -1 if kill is None else kill[0], []
    with os.fdopen(pipe) as stream:
        while line := stream.readline():
            marks.append(line.strip())
            if sum(not one.startswith("run ") for one in marks) == counted:
                counted = -1
                time.sleep(kill[1])
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    return marks


def main() -> None:
    log = os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), log)), flush=True)


if __name__ == "__main__":
    main()
