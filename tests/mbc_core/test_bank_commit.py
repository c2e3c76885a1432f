"""Commits: once each, in order, and only codes make a document visible."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from bank_rows import codebook, make_bank, make_slice, manifest, numbered, shown

from mbc_core.bank import (
    Bank,
    PreparedFile,
    SliceId,
    begin_slice,
    commit_files,
    commit_slice,
    finished_slices,
    write_rows,
    write_slice_rows,
)
from mbc_core.bank import commit as commit_module
from mbc_core.errors import DamagedFile, StorageError, UsageError


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


def test_a_slice_is_added_once_whatever_is_repeated(bank):
    rows = make_slice("run", "0", numbered(0, 5), passages=2, dead=3)
    assert commit_slice(bank, rows, "run", "0") is True
    versions = {table: bank.table(table).version() for table in ("codes", "documents", "replay", "ledger")}
    assert commit_slice(bank, rows, "run", "0") is False
    assert {table: bank.table(table).version() for table in versions} == versions
    assert shown(bank) == [(f"x{number:04d}", passage) for number in range(5) for passage in range(2)]
    assert finished_slices(bank, "run") == {"0"}
    assert finished_slices(bank, "another") == set()


def test_order_is_replay_documents_dead_letters_codes_ledger(bank, monkeypatch):
    order = []
    real = commit_module.commit_files

    def noting(bank, table, files, app_id, version=0, *more):
        order.append((table, app_id.split("/")[0], version))
        return real(bank, table, files, app_id, version, *more)

    monkeypatch.setattr(commit_module, "commit_files", noting)
    commit_slice(bank, make_slice("run", "0", numbered(0, 2), dead=1, pane=4), "run", "0", pane=4)
    tables = ["replay", "documents", "dead_letter", "codes", "ledger"]
    assert order == [(table, table, 4) for table in tables]


def test_rows_without_codes_are_not_visible(bank):
    rows = make_slice("run", "0", numbered(0, 3))
    begun = begin_slice(bank, "run", "0")
    for table, given in (("replay", rows.replay), ("documents", rows.documents)):
        commit_files(bank, table, [write_slice_rows(bank, table, given, begun)], begun.app_id(table))
    assert bank.read("documents").num_rows == 3
    assert len(bank.visible()) == 0
    assert bank.passages().num_rows == 0
    assert bank.replay().num_rows == 0
    assert bank.documents() == {}


def test_a_rerun_with_equal_rows_continues_the_interrupted_attempt(bank):
    rows = make_slice("run", "0", numbered(0, 3))
    begun = begin_slice(bank, "run", "0")
    commit_files(bank, "replay", [write_slice_rows(bank, "replay", rows.replay, begun)], begun.app_id("replay"))
    assert commit_slice(bank, rows, "run", "0")
    assert bank.read("replay").num_rows == 3  # not written a second time
    assert set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()) == {begun.added_at}


def test_a_rerun_with_other_rows_leaves_the_interrupted_attempt_unseen(bank):
    before, after = (make_slice("run", "0", [("a", content)]) for content in ("old text", "new text"))
    begun = begin_slice(bank, "run", "0")
    for table, given in (("replay", before.replay), ("documents", before.documents)):
        commit_files(bank, table, [write_slice_rows(bank, table, given, begun)], begun.app_id(table))
    assert commit_slice(bank, after, "run", "0")
    assert [row["answer"] for row in bank.replay().to_pylist()] == ["new text"]
    expected = after.documents["content_hash"].to_pylist()
    assert [bytes(row["content_hash"]) for row in bank.documents().values()] == expected


def test_ledger_lost_between_two_commits_is_settled(bank, monkeypatch):
    real = commit_module.commit_files

    def dying(bank, table, *rest):
        if table == "ledger":
            raise KeyboardInterrupt
        return real(bank, table, *rest)

    rows = make_slice("run", "0", numbered(0, 4))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(commit_module, "commit_files", dying)
        commit_slice(bank, rows, "run", "0")
    assert len(bank.visible()) == 4 and bank.read("ledger").num_rows == 0
    assert "not in the ledger" in "".join(bank.inspect(verify=True)["problems"])
    assert finished_slices(bank, "run") == {"0"}
    assert bank.read("ledger")["documents"].to_pylist() == [4]
    assert bank.inspect(verify=True)["problems"] == []


def test_a_ledger_file_of_an_attempt_that_lost_is_never_committed(bank):
    """Two attempts at one slice: the ledger follows the codes that won."""
    winner, loser = make_slice("run", "0", numbered(0, 4)), make_slice("run", "0", numbered(0, 2))
    lost, won = SliceId("run", "0", 0, 1), SliceId("run", "0", 0, 2)
    write_slice_rows(bank, "ledger", loser.ledger, lost)
    file = write_slice_rows(bank, "ledger", winner.ledger, won)
    for table, rows in (("documents", winner.documents), ("codes", winner.codes)):
        shard = write_slice_rows(bank, table, rows, won)
        commit_files(bank, table, [shard], won.app_id(table), 0, {"mbc.ledger": file.path})
    assert finished_slices(bank, "run") == {"0"}
    assert bank.read("ledger")["documents"].to_pylist() == [4]


def test_prepared_files_of_many_shards_commit_together(bank):
    rows = make_slice("run", "w", numbered(0, 10))
    begun = begin_slice(bank, "run", "w")
    shards = [write_slice_rows(bank, "codes", rows.codes.slice(start, 5), begun, start) for start in (0, 5)]
    assert all(isinstance(one, PreparedFile) and one.rows == 5 for one in shards)
    assert commit_slice(bank, replace(rows, codes=shards), "run", "w", slice_id=begun)
    assert len(shown(bank)) == 10 and bank.table("codes").version() == 1


def test_prepared_files_of_an_attempt_that_died_are_unseen_beside_those_of_the_rerun(bank):
    rows = make_slice("run", "w", numbered(0, 4))

    def prepared(begun):
        write = [("codes", rows.codes), ("documents", rows.documents), ("replay", rows.replay)]
        return {table: [write_slice_rows(bank, table, given, begun)] for table, given in write}

    first, second = begin_slice(bank, "run", "w"), SliceId("run", "w", 0, 1 + begin_slice(bank, "run", "w").added_at)
    died, again = prepared(first), prepared(second)
    for table in ("replay", "documents"):
        commit_files(bank, table, died[table], first.app_id(table))
    assert commit_slice(bank, replace(rows, **again), "run", "w", slice_id=second)
    assert not commit_slice(bank, replace(rows, **died), "run", "w", slice_id=first)
    assert len(shown(bank)) == bank.replay().num_rows == len(bank.documents()) == len(bank.visible()) == 4
    assert bank.inspect(verify=True)["problems"] == []


def test_a_slice_without_codes_is_finished_too(bank):
    assert commit_slice(bank, make_slice("run", "0", [], dead=2), "run", "0")
    assert not commit_slice(bank, make_slice("run", "0", [], dead=2), "run", "0")
    found = bank.inspect(verify=True)
    assert (found["documents"], found["dead_letters"], found["ok"]) == (0, 2, True)


def test_panes_of_a_window_add_up(bank):
    assert commit_slice(bank, make_slice("run", "w", [("a", "x")]), "run", "w", pane=0)
    assert commit_slice(bank, make_slice("run", "w", [("b", "y")], pane=1), "run", "w", pane=1)
    assert not commit_slice(bank, make_slice("run", "w", [("b", "y")], pane=1), "run", "w", pane=1)
    assert shown(bank) == [("a", 0), ("b", 0)]


def test_a_second_ingest_into_the_same_window_overwrites_nothing(bank):
    commit_slice(bank, make_slice("first", "0", numbered(0, 3)), "first", "0")
    paths = set(bank.files("codes"))
    commit_slice(bank, make_slice("second", "0", numbered(3, 3)), "second", "0")
    assert paths < set(bank.files("codes"))
    assert [doc_id for doc_id, _ in shown(bank)] == [f"x{number:04d}" for number in range(6)]


def test_added_at_grows_even_when_the_clock_steps_back(bank, monkeypatch):
    commit_slice(bank, make_slice("run", "0", [("a", "old")]), "run", "0")
    newest = begin_slice(bank, "run", "1").added_at
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    assert 1_000_000 < begin_slice(bank, "run", "1").added_at < newest
    commit_slice(bank, make_slice("run", "1", [("a", "new")]), "run", "1")
    assert [row["answer"] for row in bank.replay().to_pylist()] == ["new"]


def test_commits_are_remembered_past_a_checkpoint(bank):
    """Delta Lake folds its log into a checkpoint every 100 commits; app ids must survive that."""
    rows = make_slice("run", "0", numbered(0, 1))
    assert commit_slice(bank, rows, "run", "0")
    for number in range(120):
        assert commit_files(bank, "codes", [], f"filler/{number}")
    assert list((Path(bank.uri) / "codes" / "_delta_log").glob("*.checkpoint.parquet"))
    assert not commit_slice(bank, rows, "run", "0")
    assert not commit_files(bank, "codes", [], "filler/0")
    assert shown(bank) == [("x0000", 0)]


def test_a_vanished_or_changed_file_is_not_committed(bank):
    rows = make_slice("run", "0", numbered(0, 3))
    file = write_slice_rows(bank, "codes", rows.codes, begin_slice(bank, "run", "0"))
    path = Path(bank.uri) / "codes" / file.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DamagedFile, match=rf"not as it was written.*has {len(whole) - 10} bytes, written were"):
        commit_files(bank, "codes", [file], "app")
    path.unlink()
    with pytest.raises(DamagedFile, match=r"not as it was written.*it is missing\. Fix: run the same command again"):
        commit_files(bank, "codes", [file], "app")


def test_a_commit_that_never_wins_gives_up(bank, monkeypatch):
    from deltalake import DeltaTable
    from deltalake.exceptions import CommitFailedError

    attempts = []

    def losing(*_args, **_kwargs):
        attempts.append(1)
        raise CommitFailedError("version 7 exists")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", losing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(StorageError, match="other writers won the race for the table `codes` every time: '8 attempts'"):
        commit_files(bank, "codes", [], "app")
    assert len(attempts) == 8


@pytest.mark.parametrize("bad", ["", "a/b", "../up", ".hidden", "x" * 81, "ümlaut", "a b"])
def test_ingest_ids_that_name_no_folder_are_refused(bank, bad):
    with pytest.raises(UsageError, match="the ingest id cannot be used"):
        commit_slice(bank, make_slice(bad, "0", []), bad, "0")


def test_ledger_rows_of_another_slice_are_refused(bank):
    rows = make_slice("run", "1", numbered(0, 1))
    with pytest.raises(UsageError, match="the ledger rows do not belong to the slice"):
        commit_slice(bank, rows, "run", "0")
    with pytest.raises(UsageError, match="the ledger rows do not belong to the slice"):
        commit_slice(bank, replace(rows, ledger=rows.ledger.slice(0, 0)), "run", "1")
    assert bank.files("documents") == []


def test_rows_that_do_not_follow_the_schema_are_refused(bank):
    rows = make_slice("run", "0", numbered(0, 2)).codes
    stem = "run/0-p0-t1-s0"
    with pytest.raises(UsageError, match=r"missing or unknown columns: \['added_at'\]"):
        write_rows(bank, "codes", rows, stem)
    with pytest.raises(UsageError, match=r"the table `codes` have another type"):
        wrong = rows.set_column(0, "key", pa.array(["x", "y"]))
        write_slice_rows(bank, "codes", wrong, SliceId("run", "0", 0, 1))
    with pytest.raises(UsageError, match=r"the column `window` of the table `codes` holds nulls: 2"):
        wrong = rows.set_column(rows.column_names.index("window"), "window", pa.array([None, None], pa.string()))
        write_slice_rows(bank, "codes", wrong, SliceId("run", "0", 0, 1))


def test_equal_rows_in_any_order_make_the_same_file(bank):
    rows = make_slice("run", "0", numbered(0, 50)).codes
    begun = SliceId("run", "0", 0, 1_720_000_000_000_000)
    assert write_slice_rows(bank, "codes", rows, begun) == write_slice_rows(
        bank, "codes", rows.take(list(reversed(range(50)))), begun
    )


def _add_in_process(uri: str, barrier_at: float, ingest_id: str, name: str, start: int) -> bool:
    bank = Bank.open(uri)
    rows = make_slice(ingest_id, name, numbered(start, 20), dead=1)
    time.sleep(max(0.0, barrier_at - time.time()))
    return commit_slice(bank, rows, ingest_id, name)


def _create_in_process(uris: list[str], barrier_at: float, salt: str) -> list[str]:
    salts = []
    for number, uri in enumerate(uris):
        time.sleep(max(0.0, barrier_at + 0.1 * number - time.time()))
        salts.append(Bank.open_or_create(uri, manifest(key_salt=salt), codebook()).manifest.key_salt)
    return salts


def test_processes_that_commit_at_once(bank):
    """Two processes race for each of two slices: each slice counts once, and no slice is lost."""
    jobs = [("run", "0", 0), ("run", "0", 0), ("run", "1", 20), ("run", "1", 20)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        start = time.time() + 3
        won = list(pool.map(_add_in_process, *zip(*[(bank.uri, start, *job) for job in jobs], strict=True)))
    assert sorted(won[:2]) == [False, True] and sorted(won[2:]) == [False, True]
    assert shown(bank) == [(f"x{number:04d}", 0) for number in range(40)]
    assert sorted(bank.read("ledger")["slice"].to_pylist()) == ["0", "1"]
    found = bank.inspect(verify=True)
    assert (found["documents"], found["dead_letters"], found["problems"]) == (40, 2, [])


def test_processes_that_make_the_same_bank_at_once_agree(tmp_path):
    """Twenty races of three processes, each with a salt of its own: all go on with the same one."""
    uris = [str(tmp_path / f"bank-{number}") for number in range(20)]
    context = multiprocessing.get_context("spawn")
    salts = [f"{number:032x}" for number in range(3)]
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        agreed = list(pool.map(_create_in_process, [uris] * 3, [time.time() + 3] * 3, salts))
    assert agreed[0] == agreed[1] == agreed[2]
    assert [Bank.open(uri).manifest.key_salt for uri in uris] == agreed[0]
    assert all(len(list((Path(uri) / "ledger/_delta_log").glob("*.json"))) == 1 for uri in uris)
