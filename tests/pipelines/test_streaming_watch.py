"""The watched folder by itself: what is read, when, in which order, and where the watermark stands."""

from __future__ import annotations

import gzip
import os
import time

import pytest
from tiny import corpus, to_line, write_corpus

from mbc_core.errors import StorageError, UsageError
from pipelines import backlog as backlog_module
from pipelines import watch as watch_module
from pipelines.backlog import Backlog
from pipelines.live import Drain
from pipelines.readers import Rejected
from pipelines.watch import FileStream, FolderWatch, WatchRule, check_watched, unfinished
from schemas.document import Document

OLD = 946_684_800_000_000  # 2000-01-01
RULE = WatchRule(poll=0.05, drain_wait=0.1)


def old(path, seconds=3600):
    """Make a file look as if nobody had touched it for a while."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return str(path)


def run(stream, drain=None, until=lambda elements: False, steps=400):
    """Step to the end, or until enough has come; (time, record) pairs and the watermarks told with them."""
    elements, marks = [], []
    for _ in range(steps):
        step = stream.step()
        elements += step.elements
        marks.append(step.watermark)
        if step.done or until(elements):
            return elements, marks, step.done
        if drain is not None and not step.elements:
            drain.ask()
            drain = None
    raise AssertionError(f"no end after {steps} steps; {len(elements)} elements so far")


def stream_of(folder, tmp_path, drain=None, rule=RULE, said=None):
    (tmp_path / "staging").mkdir(exist_ok=True)
    say = (lambda line: None) if said is None else said.append
    return FileStream([str(folder)], rule, tmp_path / "staging", drain or Drain(), say)


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


# ------------------------------------------------------------------------------------------------- which, and when


def test_a_file_is_read_once_when_two_looks_saw_it_unchanged(inbox):
    watch = FolderWatch([str(inbox)], poll=100)
    path = inbox / "a.jsonl"
    path.write_bytes(b"x")
    assert watch.look() == ([], True), "it was changed a moment ago"
    path.write_bytes(b"xy")
    assert watch.look() == ([], True), "and again"
    assert list(watch.open) == [str(path)]
    (whole,), news = watch.look()
    assert (whole.path, whole.size, news) == (str(path), 2, False)
    assert watch.mark_read(whole)
    assert watch.look() == ([], False)
    assert watch.open == {}


def test_a_file_left_alone_for_two_polls_is_read_at_the_first_look(inbox):
    (inbox / "a.jsonl").write_bytes(b"x")
    old(inbox / "a.jsonl", seconds=9)
    assert FolderWatch([str(inbox)], poll=5).look() == ([], True)
    assert len(FolderWatch([str(inbox)], poll=4).look()[0]) == 1


def test_a_changed_file_is_read_again(inbox):
    watch = FolderWatch([str(inbox)], poll=1)
    path = inbox / "a.jsonl"
    path.write_bytes(b"x")
    old(path)
    (first,), _ = watch.look()
    assert watch.mark_read(first)
    path.write_bytes(b"y")  # as long as before
    old(path, seconds=1800)
    (second,), news = watch.look()
    assert news
    assert (second.size, second.mtime_ns) != (first.size, first.mtime_ns)


def test_a_file_that_changes_while_it_is_read_is_not_taken(inbox):
    watch = FolderWatch([str(inbox)], poll=1)
    path = inbox / "a.jsonl"
    path.write_bytes(b"x")
    old(path)
    (state,), _ = watch.look()
    path.write_bytes(b"xyz")
    assert not watch.mark_read(state)
    assert watch.holding()
    assert watch.look() == ([], True)
    (again,), _ = watch.look()
    assert again.size == 3


@pytest.mark.parametrize("name", ["a.jsonl.tmp", "a.part", ".a.jsonl", "_a.jsonl", "a.jsonl~", "A.JSONL.PART"])
def test_names_of_unfinished_files_are_left_alone(inbox, name):
    assert unfinished(name)
    (inbox / name).write_bytes(b"x")
    old(inbox / name)
    watch = FolderWatch([str(inbox)], poll=1)
    assert watch.look() == ([], False)
    (inbox / name).rename(inbox / "whole.jsonl")
    assert [one.path for one in watch.look()[0]] == [str(inbox / "whole.jsonl")]


def test_a_glob_sees_files_that_come_later_and_nothing_else(inbox):
    watch = FolderWatch([str(inbox / "*" / "*.jsonl")], poll=1)
    assert watch.look() == ([], False)
    (inbox / "day").mkdir()
    for name in ("a.jsonl", "b.txt"):
        (inbox / "day" / name).write_bytes(b"x")
        old(inbox / "day" / name)
    assert [one.path for one in watch.look()[0]] == [str(inbox / "day" / "a.jsonl")]


def test_a_link_to_nowhere_is_a_dead_letter_not_an_endless_wait(inbox, tmp_path):
    (inbox / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    elements, _, done = run(stream_of(inbox, tmp_path, rule=WatchRule(poll=0.05, idle_exit=0.2)))
    assert done
    assert [(one.reason, one.source) for _, one in elements] == [("source_vanished", str(inbox / "gone.jsonl"))]


# ---------------------------------------------------------------------------------------- order and the watermark


def test_documents_come_by_event_time_whatever_their_files_and_the_watermark_is_the_oldest_that_waits(
    inbox, tmp_path, monkeypatch
):
    monkeypatch.setattr(watch_module, "RELEASE_DOCUMENTS", 10)
    documents = [one for one in corpus(100) if one.event_time is not None]
    for number in range(3):
        old(write_corpus(inbox / f"{number}.jsonl", documents[number::3][::-1]))
    elements, marks, _ = run(stream_of(inbox, tmp_path), until=lambda found: len(found) == len(documents))
    times = [at for at, _ in elements]
    assert times == sorted(one.event_time for one in documents)
    assert [one for _, one in elements] == sorted(documents, key=lambda one: one.event_time)
    told = [one for one in marks if one is not None]
    assert told == sorted(told)
    assert told[:-1] == times[::10], "after ten documents nothing older than the eleventh can follow"


def test_a_document_without_a_time_arrives_when_its_file_did(inbox, tmp_path):
    old(write_corpus(inbox / "a.jsonl", [Document("x", "No date.")]), seconds=500)
    mtime = (inbox / "a.jsonl").stat().st_mtime_ns // 1000
    (element,), _, _ = run(stream_of(inbox, tmp_path), until=len)
    assert element == (mtime, Document("x", "No date."))
    (inbox / "b.jsonl").write_bytes(to_line(Document("y", "From a machine whose clock is ahead.")))
    ahead = time.time() + 900
    os.utime(inbox / "b.jsonl", (ahead, ahead))
    elements, _, _ = run(stream_of(inbox, tmp_path), until=lambda found: len(found) == 2)
    assert elements[1][0] <= time.time() * 1e6


def test_the_watermark_follows_the_clock_only_when_nothing_is_open(inbox, tmp_path):
    old(write_corpus(inbox / "a.jsonl", [Document("x", "Old.", event_time=OLD)]))
    stream = stream_of(inbox, tmp_path)
    assert stream.step().watermark == OLD, "read, but not handed on yet"
    began = time.time() * 1e6
    run(stream, until=len)
    time.sleep(0.1)
    assert began - 1e6 < stream.step().watermark <= time.time() * 1e6
    held = set()
    for number in range(12):  # a writer is at work from now on
        with (inbox / "b.jsonl").open("ab") as file:
            file.write(b"x")
        os.utime(inbox / "b.jsonl", (time.time() + 60 + number,) * 2)  # however slow this machine is
        mark = stream.step().watermark
        if stream.counts.open_files:
            held.add(mark)
    assert stream.counts.open_files == 1
    assert len(held) == 1


def test_a_file_that_is_written_for_ever_holds_the_watermark_for_a_bounded_time(inbox, monkeypatch):
    clock = [1000.0]
    watch = FolderWatch([str(inbox)], poll=5, wall=lambda: clock[0])
    for _ in range(3):
        with (inbox / "log.jsonl").open("ab") as file:
            file.write(b"x")
        os.utime(inbox / "log.jsonl", (clock[0], clock[0]))
        watch.look()
        assert watch.holding()
        clock[0] += 200
    clock[0] += 1
    assert not watch.holding()


def test_what_memory_should_not_hold_waits_on_disk_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(backlog_module, "MEMORY_DOCUMENTS", 16)
    records = [
        *corpus(150),
        Document("qa", "With questions.", "t", "u", -62_135_596_800_000_000, (("q", "a"),)),
        *(Rejected("not_json", "why", f"file-{number}", number, b"\xff", None) for number in range(60)),
        Document("last", "Year 9999.", event_time=253_402_300_799_999_999),
    ]
    found = Backlog(tmp_path)
    for start in range(0, len(records), 50):
        batch = found.batch()
        for number, one in enumerate(records[start : start + 50]):
            time_of = one.event_time if isinstance(one, Document) else None
            batch.add(OLD + (start + number) % 7 if time_of is None else time_of, one)
        found.take(batch)
    thrown = found.batch()
    for one in corpus(40, start=900):
        thrown.add(0, one)
    thrown.discard()
    assert len(found) == len(records)
    assert len(list(tmp_path.iterdir())) > 5
    released = []
    while len(found):
        assert found.oldest is not None
        released += found.release(7, 1 << 20)
    assert [one.time for one in released] == sorted(one.time for one in released)
    assert [one.record for one in sorted(released, key=lambda one: one.number)] == records
    assert found.oldest is None
    assert list(tmp_path.iterdir()) == [], "a run that was read is deleted"


def test_one_release_is_bounded_by_its_text_too(tmp_path):
    found = Backlog(tmp_path)
    batch = found.batch()
    for number in range(5):
        batch.add(number, Document(str(number), "x" * 100))
    found.take(batch)
    assert [len(found.release(10, 250)) for _ in range(2)] == [3, 2]


# ------------------------------------------------------------------------------------------------ when things go wrong


def test_a_broken_file_and_a_bad_line_are_dead_letters_and_watching_goes_on(inbox, tmp_path):
    whole = gzip.compress(b"".join(to_line(one) for one in corpus(200)))
    (inbox / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (inbox / "bad.jsonl").write_bytes(b"not json\n" + to_line(Document("good", "Fine.", event_time=OLD)))
    for path in inbox.iterdir():
        old(path)
    stream = stream_of(inbox, tmp_path)
    elements, _, _ = run(stream, until=lambda found: stream.counts.files == 2 and stream.counts.waiting == 0)
    reasons = [one.reason for _, one in elements if isinstance(one, Rejected)]
    assert sorted(reasons) == ["not_json", "source_unreadable"]
    assert Document("good", "Fine.", event_time=OLD) in [one for _, one in elements]
    old(write_corpus(inbox / "later.jsonl", [Document("later", "Comes later.")]))
    elements, _, _ = run(stream, until=len)
    assert [one.doc_id for _, one in elements] == ["later"]


def test_a_file_name_that_is_not_utf8_does_not_end_the_stream(inbox, tmp_path):
    path = inbox / os.fsdecode(b"\xff.jsonl")
    path.write_bytes(b'{"id": "\\ud800", "text": "t"}\n')
    old(path)
    ((_, rejected),), _, _ = run(stream_of(inbox, tmp_path), until=len)
    assert (rejected.reason, rejected.doc_id) == ("bad_id", None)
    assert rejected.source.encode().endswith(b"/\\udcff.jsonl")


def test_a_store_that_is_away_for_a_while_is_told_once_and_tried_again(inbox, tmp_path, monkeypatch):
    old(write_corpus(inbox / "a.jsonl", [Document("x", "There all the time.")]))
    away = [4]
    real = watch_module.list_files

    def sometimes(given):
        if away[0]:
            away[0] -= 1
            raise StorageError("the source cannot be opened", value=given, cause="the network", fix="wait")
        return real(given)

    monkeypatch.setattr(watch_module, "list_files", sometimes)
    said = []
    elements, _, _ = run(stream_of(inbox, tmp_path, said=said), until=len)
    assert [one.doc_id for _, one in elements] == ["x"]
    assert len(said) == 1
    assert "the source cannot be opened" in said[0]
    assert said[0].endswith("Watching goes on.")


# ------------------------------------------------------------------------------------------------------------ the end


def test_a_drain_looks_a_last_time_and_hands_on_all_it_found(inbox, tmp_path):
    drain = Drain()
    stream = stream_of(inbox, tmp_path, drain, WatchRule(poll=60, drain_wait=0.1))
    assert not stream.step().elements
    write_corpus(inbox / "new.jsonl", corpus(20))  # long before the next look, a moment before the end
    assert drain.ask() == 1
    elements, _, done = run(stream)
    assert done
    assert len(elements) == 20
    assert stream.counts.left == ()


def test_a_drain_names_the_file_that_is_still_being_written(inbox, tmp_path):
    drain = Drain()
    stream = stream_of(inbox, tmp_path, drain, WatchRule(poll=60, drain_wait=0.1))
    drain.ask()
    done = False
    while not done:
        with (inbox / "open.jsonl").open("ab") as file:
            file.write(b"x")
        done = stream.step().done
    assert stream.counts.left == (str(inbox / "open.jsonl"),)
    assert stream.counts.records == 0


def test_a_second_request_leaves_what_waits_for_the_next_run(inbox, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "RELEASE_DOCUMENTS", 5)
    old(write_corpus(inbox / "a.jsonl", corpus(40)))
    drain, said = Drain(), []
    stream = stream_of(inbox, tmp_path, drain, said=said)
    run(stream, until=lambda found: len(found) == 10)
    drain.ask()
    drain.ask()
    step = stream.step()
    assert (len(step.elements), step.done) == (0, True)
    assert stream.counts.records == 10
    assert said == ["30 records were read and not handed on: the next run reads them again."]


def test_a_second_request_names_the_file_that_was_just_being_read(inbox, tmp_path, monkeypatch):
    path = old(write_corpus(inbox / "a.jsonl", corpus(4)))
    drain, records = Drain(), watch_module._records

    def asked_meanwhile(state):
        for record in records(state):
            drain.level = 2
            yield record

    monkeypatch.setattr(watch_module, "_records", asked_meanwhile)
    stream = stream_of(inbox, tmp_path, drain)
    elements, _, done = run(stream)
    assert (elements, done, stream.counts.left) == ([], True, (path,))


def test_idle_exit_ends_a_stream_that_has_nothing_new(inbox, tmp_path):
    old(write_corpus(inbox / "a.jsonl", corpus(3)))
    began = time.monotonic()
    elements, _, done = run(stream_of(inbox, tmp_path, rule=WatchRule(poll=0.05, idle_exit=0.4)))
    assert done
    assert len(elements) == 3
    assert 0.4 <= time.monotonic() - began < 20


def test_what_cannot_be_watched_is_refused_before_any_work(inbox, tmp_path):
    (inbox / "image.png").write_bytes(b"")
    for given, message in (
        ("-", "standard input cannot be watched"),
        (str(tmp_path / "none"), "the watched folder does not exist"),
        (str(tmp_path / "none" / "*.jsonl"), "the watched folder does not exist"),
        (f"file://{tmp_path}/none/*.jsonl", "the watched folder does not exist"),
        ("ftp://host/x", "the store is unknown"),
        (str(inbox / "image.png"), "the kind of this source is unknown"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            check_watched([given])
        assert given in str(caught.value)
        assert "Fix: " in str(caught.value)
    check_watched([str(inbox), str(inbox / "*.jsonl"), f"file://{inbox}/*.jsonl"])
