"""Running the live job in tests: a driver thread plays the outside world, the main thread runs the stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import settings, to_line

from mbc_core.bank import Bank
from pipelines.live import Drain
from pipelines.options import StreamSettings
from pipelines.streaming import stream

HERE = Path(__file__).parent
PATIENCE = 300.0
"""Seconds; a process of its own imports for a minute where many share the machine."""

COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import TinySpec, settings
from pipelines import ingest, opening
given = settings(Path(sys.argv[2]))
opening.encoder_of = lambda *args: TinySpec()
opening.rotation_of = lambda *args: given.rotation
opening.codebook_of = lambda *args: given.codebook
sys.exit(ingest.main(sys.argv[3:]))
"""
"""``python -m pipelines.ingest`` with the tiny encoder."""


class World:
    """What the driver sees of a run: its bank, and how to wait for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inbox, self.uri = folder, folder / "in", str(folder / "bank")
        self.said: list[str] = []
        self.inbox.mkdir(exist_ok=True)

    def visible(self) -> dict[str, dict]:
        """Documents that the bank shows, by id."""
        if not (Path(self.uri) / "manifest.json").exists():
            return {}
        return {row["doc_id"]: row for row in Bank.open(self.uri).documents().values()}

    def reasons(self) -> list[str]:
        """Of the dead letters that are stored."""
        return sorted(Bank.open(self.uri).read("dead_letter")["reason"].to_pylist())

    def ledger(self) -> list[dict]:
        return Bank.open(self.uri).read("ledger").to_pylist()

    def put(self, name: str, documents, age: float = 3600.0) -> Path:
        """A whole file appears at once, last changed ``age`` seconds ago."""
        hidden = self.inbox / f".{name}"
        hidden.write_bytes(b"".join(one if isinstance(one, bytes) else to_line(one) for one in documents))
        then = time.time() - age
        os.utime(hidden, (then, then))
        return hidden.rename(self.inbox / name)

    def run(self, drive=None, *, sources=None, given=None, **streaming) -> dict:
        """Run the stream until ``drive`` has ended (then it drains), or by itself; gives the result."""
        drain, failed = Drain(), []

        def driver() -> None:
            try:
                drive()
            except BaseException as error:
                failed.append(error)
            finally:
                drain.ask()

        thread = threading.Thread(target=driver, daemon=True)
        if drive is not None:
            thread.start()
        streaming = {"poll": 0.2, **({} if drive else {"idle_exit": 0.5}), **streaming}
        result = stream(
            sources or [str(self.inbox)],
            self.uri,
            given or settings(self.folder / "w"),
            StreamSettings(**streaming),
            show_progress=False,
            say=self.said.append,
            drain=drain,
        )
        if drive is not None:
            thread.join()
        if failed:
            raise failed[0]
        return result


def wait_for(ready, what: str = "it") -> None:
    """Wait until ``ready()`` is true."""
    until = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > until:
            raise AssertionError(f"{what} did not happen within {PATIENCE:.0f} s")
        time.sleep(0.05)


def adds_up(result: dict) -> bool:
    return result["documents_in"] == sum(result[one] for one in ("documents", "duplicates", "replaced", "dead_letters"))


@contextmanager
def command(folder: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen]:
    """The command in a process of its own; it is gone afterwards, and what it said is shown when something fails."""
    words = [sys.executable, "-c", COMMAND, str(HERE), str(folder / "w"), *arguments, "--json"]
    process = subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    except BaseException:
        process.kill()
        print(process.communicate()[1][-3000:])
        raise
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> tuple[int, dict, str]:
    """Exit code, the JSON object on standard output, and standard error."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, json.loads(out) if out.strip() else {}, err


def run_command(folder: Path, *arguments: str, **environment: str) -> tuple[int, dict, str]:
    """The command to its end."""
    with command(folder, *arguments, **environment) as process:
        return finish(process)
