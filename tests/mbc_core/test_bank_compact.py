"""Compaction: fewer files, the same rows, nothing of a run that is going on is touched."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bank_crash import next_codebook
from bank_rows import key_of, make_bank, make_slice, numbered, shown

from mbc_core.bank import Bank, SliceId, commit, commit_slice, finished_slices, register_codebook, write_slice_rows
from mbc_core.bank import compact as compact_module
from mbc_core.bank.commit import settle_all
from mbc_core.bank.compact import compact, superseded
from mbc_core.bank.delta_log import clear_log, files_of
from mbc_core.bank.rewrite import commit_after, removed_rows, rewrite_table
from mbc_core.bank.slices import COMPACTED, begin_slice
from mbc_core.bank.sweep import unreferenced
from mbc_core.errors import StorageError, UsageError
from schemas.tables import TABLES

MINUTE = 60.0


def add(bank: Bank, name: str, documents, **more) -> None:
    commit_slice(bank, make_slice(name, "0", documents, **more), name, "0")


def moments(bank: Bank) -> list[int]:
    return sorted(set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()))


def views(bank: Bank) -> dict[int | None, list[dict]]:
    return {moment: bank.passages(moment).to_pylist() for moment in (*moments(bank), None)}


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Six slices of three documents, of which the second was revised twice."""
    bank = make_bank(tmp_path / "bank")
    for number in range(4):
        add(bank, f"run{number}", numbered(3 * number, 3), passages=2, dead=1, day=number)
    for number in range(2):
        add(bank, f"again{number}", numbered(3, 3, f"text {number}"), passages=2, day=1)
    return bank


def age(bank: Bank, seconds: float) -> None:
    """Make every file look older."""
    then = time.time() - seconds
    for folder, _, names in os.walk(bank.uri):
        for name in names:
            os.utime(Path(folder, name), (then, then))


def test_many_files_become_one_and_every_moment_reads_the_same(bank):
    before, payload = views(bank), bank.read("codes").sort_by([("added_at", "ascending"), ("key", "ascending")])
    result = compact(bank, history=3600)
    assert {table: len(bank.files(table)) for table in ("codes", "documents", "replay", "dead_letter", "ledger")} == {
        "codes": 1, "documents": 1, "replay": 1, "dead_letter": 1, "ledger": 1,
    }  # fmt: skip
    assert (result["merged"], result["shards"], sum(result["dropped"].values())) == (6 + 6 + 6 + 4 + 6, 5, 0)
    assert views(bank) == before
    after = bank.read("codes").sort_by([("added_at", "ascending"), ("key", "ascending")])
    names = ["key", "passage", "address", "words", "codebook_version", "window", "event_time", "added_at"]
    order = [(name, "ascending") for name in ("added_at", "key", "passage")]
    assert after.select(names).sort_by(order).equals(payload.select(names).sort_by(order))
    assert result["after"]["files"] < result["before"]["files"]
    assert unreferenced(bank) == []
    assert bank.inspect(verify=True)["problems"] == []
    again = compact(bank, history=3600)
    assert (again["merged"], again["shards"], again["swept"]) == (0, 0, 0)


def test_superseded_revisions_go_after_the_history_and_not_before(bank):
    before, all_moments = views(bank), moments(bank)
    compact(bank, history=0, safe_age=0)
    assert bank.passages().to_pylist() == before[None]
    for moment in all_moments[5:]:
        assert bank.passages(moment).to_pylist() == before[moment]
    left = bank.read("codes").num_rows
    assert left == 24 and bank.read("documents").num_rows == 12 and bank.read("replay").num_rows == 12
    assert bank.inspect(verify=True)["problems"] == []
    assert sum(removed_rows(bank).values()) == 12


def test_what_a_moment_inside_the_history_shows_is_kept():
    """Revisions at 10, 20, 30; whoever reads as of 25 needs that of 20."""
    codes = pa.table({"key": [7, 7, 7, 8], "added_at": pa.array([10, 20, 30, 5], pa.timestamp("us", "UTC"))})
    gone = {at: superseded(codes, at)["added_at"].cast(pa.int64()).to_pylist() for at in (9, 20, 29, 30)}
    assert gone == {9: [], 20: [10], 29: [10], 30: [10, 20]}


def test_files_of_a_run_that_is_going_on_stay_and_old_leftovers_go(bank):
    young = SliceId("young", "0", 0, moments(bank)[-1] + 5)
    write_slice_rows(bank, "codes", bank.read("codes"), young)
    assert compact(bank)["swept"] == 0
    assert [one.path.split("/")[1] for one in unreferenced(bank)] == ["young"]
    age(bank, 2 * 86_400)
    old_log = len(bank.storage.list("codes/_delta_log"))
    assert compact(bank)["swept"] == 1
    assert unreferenced(bank) == [] and old_log > 1


def test_documents_of_an_interrupted_run_go_but_not_those_of_a_slice_about_to_be_committed(bank, monkeypatch):
    original, seen = commit.commit_files, []

    def in_between(bank_, table, *rest):
        if table == "codes" and not seen:
            seen.append(compact(bank_, history=0))
        return original(bank_, table, *rest)

    monkeypatch.setattr(commit, "commit_files", in_between)
    add(bank, "late", numbered(50, 3))
    assert seen and len(shown(bank)) == 24 + 3
    assert bank.inspect(verify=True)["problems"] == []


def add_and_die(bank, monkeypatch, *, before: str) -> None:
    """The slice `late`, whose run dies before it commits this table."""
    original = commit.commit_files

    def dies(bank_, table, *rest):
        if table == before:
            raise KeyboardInterrupt
        return original(bank_, table, *rest)

    monkeypatch.setattr(commit, "commit_files", dies)
    with pytest.raises(KeyboardInterrupt):
        add(bank, "late", numbered(50, 3))
    monkeypatch.undo()


@pytest.mark.parametrize("whole", [True, False])
def test_a_rerun_of_an_interrupted_slice_does_not_count_on_rows_that_were_compacted_away(bank, monkeypatch, whole):
    add_and_die(bank, monkeypatch, before="codes")
    if whole:
        compact(bank, history=0, safe_age=0)
        assert not {key_of("x0050")} & set(bank.read("documents")["key"].to_pylist())
    else:  # the compaction died too, after it had merged documents
        now = time.time_ns() // 1000
        rule = compact_module._drop_rule(bank, "documents", now, now)
        compact_module._compact_table(bank, "documents", rule, compact_module._Work())
    add(bank, "late", numbered(50, 3))
    assert len(shown(bank)) == 27 and bank.inspect(verify=True)["problems"] == []
    assert finished_slices(bank, "late") == {"0"}


def test_a_run_resumed_after_a_compaction_plans_as_if_it_had_added_nothing(bank):
    before = len(bank.visible(ignore_ingest="run2"))
    compact(bank)
    assert all(path.startswith(f"{COMPACTED}/") for path, _ in bank.files("codes"))
    assert len(bank.visible()) == 12
    assert len(bank.visible(ignore_ingest="run2")) == before == 9
    assert finished_slices(bank, "run2") == {"0"}
    assert begin_slice(bank, "new", "0").added_at > moments(bank)[-1]
    assert not commit_slice(bank, make_slice("run2", "0", numbered(6, 3), passages=2, dead=1, day=2), "run2", "0")
    with pytest.raises(UsageError, match="the ingest id cannot be used"):
        SliceId.begin(COMPACTED, "0")


def test_a_commit_from_a_stale_view_is_refused(bank):
    seen = bank.table("codes")
    add(bank, "between", numbered(70, 1))
    assert not commit_after(bank, "codes", seen, [], files_of(seen))
    assert len(shown(bank)) == 25


def test_a_lost_race_leaves_no_files_and_is_tried_again(bank, monkeypatch):
    original, lost = compact_module.commit_after, []

    def loses_once(bank_, table, seen, added, removed, *rest):
        if table == "codes" and not lost:
            lost.append(table)
            add(bank, "faster", numbered(70, 2))
        return original(bank_, table, seen, added, removed, *rest)

    monkeypatch.setattr(compact_module, "commit_after", loses_once)
    compact(bank)
    assert lost and len(bank.files("codes")) == 1
    assert unreferenced(bank) == [] and len(shown(bank)) == 26
    monkeypatch.setattr(compact_module, "commit_after", lambda *args: False)
    monkeypatch.setattr(compact_module.time, "sleep", lambda seconds: None)
    add(bank, "more", numbered(90, 2))
    with pytest.raises(StorageError, match=r"other writers won the race .*run the same command again"):
        compact(bank)


def test_readers_read_again_what_was_compacted_under_them(bank, monkeypatch):
    original, seen = Bank.read_file, []

    def in_between(self, table, path, columns=None):
        if table == "documents" and not seen:
            seen.append(table)
            compact(bank, history=0, safe_age=0)
        return original(self, table, path, columns)

    want = bank.passages().to_pylist()
    monkeypatch.setattr(Bank, "read_file", in_between)
    assert bank.passages().to_pylist() == want and seen


def test_a_log_that_is_cut_short_loses_no_commit_and_shows_no_half_table(bank):
    stale, before = bank.table("codes"), shown(bank)
    rewrite_table(bank, "codes", lambda rows: None)
    last = bank.table("codes").version()
    assert clear_log(bank, "codes") == last and clear_log(bank, "codes") == 0
    assert shown(bank) == before
    assert not commit_after(bank, "codes", stale, [], {}), "the name of the next version must not be free"
    for version in range(last):
        with pytest.raises(Exception, match="cannot be read"):
            bank.table("codes", version)
    add(bank, "after", numbered(80, 1))
    assert len(shown(bank)) == len(before) + 1
    assert {entry.get("mbc.ledger") is not None for entry in bank.table("codes").history()} == {True, False}


def test_a_ledger_lost_before_a_compaction_is_settled_by_it(bank, monkeypatch):
    add_and_die(bank, monkeypatch, before="ledger")
    age(bank, 3 * 86_400)
    compact(bank)
    assert bank.inspect(verify=True)["problems"] == [] and settle_all(bank) == 0
    assert "late" in bank.read("ledger")["ingest_id"].to_pylist()


def test_shards_hold_ranges_of_keys(bank, monkeypatch):
    monkeypatch.setattr(compact_module, "SHARD_ROWS", 8)
    before = views(bank)
    compact(bank, history=3600)
    found = [bank.read_file("codes", path)["key"].to_numpy() for path, _ in bank.files("codes")]
    assert len(found) == 4
    ends = sorted((int(keys.min()), int(keys.max())) for keys in found)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ends))
    assert views(bank) == before


def test_a_moment_has_the_codebook_of_then(bank):
    """A revision under a newer codebook: whoever reads as of before sees the old codes with the old version."""
    before = moments(bank)[-1]
    want = bank.passages(before).to_pylist()
    register_codebook(bank, next_codebook(), ingest_id="newer", slice_name="0")
    add(bank, "newer", numbered(0, 3, "newer"), passages=2, version=1)
    for _ in range(2):
        now = {(row["doc_id"], row["codebook_version"]) for row in bank.passages().to_pylist()}
        assert {version for doc_id, version in now if doc_id in ("x0000", "x0001", "x0002")} == {1}
        assert bank.passages(before).to_pylist() == want and {row["codebook_version"] for row in want} == {0}
        compact(bank, history=3600)


def test_wrong_times_are_refused(bank):
    with pytest.raises(UsageError, match="a time is negative"):
        compact(bank, history=-1.0)
    assert np.all([name in TABLES for name in compact_module.MERGED_TABLES])
