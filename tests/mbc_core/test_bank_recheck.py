"""Two runs at once, step by step: what the other has made visible since the judging is judged again at the commit."""

from __future__ import annotations

import itertools
import json

import pytest
from bank_rows import make_bank, make_slice, numbered, shown

from mbc_core.bank import Bank, begin_slice, commit_slice, finished_slices, write_slice_rows
from mbc_core.bank import commit as commit_module
from mbc_core.bank.recheck import JudgedAt
from mbc_core.bank.slices import SliceRows
from mbc_core.errors import StorageError


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank")


def now(bank: Bank, own: bool = False) -> JudgedAt:
    return JudgedAt(bank.table("codes").version(), own)


def prepared(bank: Bank, rows: SliceRows, ingest: str, name: str = "0"):
    """The slice as the workers hand it to the committer: files on storage, not yet committed."""
    begun = begin_slice(bank, ingest, name)
    given = {"codes": rows.codes, "documents": rows.documents, "replay": rows.replay}
    files = {table: [write_slice_rows(bank, table, one, begun)] for table, one in given.items()}
    return begun, SliceRows(**files, dead_letters=[], ledger=rows.ledger)


def counts(bank: Bank, ingest: str) -> tuple[int, int, int]:
    rows = [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == ingest]
    return tuple(sum(row[name] for row in rows) for name in ("documents", "duplicates", "passages"))


def versions_of(bank: Bank, doc_id: str) -> int:
    """How many revisions of a document the table codes holds."""
    from bank_rows import key_of

    return sum(row["key"] == key_of(doc_id) for row in bank.read("codes", ["key"]).to_pylist())


@pytest.mark.parametrize("as_files", [True, False], ids=["prepared files", "rows"])
def test_a_document_that_another_run_added_meanwhile_becomes_a_duplicate(bank, as_files):
    judged = now(bank)
    mine = make_slice("one", "0", numbered(0, 5), passages=2)
    begun, files = prepared(bank, mine, "one") if as_files else (None, mine)
    commit_slice(bank, make_slice("two", "0", numbered(3, 4), passages=2), "two", "0", judged=judged)
    assert commit_slice(bank, files, "one", "0", slice_id=begun, judged=judged) is True
    assert shown(bank) == [(doc_id, passage) for doc_id, _ in numbered(0, 7) for passage in range(2)]
    assert [versions_of(bank, f"x{number:04d}") for number in (0, 3, 4, 6)] == [2, 2, 2, 2]
    assert (counts(bank, "one"), counts(bank, "two")) == ((3, 2, 6), (4, 0, 8))
    assert bank.inspect(verify=True)["problems"] == []
    assert finished_slices(bank, "one") == {"0"}
    assert commit_slice(bank, files, "one", "0", slice_id=begun, judged=judged) is False
    assert (counts(bank, "one"), counts(bank, "two")) == ((3, 2, 6), (4, 0, 8))


def test_another_content_added_meanwhile_makes_a_revision_that_comes_after_it(bank):
    judged = now(bank)
    begun, files = prepared(bank, make_slice("one", "0", numbered(0, 2, "mine")), "one")
    commit_slice(bank, make_slice("two", "0", numbered(0, 1, "theirs")), "two", "0")
    commit_slice(bank, files, "one", "0", slice_id=begun, judged=judged)
    assert counts(bank, "one") == (2, 0, 2)
    assert {row["answer"] for row in bank.replay().to_pylist()} == {"mine of x0000", "mine of x0001"}
    assert versions_of(bank, "x0000") == 2
    assert len(set(bank.read("codes")["added_at"].to_pylist())) == 2, "each revision has a moment of its own"
    assert bank.inspect(verify=True)["problems"] == []


def test_the_same_moment_on_two_machines_shows_no_passage_twice(bank, monkeypatch):
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_000_000_000)
    judged = now(bank)
    begun, files = prepared(bank, make_slice("one", "0", numbered(0, 2, "mine")), "one")
    other, theirs = prepared(bank, make_slice("two", "0", numbered(0, 2, "theirs")), "two")
    assert begun.added_at == other.added_at
    commit_slice(bank, theirs, "two", "0", slice_id=other, judged=judged)
    commit_slice(bank, files, "one", "0", slice_id=begun, judged=judged)
    assert shown(bank) == [("x0000", 0), ("x0001", 0)]


def test_dead_letters_and_counts_go_along(bank):
    judged = now(bank)
    commit_slice(bank, make_slice("two", "0", numbered(0, 3)), "two", "0")
    commit_slice(bank, make_slice("one", "0", numbered(0, 3), dead=2), "one", "0", judged=judged)
    found = bank.inspect(verify=True)
    assert (found["documents"], found["dead_letters"], found["problems"]) == (3, 2, [])
    (row,) = [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == "one"]
    assert (row["documents_in"], row["documents"], row["duplicates"]) == (5, 0, 3)
    assert json.loads(row["dead_letters"]) == {"no_text": 2}


def test_a_commit_between_the_look_and_the_commit_is_looked_at_too(bank, monkeypatch):
    """The other run's commit lands after the look: the log refuses ours, and it looks again."""
    from mbc_core.bank.recheck import Recheck

    judged, look, looks = now(bank), Recheck.overtaken, []

    def overtaken(self, codes):
        found = look(self, codes)
        looks.append(found)
        if len(looks) == 1:
            commit_slice(bank, make_slice("two", "0", numbered(0, 3)), "two", "0")
        return found

    monkeypatch.setattr(Recheck, "overtaken", overtaken)
    commit_slice(bank, make_slice("one", "0", numbered(0, 3)), "one", "0", judged=judged)
    assert looks == [False, True, False]
    assert (counts(bank, "one"), counts(bank, "two")) == ((0, 3, 0), (3, 0, 3))
    assert bank.read("codes").num_rows == 3


def test_only_new_files_of_others_are_read(bank, monkeypatch):
    commit_slice(bank, make_slice("before", "0", numbered(0, 3)), "before", "0")
    judged = now(bank)
    commit_slice(bank, make_slice("one", "0", numbered(10, 3)), "one", "0")
    commit_slice(bank, make_slice("two", "0", numbered(20, 3)), "two", "0")
    read, paths = Bank.read_file, []

    def read_file(self, table, path, columns=None):
        paths.append(f"{table}/{path.split('/')[0]}")
        return read(self, table, path, columns)

    monkeypatch.setattr(Bank, "read_file", read_file)
    commit_slice(bank, make_slice("one", "1", numbered(30, 3)), "one", "1", judged=judged)
    assert "codes/two" in paths and not {"codes/before", "codes/one"} & set(paths)
    paths.clear()
    commit_slice(bank, make_slice("one", "2", numbered(40, 3)), "one", "2", judged=JudgedAt(judged.version, own=True))
    assert {"codes/one", "codes/two"} <= set(paths) and "codes/before" not in paths


@pytest.mark.parametrize("version", [-1, 99], ids=["nothing was read", "the log of then is gone"])
def test_an_unknown_version_means_that_all_is_looked_at(bank, version):
    commit_slice(bank, make_slice("two", "0", numbered(0, 3)), "two", "0")
    commit_slice(bank, make_slice("one", "0", numbered(0, 4)), "one", "0", judged=JudgedAt(version))
    assert counts(bank, "one") == (1, 3, 1)


def test_a_stream_meets_its_own_document_again(bank):
    judged = now(bank, own=True)
    commit_slice(bank, make_slice("live", "w1", numbered(0, 3)), "live", "w1", judged=judged)
    commit_slice(bank, make_slice("live", "w2", numbered(2, 3), day=1), "live", "w2", judged=judged)
    assert counts(bank, "live") == (5, 1, 5)
    assert bank.read("codes").num_rows == 5


def test_losing_every_time_is_an_error_and_adds_nothing(bank, monkeypatch):
    from mbc_core.bank.recheck import Recheck

    monkeypatch.setattr(commit_module, "_ATTEMPTS", 2)
    tick = itertools.count()
    monkeypatch.setattr(Recheck, "overtaken", lambda self, codes: next(tick) >= 0)
    with pytest.raises(StorageError, match=r"other runs added the documents of slice 0 every time.*run again"):
        commit_slice(bank, make_slice("one", "0", numbered(0, 3)), "one", "0", judged=now(bank))
    assert shown(bank) == [] and finished_slices(bank, "one") == set()
