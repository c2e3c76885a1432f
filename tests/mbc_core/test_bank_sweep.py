"""What nobody refers to: what is deleted, when, and what is left alone."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bank_crash import next_codebook
from bank_rows import key_of, make_bank, make_slice, numbered, shown
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from mbc_core.bank import Bank, SliceId, commit_slice, register_codebook, save_statistics, write_slice_rows
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget
from mbc_core.bank.sweep import delete_older, unreferenced
from mbc_core.codebook.statistics import BatchStatistics

GONE = "x0001"
HOUR = 3600.0


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    for number in range(2):
        commit_slice(bank, make_slice(f"r{number}", "0", numbered(3 * number, 3)), f"r{number}", "0")
    return bank


def put(bank: Bank, path: str, data: bytes, age: float = 0.0) -> str:
    place = Path(bank.storage.locate(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    os.utime(place, (time.time() - age,) * 2)
    return path


def there(bank: Bank, *paths: str) -> list[bool]:
    return [Path(bank.storage.locate(path)).exists() for path in paths]


def test_nothing_of_a_whole_bank_is_unreferenced(bank):
    assert unreferenced(bank) == [] and delete_older(bank, 0) == []


def test_only_what_is_old_goes(bank):
    old = put(bank, "codes/dead/0-p0-t1-s0-00.parquet", b"x", 2 * HOUR)
    young = put(bank, "codes/dead/0-p0-t1-s0-01.parquet", b"x", 0.5 * HOUR)
    waiting = put(bank, "codebooks/pending/dead/0-w-00.safetensors", b"x", 2 * HOUR)
    half = put(bank, "replay/dead/.tmp-1-aa", b"x", 2 * HOUR)
    entry = put(bank, "ledger/_delta_log/00000000000000000009.json#1", b"x", 2 * HOUR)
    assert {one.path for one in delete_older(bank, HOUR)} == {old, waiting, half, entry}
    assert there(bank, old, young, waiting, half, entry) == [False, True, False, False, False]
    assert bank.inspect(verify=True)["problems"] == [] and len(shown(bank)) == 6


def test_a_codebook_that_was_never_registered_goes_when_it_is_old(bank):
    book = put(bank, "codebooks/00001-00.safetensors", b"x", 2 * HOUR)
    kept = [one.path for one in bank.storage.list("codebooks") if one.path != book]
    assert compact(bank, safe_age=HOUR)["swept"] == 1
    assert [one.path for one in bank.storage.list("codebooks")] == kept


def test_forget_takes_what_holds_the_document_however_young_and_leaves_the_rest(bank):
    slice_id = SliceId("going", "0", 0, 5)
    rows = make_slice("going", "0", [(GONE, "more"), ("new", "text")]).documents
    mine = write_slice_rows(bank, "documents", rows, slice_id)
    others = write_slice_rows(bank, "documents", rows.slice(1), slice_id, shard=1)
    data = bank.storage.read_bytes(f"documents/{mine.path}")
    whole = put(bank, f"documents/going/.tmp-{os.getpid()}-aa", data)
    writing = put(bank, f"documents/going/.tmp-{os.getpid()}-bb", data[:-9])
    stale = put(bank, f"documents/going/.tmp-{os.getpid()}-cc", data[:-9], 2 * HOUR)
    commit = put(bank, "codes/_delta_log/_commit_1.json.tmp", str(key_of(GONE)).encode())
    other = put(bank, "codes/_delta_log/_commit_2.json.tmp", str(key_of("new")).encode())
    forget(bank, [GONE])
    paths = (f"documents/{mine.path}", f"documents/{others.path}", whole, writing, stale, commit, other)
    assert there(bank, *paths) == [False, True, False, True, False, False, True]


def test_compact_takes_leftovers_of_forgotten_documents_however_young(bank):
    forget(bank, [GONE])
    rows = make_slice("going", "0", [(GONE, "more")]).documents
    file = write_slice_rows(bank, "documents", rows, SliceId("going", "0", 0, 5))
    assert compact(bank)["swept"] == 1
    assert there(bank, f"documents/{file.path}") == [False]


@pytest.mark.parametrize("work", [compact, lambda bank: forget(bank, [GONE])])
def test_a_commit_whose_answer_was_lost_is_found_in_the_log(bank, monkeypatch, work):
    """The files of a commit that landed must not be deleted as those of a lost race."""
    original, lost = DeltaTable.create_write_transaction, []

    def answers_no(self, actions, *rest, **more):
        original(self, actions, *rest, **more)
        if actions and len(lost) < 3:
            lost.append(len(actions))
            raise CommitFailedError("Failed to commit transaction: 0")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", answers_no)
    work(bank)
    assert len(lost) == 3
    names = {name for name, _ in shown(bank)}
    assert names == {f"x{number:04d}" for number in range(6)} - ({GONE} if work is not compact else set())
    assert bank.inspect(verify=True)["problems"] == []


def test_statistics_that_a_codebook_has_taken_in_go_when_no_run_can_want_them_anew(bank):
    windows = ["2024-07-01T00:00:00Z", "2024-07-05T00:00:00Z"]
    zero = BatchStatistics.zero(bank.manifest.codewords, bank.manifest.width, 0)
    paths = [save_statistics(bank, f"s{day}", "0", window, zero) for day, window in zip((0, 4), windows, strict=True)]
    for day, path in zip((0, 4), paths, strict=True):
        rows = make_slice(f"s{day}", "0", [(f"s{day}", "text")], day=day, statistics=path)
        commit_slice(bank, rows, f"s{day}", "0")
    book = replace(next_codebook(), built_from=(windows[0],), last_window=windows[0])
    register_codebook(bank, book, ingest_id="s4", slice_name="0")
    assert compact(bank)["swept"] == 0 and there(bank, *paths) == [True, True]
    compact(bank, safe_age=0)
    assert there(bank, *paths) == [False, True]
    assert bank.codebooks().pending_windows == (windows[1],)
    assert bank.inspect(verify=True)["problems"] == []
