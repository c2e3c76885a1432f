"""A run that dies anywhere and is started again leaves the bank of a run that never died: each row once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from oracle import empty_bank, held
from tiny import corpus, settings, write_corpus

from mbc_core.bank import Bank, commit
from mbc_core.bank.storage import Storage
from pipelines import sink
from pipelines.ingest import run_ingest

DOCUMENTS = corpus(90)
LEDGER_COUNTS = ("documents_in", "documents", "passages", "duplicates", "replaced")


class Died(BaseException):
    """Stands for the death of the process: nothing in the program may catch it and go on."""


def ledger(bank: Bank):
    rows = bank.read("ledger").to_pylist()
    return sorted((row["slice"], row["window"], *(row[name] for name in LEDGER_COUNTS)) for row in rows)


def start(folder: Path, given) -> tuple[Bank, str]:
    bank = empty_bank(folder / "bank", given)
    return bank, write_corpus(folder / "a.jsonl", DOCUMENTS)


def count_operations(monkeypatch, die_at: int | None):
    """Count writes and commits, before and after each; raise at one of these moments."""
    seen: list[str] = []

    def tick(name):
        seen.append(name)
        if die_at is not None and len(seen) == die_at:
            raise Died(name)

    write, register = Storage.write_new, commit.DeltaTable.create_write_transaction

    def write_new(self, path, data):
        tick(f"before writing {path}")
        done = write(self, path, data)
        tick(f"after writing {path}")
        return done

    def transact(self, *args, **kwargs):
        tick("before a commit")
        register(self, *args, **kwargs)
        tick("after a commit")

    monkeypatch.setattr(Storage, "write_new", write_new)
    monkeypatch.setattr(commit.DeltaTable, "create_write_transaction", transact)
    return seen


def questions(bank):
    return sorted(str(sorted(row.items())) for row in bank.replay().drop_columns(["added_at"]).to_pylist())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    given = settings(folder / "w", slice_documents=40)
    bank, source = start(folder, given)
    with pytest.MonkeyPatch.context() as patch:
        seen = count_operations(patch, None)
        result = run_ingest([source], bank.uri, given, show_progress=False)
    assert result["slices"] == 3
    return held(bank), ledger(bank), len(seen), questions(bank)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.8, 0.97])
def test_death_at_any_moment_then_the_same_command(tmp_path, monkeypatch, undisturbed, share):
    codes, counts, operations, replay = undisturbed
    given = settings(tmp_path / "w", slice_documents=40)
    bank, source = start(tmp_path, given)
    with monkeypatch.context() as patch:
        count_operations(patch, max(1, round(share * operations)))
        with pytest.raises(Died):
            run_ingest([source], bank.uri, given, show_progress=False)
    result = run_ingest([source], bank.uri, given, show_progress=False)
    assert held(bank) == codes
    assert ledger(bank) == counts
    assert questions(bank) == replay
    assert result["documents"] == result["documents_in"] == len(DOCUMENTS)
    assert bank.inspect(verify=True)["ok"] is True


@pytest.mark.parametrize(("day", "count"), [(2, 5), (90, 5), (90, 60)], ids=["folds", "waits", "publishes"])
def test_a_run_that_died_after_publishing_goes_on_though_another_came_between(tmp_path, monkeypatch, day, count):
    given = settings(tmp_path / "w", slice_documents=40)
    bank, source = start(tmp_path, given)

    def die_in_later_slices(bank, slice_id, *arguments):
        if slice_id.name.startswith("00000"):
            return real(bank, slice_id, *arguments)
        raise Died

    with monkeypatch.context() as patch:
        real = sink.commit
        patch.setattr(sink, "commit", die_in_later_slices)
        with pytest.raises(RuntimeError, match="Died"):
            run_ingest([source], bank.uri, given, show_progress=False)
    published = len(bank.codebooks().versions)
    assert published > 2, "the slice that died must have published"
    others = [replace(one, event_time=day * 86_400_000_000) for one in corpus(count, start=200)]
    run_ingest([write_corpus(tmp_path / "b.jsonl", others)], bank.uri, given, show_progress=False)
    result = run_ingest([source], bank.uri, given, show_progress=False)
    assert result["documents"] == len(DOCUMENTS)
    assert len(bank.documents()) == len(DOCUMENTS) + len(others)
    assert bank.inspect(verify=True)["problems"] == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_killed_process_then_the_same_command(tmp_path, undisturbed, share):
    codes, counts, operations, _ = undisturbed
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_crash, pytest\n"
        "from tiny import settings\n"
        "class Kill(BaseException):\n"
        "    def __init__(self, name): os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_crash.Died = Kill\n"
        "folder = Path(sys.argv[2]); given = settings(folder / 'w', slice_documents=40)\n"
        "bank, source = test_crash.start(folder, given)\n"
        "test_crash.count_operations(pytest.MonkeyPatch(), int(sys.argv[3]))\n"
        "test_crash.run_ingest([source], bank.uri, given, show_progress=False)\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    command = [sys.executable, "-c", script, str(here), str(tmp_path), str(round(share * operations))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    given = settings(tmp_path / "w", slice_documents=40)
    left = list(given.staging.iterdir())
    assert len(left) == 1, "a killed run cannot clean up"
    run_ingest([str(tmp_path / "a.jsonl")], str(tmp_path / "bank"), given, show_progress=False)
    bank = Bank.open(tmp_path / "bank")
    assert held(bank) == codes
    assert ledger(bank) == counts
    assert list(given.staging.iterdir()) == [], "the next run removes what the killed one left"
