"""Exactly once: a real process is killed (SIGKILL) at random moments, the same command is run again, and the bank
must be that of runs which nothing disturbed: no passage lost, none twice, nothing visible that is not whole.

Two different inputs go into the same windows, one after the other; the second brings new documents, some that are
there already, some with other content, and records that cannot be ingested. Moments are drawn from a fixed seed:
after a random file or commit, and a random time after it. ``MBC_KILLS=200`` draws more of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from oracle import SALT
from tiny import corpus, to_line

from mbc_core.bank import Bank
from mbc_core.bank.inspect import committed_dead_letters

HERE = Path(__file__).parent
SEED = 20_240_701
FEW, MANY = 10, int(os.environ.get("MBC_KILLS", "60"))
LEDGER = ("ingest_id", "slice", "window", "documents_in", "documents", "passages", "duplicates", "replaced")


class Server:
    """The other end of kill_server.py."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "children.log"
        command = [sys.executable, str(HERE / "kill_server.py"), str(self.log)]
        environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def attempt(self, work: Path, runs: list[dict], kill: tuple[int, float] | None = None) -> dict:
        request = {"work": str(work), "runs": runs, "kill": kill}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["exit"] in (0, -9), self.log.read_text()[-3000:]
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0
        self._process.stdout.close()


def write_inputs(folder: Path) -> list[Path]:
    """Two inputs that meet in the same windows."""
    first = corpus(60)
    again, changed = (
        first[3:8],
        [replace(one, text=f"{one.text} Since then Changed{one.doc_id}.") for one in first[8:13]],
    )
    second = corpus(80)[60:] + again + changed + [replace(one, text=f"Late {one.text}") for one in corpus(95)[90:]]
    second[-5:] = [replace(one, event_time=first[20].event_time) for one in second[-5:]]
    bad = [b"not json\n", b'{"id": "no-text"}\n']
    lines = {"first": [to_line(one) for one in first], "second": bad + [to_line(one) for one in second]}
    found = []
    for name, content in lines.items():
        found.append(folder / f"{name}.jsonl")
        found[-1].write_bytes(b"".join(content))
    return found


def runs_into(bank: Path, inputs: list[Path]) -> list[dict]:
    given = {"slice_documents": 24, "key_salt": SALT}
    return [{"sources": [str(one)], "bank": str(bank), "settings": given} for one in inputs]


def everything(bank: Bank) -> dict[str, object]:
    """All that readers can see, and every row of codes, without the moments they were added at."""
    codes = bank.read("codes").drop_columns(["added_at"]).to_pylist()
    passages = bank.passages().drop_columns(["added_at"]).to_pylist()
    documents = [{**row, "added_at": None} for row in bank.documents().values()]
    return {
        "codes": Counter(json.dumps(row, sort_keys=True, default=repr) for row in codes),
        "passages": passages,
        "documents": sorted(documents, key=lambda row: row["doc_id"]),
        "replay": Counter(str(sorted(row.items())) for row in bank.replay().drop_columns(["added_at"]).to_pylist()),
        "ledger": sorted([row[name] for name in LEDGER] for row in bank.read("ledger").to_pylist()),
        "dead": Counter((row["reason"], row["position"]) for row in committed_dead_letters(bank).to_pylist()),
        "codebooks": [one.digest for one in bank.codebooks().versions],
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """Inputs, marks and contents of runs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    inputs = write_inputs(folder)
    answer = server.attempt(folder / "work", runs_into(folder / "bank", inputs))
    first, second = answer["result"]
    assert (first["slices"], second["slices"], first["documents"]) == (3, 2, 60)
    assert (second["documents"], second["duplicates"], second["dead_letters"]) == (30, 5, 2)
    return inputs, answer["marks"], everything(Bank.open(folder / "bank"))


def draw_kills(marks: list[str], count: int) -> list[tuple[str, int, float]]:
    """(phase, mark, seconds after it): one in five before the first file, one in ten after the last commit."""
    steps = sum(not one.startswith("run ") for one in marks)
    rng, found = random.Random(SEED), []
    for number in range(count):
        if number % 5 == 0:
            found.append(("before the first file", 0, rng.uniform(0, 0.3)))
        elif number % 10 == 9:
            found.append(("after the last commit", steps, rng.uniform(0, 0.02)))
        else:
            found.append(("between", rng.randrange(1, steps), rng.uniform(0, 0.03)))
    return found


def phase_of(marks: list[str], steps: int) -> str:
    """Where the child had come to when it died."""
    done = sum(not one.startswith("run ") for one in marks)
    return "before the first file" if done == 0 else "after the last commit" if done >= steps else "between"


def kill_and_rerun(server: Server, folder: Path, undisturbed, kills: list[tuple[str, int, float]]) -> Counter:
    """Each death is followed by the command it interrupted, and those after it; the last attempt is left alone."""
    inputs, marks, expected = undisturbed
    steps, deaths = sum(not one.startswith("run ") for one in marks), Counter()
    left = runs_into(folder / "bank", inputs)
    for number, (_, mark, seconds) in enumerate(kills):
        # What is left to do after a death has fewer files and commits.
        answer = server.attempt(folder / "work", left, (mark // 4 + 1 if number else mark, seconds))
        if not answer["signal"]:
            left = left[-1:]  # it was done before the moment came
            break
        deaths[phase_of(answer["marks"], steps) if number == 0 else "between"] += 1
        reached = max((int(one.split()[1]) for one in answer["marks"] if one.startswith("run ")), default=0)
        left = left[reached:]
    answer = server.attempt(folder / "work", left)
    bank = Bank.open(folder / "bank")
    found = everything(bank)
    for name, rows in expected.items():
        assert found[name] == rows, f"{name} differ after {kills}"
    assert bank.inspect(verify=True)["problems"] == []
    assert answer["result"][-1]["documents_in"] == 37
    # The next run removes what a killed one left: but for an empty folder, when it died before it could lock it.
    assert [*(folder / "work" / "staging").glob("*/*")] == []
    return deaths


@pytest.mark.parametrize("number", range(FEW))
def test_killed_once_then_the_same_command(server, tmp_path, undisturbed, number):
    (kill,) = draw_kills(undisturbed[1], FEW)[number : number + 1]
    kill_and_rerun(server, tmp_path, undisturbed, [kill])


@pytest.mark.slow
def test_killed_at_many_moments(server, tmp_path, undisturbed, capsys):
    """One in four of the runs is killed twice before it may finish."""
    kills, deaths = draw_kills(undisturbed[1], MANY), Counter()
    number = 0
    while number < len(kills):
        several = 2 if number % 4 == 3 else 1
        folder = tmp_path / f"{number:04d}"
        folder.mkdir()
        deaths += kill_and_rerun(server, folder, undisturbed, kills[number : number + several])
        number += several
    with capsys.disabled():
        print(f"\n{sum(deaths.values())} kills by phase: {dict(deaths)}", end=" ")
    assert sum(deaths.values()) >= 0.9 * MANY
    assert deaths["between"] >= 0.5 * MANY
