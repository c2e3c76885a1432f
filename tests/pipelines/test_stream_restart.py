"""A stream that dies anywhere and is started again under its name: each row once, and the same ones."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from oracle import SALT, held
from stream_run import COUNTS, DAY, Watermark, day, document, new_bank, panes, plan_of, run, stored
from test_stream_learning import live_steps
from tiny import RULE, SLOTS, TinySpec, corpus

from mbc_core.bank import Bank, commit
from mbc_core.bank.storage import Storage
from pipelines.plain import EncodeRule, encode_documents
from pipelines.records import DocumentBatch
from pipelines.stream_records import StreamPart, WindowPane
from pipelines.stream_sink import PaneCommitter
from schemas.tables import TABLES

QUICK = replace(RULE, min_vectors=20 * SLOTS)
DOCUMENTS = sorted((one for one in corpus(70) if one.event_time is not None), key=lambda one: one.event_time)
HOUR = 3_600
LATE = [document("late", DAY + HOUR, "Late words."), document("later", DAY + 2 * HOUR, "Later words.")]
STEPS = [*live_steps(DOCUMENTS), Watermark(4 * DAY + 5), *LATE]


class Died(Exception):
    """Stands for the death of the process: from then on nothing is written any more."""


def count_operations(monkeypatch, die_at=None, for_good=True):
    """Count writes and commits, before and after each; from moment ``die_at`` on each raises, or only that one."""
    seen: list[str] = []

    def tick(name):
        seen.append(name)
        if die_at is not None and (len(seen) >= die_at if for_good else len(seen) == die_at):
            raise Died(name)

    write, transact = Storage.write_new, commit.DeltaTable.create_write_transaction

    def write_new(self, path, data):
        tick(f"before writing {path}")
        done = write(self, path, data)
        tick(f"after writing {path}")
        return done

    def create_write_transaction(self, *args, **kwargs):
        tick("before a commit")
        transact(self, *args, **kwargs)
        tick("after a commit")

    monkeypatch.setattr(Storage, "write_new", write_new)
    monkeypatch.setattr(commit.DeltaTable, "create_write_transaction", create_write_transaction)
    return seen


def plan(bank):
    return plan_of(bank, lateness=20 * DAY, rule=QUICK)


def replay(bank):
    rows = bank.replay().drop_columns(["added_at"]).to_pylist()
    return sorted((row["key"], row["question"], row["answer"], row["window"]) for row in rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    bank = new_bank(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        seen = count_operations(patch)
        run(STEPS, plan(bank))
    found = held(bank)
    assert len(found.digests) >= 4
    assert panes(bank)[day(1), 2, day(1)] == {"documents_in": 1, "documents": 1}
    return found, panes(bank), replay(bank), len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99])
def test_death_at_any_moment_then_the_same_stream(tmp_path, undisturbed, share):
    codes, counts, questions, operations = undisturbed
    bank = new_bank(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        count_operations(patch, max(1, round(share * operations)))
        run(STEPS, plan(bank))
    run(STEPS, plan(bank))
    assert held(bank) == codes
    assert panes(bank) == counts
    assert replay(bank) == questions


@pytest.mark.slow
@pytest.mark.parametrize("regrouped", [False, True], ids=["the same panes", "late ones on time"])
def test_the_committer_may_die_at_any_operation(tmp_path, regrouped):
    """Without a runner, so that many moments can be tried; after a restart the source may group panes otherwise.

    ``MBC_EVERY=1`` tries every moment.
    """
    empty, panes_in = tmp_path / "empty", window_panes()
    new_bank(empty)
    whole = copied(empty / "bank", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        operations = len(commit_all(whole, panes_in, patch))
    expected, counts = held(whole), sum_of(whole)
    assert len(expected.digests) >= 4 and operations > 100
    for moment in range(1, operations + 1, int(os.environ.get("MBC_EVERY", "53"))):
        bank = copied(empty / "bank", tmp_path / f"bank{moment}")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
            commit_all(bank, panes_in, patch, moment)
        with pytest.MonkeyPatch.context() as patch:
            commit_all(bank, on_time(panes_in) if regrouped else panes_in, patch)
        if regrouped:
            assert held(bank).codes.keys() == expected.codes.keys(), moment
        else:
            assert held(bank) == expected, moment
            assert panes(bank) == panes(whole), moment
        assert sum_of(bank) == counts, moment
        shutil.rmtree(tmp_path / f"bank{moment}")


def window_panes():
    """Five days, each with two late panes when all are over."""
    salt, found = bytes.fromhex(SALT), []
    on_time_ones = [one for place, one in enumerate(DOCUMENTS) if place % 14 not in (3, 8)]
    for pane, part in enumerate((on_time_ones, DOCUMENTS[3::14], DOCUMENTS[8::14])):
        for number in range(5):
            mine = [one for one in part if one.event_time // 1_000_000 // DAY == number]
            if mine:
                batch = encode_documents(TinySpec().load(), DocumentBatch.of(mine, salt, DAY), EncodeRule(24))
                found.append(WindowPane(day(number), (number + 1) * DAY, 0, pane, StreamPart(batches=(batch,))))
    return found


def on_time(panes_in):
    """All panes of a window as its first."""
    names = dict.fromkeys(one.window for one in panes_in)
    mine = {name: [one for one in panes_in if one.window == name] for name in names}
    return [replace(some[0], pane=0, part=StreamPart.concat(one.part for one in some)) for some in mine.values()]


def commit_all(bank, panes_in, patch, die_at=None):
    seen = count_operations(patch, die_at)
    committer = PaneCommitter(plan(bank))
    for one in panes_in:
        committer.commit_window([one])
    return seen


def copied(source, target):
    shutil.copytree(source, target)
    return Bank.open(str(target))


def sum_of(bank):
    rows = bank.read("ledger").to_pylist()
    return {name: sum(row[name] for row in rows) for name in (*COUNTS, "passages")}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.43, 0.61, 0.83])
def test_a_store_that_fails_once_does_not_end_the_stream(tmp_path, undisturbed, share):
    """The runner tries the bundle again: nothing is learned, stored or counted twice."""
    codes, counts, _, operations = undisturbed
    bank = new_bank(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        count_operations(patch, round(share * operations), for_good=False)
        run(STEPS, plan(bank))
    assert held(bank) == codes
    assert panes(bank) == counts


def test_a_finished_stream_run_again_adds_nothing(tmp_path):
    bank = new_bank(tmp_path)
    bad = document("bad", HOUR, "POISON here")
    steps = [*STEPS[:4], bad, *STEPS[4:], document("over", 0, "Too late.")]
    given = plan_of(bank, lateness=4 * DAY, rule=QUICK)
    run(steps, given)
    before = {name: bank.table(name).version() for name in TABLES}
    assert panes(bank)
    run(steps, given)
    assert {name: bank.table(name).version() for name in TABLES} == before


def test_after_a_restart_a_number_that_was_used_takes_what_is_new(tmp_path):
    """Panes are numbered anew; a source that shows only what is new must not find its window's commit done."""
    bank = new_bank(tmp_path)
    run([document("a", HOUR), document("b", HOUR)], plan_of(bank))
    run([document("b", HOUR), document("c", HOUR)], plan_of(bank))
    run([document("d", HOUR), Watermark(DAY + 1), document("e", HOUR)], plan_of(bank, lateness=HOUR))
    assert stored(bank) == [(name, day(0)) for name in "abcde"]
    assert panes(bank) == {
        (day(0), 0, day(0)): {"documents_in": 2, "documents": 2},
        (day(0), 1, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 2, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 3, day(0)): {"documents_in": 1, "documents": 1},
    }


def test_two_streams_into_one_window_lose_nothing(tmp_path):
    bank = new_bank(tmp_path)
    run([document("a", HOUR), document("both", HOUR)], plan_of(bank, "one"))
    run([document("b", HOUR), document("both", HOUR)], plan_of(bank, "two"))
    assert stored(bank) == [(name, day(0)) for name in ("a", "b", "both")]
    assert panes(bank, "two") == {(day(0), 0, day(0)): {"documents_in": 2, "documents": 1, "duplicates": 1}}


SHARES = {
    name: sorted({*DOCUMENTS[::5], *DOCUMENTS[place::2]}, key=lambda one: one.event_time)
    for place, name in enumerate("ab")
}
"""Each stream has every second document, and every fifth is in both."""


def stream_share(uri, name):
    run(live_steps(SHARES[name]), plan_of(Bank.open(uri), name, rule=QUICK))


@pytest.mark.slow
def test_two_streams_at_once_into_the_same_windows(tmp_path):
    """In two processes: Beam's TestStream keeps its place in the class."""
    bank = new_bank(tmp_path)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(stream_share, bank.uri, name) for name in SHARES]:
            done.result()
    codes = bank.read("codes", ["key", "passage"]).to_pylist()
    assert len({(row["key"], row["passage"]) for row in codes}) == len(codes), "no passage twice"
    assert {row["key"] for row in codes} == {one.key(bank.manifest.salt) for one in DOCUMENTS}
    counts = [sum(row[name] for row in bank.read("ledger").to_pylist()) for name in COUNTS]
    seen = sum(map(len, SHARES.values()))
    assert counts == [seen, len(DOCUMENTS), seen - len(DOCUMENTS), 0]
    versions = bank.codebooks().versions
    assert [one.parent for one in versions] == [None, *range(len(versions) - 1)]
    assert len(versions) > 1


def test_what_the_bank_was_told_to_forget_is_refused_and_counted(tmp_path):
    from mbc_core.bank.tombstones import tombstone_of, write_tombstones

    bank = new_bank(tmp_path)
    gone = document("gone", HOUR)
    salt = bank.manifest.salt
    write_tombstones(bank, [(tombstone_of(gone.key(salt), salt), None)], 5)
    run([gone, document("stays", HOUR)], plan_of(bank))
    assert stored(bank) == [("stays", day(0))]
    assert panes(bank) == {(day(0), 0, day(0)): {"documents_in": 2, "documents": 1, "forgotten": 1}}
    (letter,) = bank.read("dead_letter").to_pylist()
    assert (letter["key"], letter["raw"]) == (None, None)
