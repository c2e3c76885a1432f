"""Random lives of a bank against a plain dict: ingest, revise, forget, compact, read as of any moment."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bank_rows import hash_of, key_of, make_bank, make_slice
from hypothesis import given, settings
from hypothesis import strategies as st

from mbc_core.bank import Bank, Status, commit_slice
from mbc_core.bank import compact as compact_module
from mbc_core.bank.compact import compact
from mbc_core.bank.forget import forget

IDS = [f"d{number}" for number in range(5)]
contents = st.integers(0, 2).map(lambda number: f"content {number}")

ADD = st.tuples(st.just("add"), st.dictionaries(st.sampled_from(IDS), contents, min_size=1, max_size=3))
FORGET = st.tuples(st.just("forget"), st.lists(st.sampled_from(IDS), min_size=1, max_size=2, unique=True))
COMPACT = st.tuples(st.just("compact"), st.integers(0, 5))
"""How many of the last commits lie inside the history."""

LIVES = st.lists(st.one_of(ADD, ADD, ADD, FORGET, COMPACT), min_size=1, max_size=9)


@dataclass
class Oracle:
    """What a bank must show, in a dict.

    Attributes:
        revisions: (id, moment) → content of everything ever added and not forgotten. forgotten: ids.
        since: as-of reads before this moment are not promised any more.
    """

    revisions: dict[tuple[str, int], str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    since: int = 0

    def shown(self, as_of: int | None = None) -> dict[str, str]:
        """Id → content of the newest revision."""
        chosen = sorted(pair for pair in self.revisions if as_of is None or pair[1] <= as_of)
        return {doc_id: self.revisions[doc_id, moment] for doc_id, moment in chosen}

    def moments(self) -> list[int]:
        return sorted({moment for _, moment in self.revisions})


def shown(bank: Bank, as_of: int | None = None) -> dict[str, str]:
    """Id → content, which the address tells."""
    known = {make_slice("x", "0", [("x", one)]).codes["address"][0].as_py(): one for one in map(content_of, range(3))}
    rows = bank.passages(as_of).to_pylist()
    assert all(row["passage"] in (0, 1) for row in rows)
    return {row["doc_id"]: known[row["address"]] for row in rows if row["passage"] == 0}


def content_of(number: int) -> str:
    return f"content {number}"


def live(bank: Bank, life: list, check: bool = True) -> Oracle:
    oracle = Oracle()
    for number, (what, told) in enumerate(life):
        if what == "add":
            add(bank, f"run{number}", told, oracle)
        elif what == "forget":
            present = {doc_id for doc_id, _ in oracle.revisions}
            result = forget(bank, told)
            assert result["forgotten"] == len(present & set(told))
            oracle.forgotten |= set(told)
            oracle.revisions = {pair: one for pair, one in oracle.revisions.items() if pair[0] not in told}
        else:
            moments = oracle.moments()
            cutoff = moments[-told] if told and told <= len(moments) else (moments[0] if told and moments else None)
            history = 0.0 if cutoff is None else time.time() - cutoff / 1e6
            oracle.since = max(oracle.since, cutoff or (moments[-1] if moments else 0))
            compact(bank, history=history, safe_age=0)
        if check:
            compare(bank, oracle)
    return oracle


def add(bank: Bank, name: str, told: dict[str, str], oracle: Oracle) -> None:
    documents = sorted(told.items())
    commit_slice(bank, make_slice(name, "0", documents, passages=2), name, "0")
    stamps = bank.read("ledger").filter(pc.equal(bank.read("ledger")["ingest_id"], name))["added_at"]
    moment = stamps.cast(pa.int64())[0].as_py()
    oracle.revisions |= {(doc_id, moment): one for doc_id, one in documents if doc_id not in oracle.forgotten}


def compare(bank: Bank, oracle: Oracle) -> None:
    assert shown(bank) == oracle.shown()
    for moment in oracle.moments():
        if moment >= oracle.since:
            assert shown(bank, moment) == oracle.shown(moment)
    visible = bank.visible()
    assert set(visible.keys.tolist()) == {key_of(doc_id) for doc_id in oracle.shown()}
    for doc_id in IDS:
        status = visible.status(*_one(key_of(doc_id), hash_of(oracle.shown().get(doc_id, "none"))))[0]
        want = Status.DUPLICATE if doc_id in oracle.shown() else Status.NEW
        assert status == (Status.FORGOTTEN if doc_id in oracle.forgotten else want)
    assert {row["question"] for row in bank.replay().to_pylist()} == {f"What of {one}?" for one in oracle.shown()}


def _one(key: int, digest: bytes) -> tuple[np.ndarray, np.ndarray]:
    return np.array([key], np.int64), np.frombuffer(digest, np.uint8).reshape(1, 16)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """Making a bank costs more than most steps: one is made, and copied."""
    return Path(make_bank(tmp_path_factory.mktemp("life") / "bank").uri)


def run(empty: Path, life: list) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        place = Path(folder, "bank")
        shutil.copytree(empty, place)
        bank = Bank.open(place)
        live(bank, life)
        assert bank.inspect(verify=True)["problems"] == []


@settings(max_examples=6)
@given(life=LIVES)
def test_a_bank_shows_what_a_dict_would(empty, life):
    run(empty, life)


@pytest.mark.slow
@settings(max_examples=60)
@given(life=LIVES)
def test_a_bank_shows_what_a_dict_would_in_many_lives(empty, life):
    run(empty, life)


def test_a_life_with_everything(empty, monkeypatch):
    """One that is sure to meet each kind of step, with shards of a few rows."""
    monkeypatch.setattr(compact_module, "LEAST_ROWS", 3)
    monkeypatch.setattr(compact_module, "SHARD_ROWS", 4)
    first, second = {"d0": content_of(0), "d1": content_of(0), "d2": content_of(0)}, {"d0": content_of(1)}
    run(
        empty,
        [
            ("add", first), ("add", second), ("compact", 2), ("add", {"d0": content_of(2), "d3": content_of(1)}),
            ("forget", ["d1", "d4"]), ("add", first), ("compact", 1),
            ("add", {"d4": content_of(0), "d3": content_of(2)}), ("compact", 0), ("forget", ["d0"]), ("add", first),
        ],
    )  # fmt: skip
