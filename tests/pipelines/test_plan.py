"""The plan pass: every record judged once, the same slices whatever the order, bounded files."""

from __future__ import annotations

import fcntl
import os
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import StorageError
from pipelines.plan import Plan, Spill, deal_out, make_plan, newest
from pipelines.readers import Rejected
from pipelines.records import sum_tallies
from pipelines.staging import append_rows, read_rows, staging_errors, staging_folder
from schemas.document import Document

SALT = b"0123456789abcdef"
DAY = 86_400
DAY_MICROS = DAY * 1_000_000


class Nothing:
    """A bank that shows no document."""

    def status(self, keys, hashes):
        return np.zeros(len(keys), np.int8)


class Shows:
    """A bank that shows some documents."""

    def __init__(self, *documents):
        self.known = {(one.key(SALT), one.content_hash(SALT)) for one in documents}
        self.keys = {key for key, _ in self.known}

    def status(self, keys, hashes):
        pairs = [(int(key), row.tobytes()) for key, row in zip(keys, hashes, strict=True)]
        return np.array([1 if one in self.known else 2 if one[0] in self.keys else 0 for one in pairs], np.int8)


def spill_of(folder, records) -> Spill:
    spill = Spill(folder, SALT, DAY)
    spill.read(records)
    spill.finish()
    return spill


def plan_of(folder, records, visible=None, **limits) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    spill = spill_of(folder, records)
    plan = make_plan(spill, visible or Nothing(), **limits)
    deal_out(spill, plan)
    return plan


def document(number: int, day: int | None = 0, text: str = "") -> Document:
    time = None if day is None else day * DAY_MICROS + number
    return Document(f"d{number}", text or f"Text of {number}.", event_time=time)


def ids(plan: Plan) -> list[list[str]]:
    return [sorted(read_rows(one.path)["doc_id"].to_pylist()) for one in plan.slices]


def test_slices_follow_the_windows_undated_first(tmp_path):
    records = [document(1, 5), document(2, None), document(3, 0), document(4, 5), document(5, 0)]
    plan = plan_of(tmp_path / "a", records, slice_documents=2)
    assert ids(plan)[0][0] == "d2"
    assert [list(one.parts) for one in plan.slices] == [
        ["undated", "1970-01-01T00:00:00Z"],
        ["1970-01-01T00:00:00Z", "1970-01-06T00:00:00Z"],
        ["1970-01-06T00:00:00Z"],
    ]
    assert [one.continues for one in plan.slices] == ["1970-01-01T00:00:00Z", "1970-01-06T00:00:00Z", None]
    assert plan.slices[0].parts == {"undated": 1, "1970-01-01T00:00:00Z": 2}
    assert sum(one.documents for one in plan.slices) == plan.documents_in == 5
    assert plan.judged == ()


def test_the_order_of_the_records_changes_nothing(tmp_path):
    records = [document(number, number % 7) for number in range(300)]
    first = plan_of(tmp_path / "a", records, slice_documents=64)
    random.Random(3).shuffle(records)
    second = plan_of(tmp_path / "b", records, slice_documents=64)
    assert [one.name for one in first.slices] == [one.name for one in second.slices]
    assert ids(first) == ids(second)
    assert len(first.slices) == 5


def test_slices_are_bounded_by_text_too_and_one_giant_still_fits(tmp_path):
    records = [document(number, 0, "x" * 1000) for number in range(10)] + [document(99, 1, "y" * 50_000)]
    plan = plan_of(tmp_path / "a", records, slice_text_bytes=3000)
    assert [one.documents for one in plan.slices] == [3, 3, 3, 1, 1]


def test_same_id_twice_keeps_the_newest_then_the_greater_hash(tmp_path):
    old, new = document(1, 1, "old"), document(1, 2, "new")
    undated = document(1, None, "undated")
    tie = [document(2, 3, "one"), document(2, 3, "two"), document(2, 3, "two")]
    plan = plan_of(tmp_path / "a", [new, old, undated, *tie])
    (judged,) = plan.judged
    assert {(one.window, one.replaced, one.duplicates) for one in judged.tallies} == {
        ("1970-01-02T00:00:00Z", 1, 0),
        ("undated", 1, 0),
        ("1970-01-04T00:00:00Z", 2, 0),
    }
    kept = {text for one in plan.slices for text in read_rows(one.path)["text"].to_pylist()}
    greater = max(tie, key=lambda one: one.content_hash(SALT)).text
    assert kept == {"new", greater}
    assert plan.documents_in == 6


def test_what_the_bank_shows_is_a_duplicate_and_a_revision_is_not(tmp_path):
    known, revised = document(1), document(2)
    plan = plan_of(tmp_path / "a", [known, document(2, 0, "revised"), document(3)], Shows(known, revised))
    (judged,) = plan.judged
    assert [(one.documents_in, one.duplicates, one.replaced) for one in judged.tallies] == [(1, 1, 0)]
    assert ids(plan) == [["d2", "d3"]]


def test_an_old_version_of_a_known_document_loses_before_it_is_compared(tmp_path):
    """The newest of the run is already visible; the older one must not come in beside it as a revision."""
    newest_one = document(1, 2, "new")
    plan = plan_of(tmp_path / "a", [document(1, 1, "old"), newest_one], Shows(newest_one))
    (judged,) = plan.judged
    assert [(one.duplicates, one.replaced) for one in judged.tallies] == [(0, 1), (1, 0)]
    assert plan.slices == ()


def test_rejected_records_are_counted_and_keep_their_bytes(tmp_path):
    bad = [Rejected("not_json", "m", "f.jsonl", 3, b"raw"), Rejected("no_text", "m", "f.jsonl", 4, b"", "some-id")]
    plan = plan_of(tmp_path / "a", [bad[0], document(1), bad[1]])
    (judged,) = plan.judged
    assert [one.dead_letters for one in judged.tallies] == [{"not_json": 1, "no_text": 1}]
    rows = read_rows(judged.path).to_pylist()
    assert [(row["reason"], row["position"], row["raw"]) for row in rows] == [
        ("not_json", 3, b"raw"),
        ("no_text", 4, b""),
    ]
    assert rows[0]["key"] is None
    assert rows[1]["key"] == Document("some-id", "x").key(SALT)
    assert plan.documents_in == 3


def test_many_rejected_records_go_into_several_bounded_commits(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.plan._REJECTED_ROWS", 10)
    plan = plan_of(tmp_path / "a", [Rejected("not_json", "m", "f", number, b"x") for number in range(25)])
    assert [sum(one.tallies[0].dead_letters.values()) for one in plan.judged] == [10, 10, 5]
    assert len({one.name for one in plan.judged}) == 3


def test_texts_are_spilled_and_the_chunks_used_up(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.plan._CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr("pipelines.plan.SLICE_TEXT_BYTES", 500)
    plan = plan_of(tmp_path / "a", [document(number, number % 3) for number in range(100)], slice_documents=30)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"slice-{n:06d}" for n in range(4)]
    assert sorted(one for part in ids(plan) for one in part) == sorted(f"d{number}" for number in range(100))


def test_finished_slices_get_no_file(tmp_path):
    spill = spill_of(tmp_path, [document(number, number % 2) for number in range(20)])
    plan = make_plan(spill, Nothing(), slice_documents=5)
    deal_out(spill, plan, {plan.slices[0].name, plan.slices[3].name})
    assert [one.path.exists() for one in plan.slices] == [False, True, True, False]
    assert plan.names == {one.name for one in plan.slices}


def test_fingerprint_names_the_documents_not_the_files(tmp_path):
    records = [document(1), Rejected("not_json", "m", "a.jsonl", 2, b"x"), document(2)]
    renamed = [document(1), Rejected("not_json", "m", "b.jsonl", 2, b"x"), document(2)]
    other = [document(1), Rejected("not_json", "m", "a.jsonl", 2, b"y"), document(2)]
    prints = []
    for number, given_records in enumerate((records, renamed, other)):
        folder = tmp_path / str(number)
        folder.mkdir()
        prints.append(spill_of(folder, given_records).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_nothing_at_all(tmp_path):
    plan = plan_of(tmp_path / "a", [])
    assert (plan.documents_in, plan.slices, plan.judged, len(plan.keys)) == (0, (), (), 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 3)), st.sampled_from(["a", "b"])), max_size=40
    ),
    st.integers(1, 7),
)
def test_counts_always_add_up(tmp_path_factory, raw, limit):
    records = [document(number, day, text) for number, day, text in raw]
    shown = Shows(*(document(number, 0, "a") for number in range(3)))
    plan = plan_of(tmp_path_factory.mktemp("plan") / "x", records, shown, slice_documents=limit)
    tallies = sum_tallies(one for judged in plan.judged for one in judged.tallies)
    encoded = sum(one.documents for one in plan.slices)
    assert encoded + sum(one.documents_in for one in tallies) == len(records)
    winners = {}
    for one in records:
        rank = (one.event_time if one.event_time is not None else -1, one.content_hash(SALT))
        winners[one.doc_id] = max(winners.get(one.doc_id, ((-2, b""), None)), (rank, one.text))
    assert len(plan.keys) == len(winners)
    kept = {row["doc_id"]: row["text"] for one in plan.slices for row in read_rows(one.path).to_pylist()}
    assert all(winners[doc_id][1] == text for doc_id, text in kept.items())


def test_newest_is_the_plain_loop(tmp_path):
    generator = random.Random(1)
    records = [
        document(generator.randrange(20), generator.choice([None, 0, 1]), generator.choice("abc")) for _ in range(200)
    ]
    index = spill_of(tmp_path, records).index()
    best = {}
    for place, one in enumerate(records):
        rank = (index.times[place], one.content_hash(SALT), place)
        best[one.doc_id] = max(best.get(one.doc_id, rank), rank)
    wins = np.flatnonzero(newest(index)).tolist()
    assert sorted(
        (records[place].doc_id, index.times[place], records[place].content_hash(SALT)) for place in wins
    ) == sorted((doc_id, time, content) for doc_id, (time, content, _) in best.items())


def test_files_can_be_appended_to(tmp_path):
    rows = pa.RecordBatch.from_pydict({"x": [1, 2]})
    append_rows(tmp_path / "f", rows)
    append_rows(tmp_path / "f", rows.slice(1))
    assert read_rows(tmp_path / "f")["x"].to_pylist() == [1, 2, 2]


def test_a_killed_run_leaves_nothing_for_long(tmp_path):
    left = tmp_path / "mbc-staging-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "chunk-000000").touch()
    held = tmp_path / "mbc-staging-held"
    held.mkdir()
    with (held / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with staging_folder(tmp_path) as folder:
            assert folder.is_dir()
            assert not left.exists()
            assert held.exists()
    assert not folder.exists()


def test_a_full_disk_is_said_plainly(tmp_path):
    with (
        pytest.raises(StorageError, match=r"Likely cause: the disk is full\. Fix: free some space"),
        staging_errors(tmp_path),
    ):
        raise OSError(28, "No space left on device")


def test_folders_of_runs_that_were_killed_are_removed_by_the_next(tmp_path):
    dead, fresh, old = (tmp_path / f"mbc-staging-{name}" for name in ("dead", "fresh", "old"))
    for one in (dead, fresh, old):
        one.mkdir()
    (dead / "lock").touch()
    (dead / "chunk").touch()
    os.utime(old, (0, 0))
    with staging_folder(tmp_path) as mine, staging_folder(tmp_path) as other:
        assert mine.is_dir() and other.is_dir(), "a run that lives keeps its folder"
        assert not dead.exists() and not old.exists()
        assert fresh.exists(), "another run may be about to lock it"
