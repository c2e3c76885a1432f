"""The sample of questions that a bank keeps: bounded, the same in any order, and really gone when it has expired."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from bank_rows import key_of, make_bank, make_slice, numbered, window
from hypothesis import given
from hypothesis import strategies as st
from test_bank_s3 import endpoint, place  # noqa: F401 - fixtures

from mbc_core.bank import Bank, SliceId, commit_slice
from mbc_core.bank.compact import compact
from mbc_core.bank.replay import (
    KeptPriorities,
    ReplayPolicy,
    _floors,
    _priorities,
    load_policy,
    priority,
    sampled,
    set_policy,
)
from mbc_core.errors import DamagedFile, UsageError
from schemas.tables import REPLAY, TIME


@dataclass(frozen=True)
class Asked:
    """A question of the revision ``number`` of a document."""

    key: int
    number: int
    window: str
    question: str
    answer: str = "yes"


def rows_of(asked) -> pa.Table:
    told = [
        {"question": one.question, "answer": one.answer, "key": one.key, "event_time": None}
        | {"window": one.window, "added_at": 1_000 + one.number, "split": "train"}
        for one in asked
    ]
    return pa.Table.from_pylist(told, REPLAY)


def codes_of(asked) -> pa.Table:
    pairs = sorted({(one.key, 1_000 + one.number) for one in asked})
    schema = pa.schema([pa.field("key", pa.int64()), pa.field("added_at", TIME)])
    return pa.Table.from_pylist([{"key": key, "added_at": added} for key, added in pairs], schema)


def oracle(asked, per_window: int) -> set[Asked]:
    """Of every window the questions with the least hashes, of which those of newest revisions are shown."""
    newest = {key: max(one.number for one in asked if one.key == key) for key in {one.key for one in asked}}
    found = set()
    for name in {one.window for one in asked}:
        ranks = sorted({priority(one.key, one.question) for one in asked if one.window == name})[:per_window]
        mine = [one for one in asked if one.window == name and priority(one.key, one.question) in ranks]
        live = [one for one in mine if one.number == newest[one.key]]
        found |= set(sorted(live, key=lambda one: (priority(one.key, one.question), one.answer))[:per_window])
    return found


questions = st.builds(
    Asked,
    st.integers(0, 5),
    st.integers(0, 2),
    st.sampled_from(["w0", "w1"]),
    st.sampled_from([f"q{number}?" for number in range(6)]),
    st.sampled_from(["yes", "no"]),
)


@given(st.sets(questions, max_size=40), st.integers(1, 6), st.integers(0, 4), st.randoms(use_true_random=False))
def test_any_slices_in_any_order_give_the_sample_of_the_definition(asked, per_window, cuts, random):
    """Writers leave out what their slice, and what is stored already, push out of the sample."""
    waiting = sorted(asked, key=lambda one: (one.number, random.random()))  # revisions come in their order
    bounds = [0, *sorted(random.randint(0, len(waiting)) for _ in range(cuts)), len(waiting)]
    written = []
    for start, end in itertools.pairwise(bounds):
        mine, before = waiting[start:end], rows_of(written)
        floors = _floors(before, per_window)
        for name in {one.window for one in mine}:
            ranks = _priorities(rows_of([one for one in mine if one.window == name]))
            limit = min(floors.get(name, 2**64), int(ranks[min(per_window, len(ranks)) - 1]))
            written += [one for one in mine if one.window == name and priority(one.key, one.question) <= limit]
    rows = rows_of(written)
    mask = sampled(rows, codes_of(waiting), ReplayPolicy(per_window, math.inf))
    shown = {one for one, keep in zip(written, mask.tolist(), strict=True) if keep}
    assert shown == oracle(asked, per_window)
    assert all(sum(one.window == name for one in shown) <= per_window for name in ("w0", "w1"))


def test_questions_without_codes_do_not_count_and_do_not_push_others_out():
    asked = [Asked(key, 0, "w", "q?") for key in range(6)]
    codes = codes_of(asked[3:])
    mask = sampled(rows_of(asked), codes, ReplayPolicy(3, math.inf))
    assert mask.tolist() == [False] * 3 + [True] * 3


def test_the_lifetime_is_counted_from_when_a_question_was_added():
    rows, codes = rows_of([Asked(1, 0, "w", "q?")]), codes_of([Asked(1, 0, "w", "q?")])
    shown = {
        moment: bool(sampled(rows, codes, ReplayPolicy(3, 2e-6), moment)[0]) for moment in (999, 1_000, 1_001, 1_002)
    }
    assert shown == {999: False, 1_000: True, 1_001: True, 1_002: False}


def test_priorities_are_pinned():
    """Another hash would draw other samples from banks that are in use."""
    assert priority(-5, "What is it?") == 237275119968846910
    assert len({priority(key, "q") for key in range(1000)}) == 1000
    values = np.array([priority(key, "q") for key in range(4000)], float) / 2**64
    assert abs(values.mean() - 0.5) < 0.03


# -------------------------------------------------------------------------------------------------------------- a bank


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank")


def add(bank: Bank, name: str, documents, **more) -> None:
    commit_slice(bank, make_slice(name, "0", documents, **more), name, "0")


def asked(bank: Bank, as_of=None) -> list[str]:
    return sorted(bank.replay(as_of)["question"].to_pylist())


def moments(bank: Bank) -> list[int]:
    return sorted(set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()))


def files(bank: Bank) -> list[str]:
    return [one.path for one in bank.storage.list("replay") if one.path.endswith(".parquet") and "_log" not in one.path]


def test_the_policy_is_kept_with_the_bank(bank):
    assert load_policy(bank) == ReplayPolicy() == bank.replay_policy()
    assert set_policy(bank) == ReplayPolicy() and not bank.storage.exists("replay.json")
    assert set_policy(bank, per_window=3) == ReplayPolicy(3)
    assert set_policy(bank, lifetime=math.inf) == ReplayPolicy(3, math.inf) == Bank.open(bank.uri).replay_policy()
    assert json.loads(bank.storage.read_bytes("replay.json")) == {"per_window": 3, "lifetime": None}
    assert bank.inspect(verify=True)["problems"] == []


@pytest.mark.parametrize(("per_window", "lifetime"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, math.nan)])
def test_policies_that_cannot_be_are_refused(per_window, lifetime):
    with pytest.raises(UsageError, match="a bank cannot keep replay like this"):
        ReplayPolicy(per_window, lifetime)


@pytest.mark.parametrize(
    "text", [b"not json", b"{}", b'{"per_window": "x", "lifetime": null}', b'{"per_window": 0, "lifetime": 1}', b"[]"]
)
def test_a_damaged_policy_is_named(bank, text):
    bank.storage.replace("replay.json", text)
    with pytest.raises(DamagedFile, match=r"replay\.json cannot be read"):
        bank.replay()
    assert set_policy(bank, 5, 60.0) == ReplayPolicy(5, 60.0), "given whole, it is set anew"


def test_compact_drops_what_the_sample_left_out_but_not_before_the_history(bank):
    set_policy(bank, per_window=4)
    for number in range(5):
        add(bank, f"run{number}", numbered(3 * number, 3))
    views = {moment: asked(bank, moment) for moment in (*moments(bank), None)}
    assert len(views[None]) == 4 and bank.read("replay").num_rows == 15
    compact(bank, history=3600)
    assert bank.read("replay").num_rows == 15 and len(files(bank)) == 1
    assert {moment: asked(bank, moment) for moment in views} == views, "as of every moment the same questions"
    result = compact(bank, history=0)
    assert bank.read("replay").num_rows == 4 and result["dropped"]["replay"] == 11
    assert asked(bank) == views[None] and bank.inspect(verify=True)["problems"] == []


def test_expired_rows_and_their_files_are_really_gone_after_compact(bank):
    long_ago = SliceId("old", "0", 0, time.time_ns() // 1000 - round(10 * 86_400e6))
    commit_slice(bank, make_slice("old", "0", numbered(0, 3)), "old", "0", slice_id=long_ago)
    old = files(bank)
    add(bank, "new", numbered(3, 2), day=1)
    assert len(asked(bank)) == 5
    set_policy(bank, lifetime=5 * 86_400.0)
    assert len(asked(bank)) == 2, "not asked any more, compacted or not"
    result = compact(bank, history=30 * 86_400.0)
    assert result["dropped"]["replay"] == 3
    kept = bank.read("replay")
    assert set(kept["window"].to_pylist()) == {window(1)} and not set(old) & set(files(bank))
    stored = b"".join(bank.storage.read_bytes(path) for path in files(bank))
    assert b"What of x0000?" not in stored
    assert bank.passages().num_rows == 5, "documents stay"


def test_a_revision_replaces_the_questions_of_its_document(bank):
    add(bank, "one", [("a", "x"), ("b", "y")])
    add(bank, "two", [("a", "z")], day=3)
    assert sorted(row["answer"] for row in bank.replay().to_pylist()) == ["y", "z"]
    compact(bank, history=0)
    assert sorted(row["answer"] for row in bank.read("replay").to_pylist()) == ["y", "z"]


def test_after_a_revision_and_compact_nothing_that_was_out_comes_in(bank):
    """However the documents were cut into slices: rows that one writer left out, another has stored."""
    names = [f"d{number}" for number in range(6)]
    order = sorted(names, key=lambda name: priority(key_of(name), f"What of {name}?"))
    set_policy(bank, per_window=2)
    for number, name in enumerate(reversed(order)):  # each pushes the one before it out of the sample
        add(bank, f"run{number}", [(name, "text")])
    add(bank, "again", [(order[0], "new text")], day=1)
    shown = [f"What of {order[0]}?", f"What of {order[1]}?"]
    assert asked(bank) == sorted(shown)
    compact(bank, history=0)
    assert asked(bank) == sorted(shown) and bank.read("replay").num_rows == 2


def test_forget_takes_the_questions_too(bank):
    add(bank, "one", numbered(0, 3))
    bank.forget(["x0001"])
    assert asked(bank) == ["What of x0000?", "What of x0002?"]
    assert bank.read("replay").num_rows == 2


def test_a_writer_looks_up_windows_once_and_remembers_what_it_adds(bank, monkeypatch):
    set_policy(bank, per_window=2)
    add(bank, "one", numbered(0, 3))
    kept = KeptPriorities(2)
    kept.load(bank, [window(0), window(1)])
    ranks = sorted(priority(key_of(name), f"What of {name}?") for name, _ in numbered(0, 3))
    assert kept.floors() == {window(0): ranks[1]}
    monkeypatch.setattr(Bank, "read", None)
    kept.load(bank, [window(0), window(1)])
    kept.add(window(0), np.array([0], np.uint64))
    kept.add(window(1), np.array([7, 9, 8], np.uint64))
    assert kept.floors() == {window(0): ranks[0], window(1): 8}


def test_the_policy_the_sample_and_compact_on_s3(place):  # noqa: F811
    bank = make_bank(place)
    set_policy(bank, per_window=2, lifetime=3600.0)
    add(bank, "one", numbered(0, 2))
    add(bank, "two", numbered(2, 2))
    ranks = sorted((priority(key_of(name), f"What of {name}?"), f"What of {name}?") for name, _ in numbered(0, 4))
    assert asked(Bank.open(place)) == sorted(question for _, question in ranks[:2])
    assert compact(bank, history=0)["dropped"]["replay"] == 2
    assert asked(bank) == sorted(question for _, question in ranks[:2])
    assert bank.replay_policy() == ReplayPolicy(2, 3600.0)
