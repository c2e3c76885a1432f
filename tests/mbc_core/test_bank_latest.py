"""The newest revisions as a stream sees them: judged like the whole bank, read file by file."""

from __future__ import annotations

import numpy as np
import pytest
from bank_rows import FIRST, hash_of, key_of, make_bank, make_slice

from mbc_core.bank import Status, commit_slice
from mbc_core.bank.compact import compact
from mbc_core.bank.latest import LatestRevisions, Standing
from mbc_core.bank.tombstones import tombstone_of, write_tombstones
from mbc_core.errors import DamagedFile

HOUR = 3_600_000_000


@pytest.fixture
def bank(tmp_path):
    return make_bank(tmp_path / "bank")


def add(bank, ingest_id, name, documents, **more):
    assert commit_slice(bank, make_slice(ingest_id, name, documents, **more), ingest_id, name, more.get("pane", 0))


def judge(latest, documents, times=None):
    keys = np.array([key_of(name) for name, _ in documents], np.int64)
    hashes = np.frombuffer(b"".join(hash_of(content) for _, content in documents), np.uint8).reshape(-1, 16)
    moments = np.array(times if times is not None else [FIRST + 100 * HOUR] * len(documents), np.int64)
    return latest.standing(keys, hashes, moments).tolist(), latest.status(keys, hashes).tolist()


def test_an_empty_bank_knows_nothing(bank):
    latest = LatestRevisions(bank, "me")
    latest.refresh()
    assert len(latest) == 0
    assert judge(latest, [("a", "1")]) == ([Standing.NEW], [Status.NEW])
    assert judge(latest, []) == ([], [])


def test_it_judges_as_the_whole_bank_does_whatever_is_added(bank):
    latest, seen = LatestRevisions(bank, "me"), []
    rng = np.random.default_rng(5)
    for number in range(6):
        some = [(f"d{name}", f"c{rng.integers(3)}") for name in rng.choice(12, size=5, replace=False)]
        add(bank, "other", f"slice-{number}", some, passages=2)
        seen += some
        latest.refresh()
        asked = [*seen, ("never", "seen"), *[(name, "another") for name, _ in seen]]
        keys = np.array([key_of(name) for name, _ in asked], np.int64)
        hashes = np.frombuffer(b"".join(hash_of(content) for _, content in asked), np.uint8).reshape(-1, 16)
        assert judge(latest, asked)[1] == bank.visible().status(keys, hashes).tolist()
    assert len(latest) == len({name for name, _ in seen})


def test_only_an_ingests_own_newer_revision_replaces_what_comes_later(bank):
    """Each was added with the time FIRST; what is asked about is an hour older or newer."""
    add(bank, "me", "w", [("mine", "new")])
    add(bank, "other", "w", [("theirs", "new")])
    latest = LatestRevisions(bank, "me")
    latest.refresh()
    asked = [("mine", "old"), ("theirs", "old"), ("mine", "new")]
    assert judge(latest, asked, [FIRST - HOUR] * 3)[0] == [Standing.OLDER, Standing.REVISION, Standing.DUPLICATE]
    assert judge(latest, asked, [FIRST + HOUR] * 3)[0] == [Standing.REVISION, Standing.REVISION, Standing.DUPLICATE]
    many = [("mine", f"content {number}") for number in range(50)]
    assert set(judge(latest, many, [FIRST] * 50)[0]) == {Standing.REVISION}, "corrected texts that kept their date"


def test_each_file_is_read_once(bank, monkeypatch):
    latest, read = LatestRevisions(bank, "me"), []
    plain = type(bank).read_file
    monkeypatch.setattr(type(bank), "read_file", lambda self, *args: read.append(args[:2]) or plain(self, *args))
    for number in range(3):
        add(bank, "me", f"w{number}", [(f"d{number}", "1")])
        read.clear()
        latest.refresh()
        assert sorted(table for table, _ in read) == ["codes", "documents"]
    read.clear()
    latest.refresh()
    assert read == []


def test_documents_of_runs_that_died_wait_until_codes_name_them(bank):
    latest = LatestRevisions(bank, "me")
    rows = make_slice("me", "w", [("a", "1")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbc_core.bank.commit.write_slice_rows", _dies_at_codes)
        with pytest.raises(RuntimeError):
            commit_slice(bank, rows, "me", "w")
    add(bank, "me", "other", [("b", "1")])
    latest.refresh()
    assert judge(latest, [("a", "1"), ("b", "1")])[1] == [Status.NEW, Status.DUPLICATE]
    assert commit_slice(bank, rows, "me", "w")
    latest.refresh()
    assert judge(latest, [("a", "1"), ("b", "1")])[1] == [Status.DUPLICATE, Status.DUPLICATE]


def _dies_at_codes(bank, table, rows, slice_id, shard=0):
    from mbc_core.bank.slices import stamped, write_rows

    if table == "codes":
        raise RuntimeError("died")
    return write_rows(bank, table, stamped(table, rows, slice_id.added_at), slice_id.stem(shard))


def test_after_a_compaction_it_still_knows_what_is_its_own(bank):
    latest = LatestRevisions(bank, "me")
    add(bank, "me", "w0", [("mine", "1")])
    latest.refresh()
    add(bank, "other", "w1", [("theirs", "1")])
    compact(bank, history=0, safe_age=0)
    latest.refresh()
    asked = [("mine", "0"), ("theirs", "0")]
    assert judge(latest, asked, [FIRST - HOUR] * 2)[0] == [Standing.OLDER, Standing.REVISION]


def test_what_was_to_be_forgotten_is_refused(bank):
    add(bank, "me", "w", [("a", "1"), ("b", "1")])
    latest = LatestRevisions(bank, "me")
    latest.refresh()
    salt = bank.manifest.salt
    write_tombstones(bank, [(tombstone_of(key_of("a"), salt), None)], 5)
    latest.refresh()
    assert judge(latest, [("a", "1"), ("b", "1")]) == (
        [Standing.FORGOTTEN, Standing.DUPLICATE],
        [Status.FORGOTTEN, Status.DUPLICATE],
    )


def test_a_missing_file_is_named(bank):
    add(bank, "me", "w", [("a", "1")])
    ((path, _),) = bank.files("codes")
    bank.storage.delete(f"codes/{path}")
    with pytest.raises(DamagedFile, match="is missing"):
        LatestRevisions(bank, "me").refresh()
