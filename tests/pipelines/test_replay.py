"""Questions for adaptation, made while ingesting: the same sample however the documents come, real spans, no leaks."""

from __future__ import annotations

import re

import numpy as np
import pytest
from click.testing import CliRunner
from oracle import empty_bank
from stream_run import DAY, Watermark, day, new_bank, plan_of, run
from test_distributed import distributed
from tiny import TinySpec, corpus, settings, write_corpus

from mbc_core.bank import Bank
from mbc_core.bank.compact import compact
from mbc_core.bank.replay import ReplayPolicy, priority
from mbc_core.errors import UsageError
from mbc_core.evaluation.cloze import BLANK, PROMPT
from pipelines import commands
from pipelines.ingest import run_ingest
from pipelines.options import IngestSettings, parse_arguments, replay_settings
from pipelines.plain import EncodeRule, encode_documents
from pipelines.records import DocumentBatch
from schemas.document import Document

DATED = [one for one in corpus(170) if one.event_time is not None]
HOUR = 3600


def ingest(sources, bank, given):
    return run_ingest([str(one) for one in sources], str(bank), given, show_progress=False)


def sample(bank):
    rows = bank.replay().drop_columns(["added_at"]).to_pylist()
    return sorted(tuple(row.items()) for row in rows)


def asked(name: str, seconds: float, *questions: str, text: str = "Some words.") -> Document:
    pairs = tuple((question, "Words") for question in questions)
    return Document(name, text, event_time=int(seconds * 1_000_000), qa=pairs)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Of every question that all documents give, those with the least hashes, by a plain loop."""
    batch = DocumentBatch.of(DATED, bytes.fromhex("000102030405060708090a0b0c0d0e0f"), DAY)
    rows = encode_documents(TinySpec().load(), batch, EncodeRule(24)).replay.drop_columns(["priority"]).to_pylist()
    found = []
    for window in {row["window"] for row in rows}:
        mine = [row for row in rows if row["window"] == window]
        found += sorted(mine, key=lambda row: priority(row["key"], row["question"]))[:8]
    assert len(rows) > len(found) > 60
    return sorted(tuple(row.items()) for row in found)


@pytest.mark.parametrize(("slice_documents", "batch_documents", "backwards"), [(1000, 512, False), (23, 7, True)])
def test_the_sample_does_not_depend_on_slices_batches_or_order(
    tmp_path, expected, slice_documents, batch_documents, backwards
):
    given = settings(tmp_path / "w", slice_documents=slice_documents, batch_documents=batch_documents)
    bank = empty_bank(tmp_path / "bank", given)
    source = write_corpus(tmp_path / "a.jsonl", reversed(DATED) if backwards else DATED)
    ingest([source], bank.uri, given)
    assert sample(bank) == expected
    ingest([source], bank.uri, given)  # the same command again
    assert sample(bank) == expected


def test_nor_on_runs_workers_and_shards(tmp_path, expected):
    given = settings(tmp_path / "w")
    bank = empty_bank(tmp_path / "bank", given)
    odd, even = (write_corpus(tmp_path / f"{start}.jsonl", DATED[start::2]) for start in (0, 1))
    ingest([odd], bank.uri, given)
    distributed(bank, [even], "second")  # two shards
    assert sample(bank) == expected


@pytest.mark.slow
def test_nor_on_panes_late_ones_a_restart_or_compact_between(tmp_path, expected):
    bank = new_bank(tmp_path)
    plan = plan_of(bank, lateness=30 * DAY, shards=2)
    on_time, late = DATED[::2], [DATED[1::2][start : start + 6] for start in range(0, len(DATED) // 2, 6)]
    in_order = sorted(on_time, key=lambda one: one.event_time)
    run([in_order, Watermark(12 * DAY), *late[:4]], plan)
    compact(bank, history=0, safe_age=0)
    run([in_order, Watermark(12 * DAY), *late], plan)
    assert sample(bank) == expected
    compact(bank, history=0, safe_age=0)
    assert sample(bank) == expected
    assert bank.read("replay").num_rows == len(expected), "nothing else is stored either"
    assert bank.inspect(verify=True)["problems"] == []


def test_after_compact_and_restart_a_late_pane_stays_within_the_bound(tmp_path):
    bank = new_bank(tmp_path)
    ones = [asked(f"n{number}", HOUR, f"Question {number}?") for number in range(40)]
    run([ones[:12], Watermark(DAY + 1)], plan_of(bank, lateness=HOUR, replay=8))
    compact(bank, history=0, safe_age=0)
    run([ones[:12], Watermark(DAY + 1), *([one] for one in ones[12:])], plan_of(bank, lateness=HOUR, replay=8))
    rows = bank.replay()
    ranks = sorted(priority(one.key(bank.manifest.salt), one.qa[0][0]) for one in ones)
    shown = sorted(priority(row["key"], row["question"]) for row in rows.to_pylist())
    assert shown == ranks[:8] and set(rows["window"].to_pylist()) == {day(0)}
    assert bank.read("replay").num_rows < 8 + 16, "late rows that the sample cannot take are not even stored"


def test_all_questions_of_a_document_are_on_one_side_in_every_run(tmp_path):
    many = [asked(f"n{number}", number * HOUR, *(f"Q{one} of {number}?" for one in range(3))) for number in range(120)]
    given = settings(tmp_path / "w", replay_per_window=256)
    splits: dict[int, set[str]] = {}
    for number, documents in enumerate((many, many[::-1])):
        bank = empty_bank(tmp_path / f"bank{number}", given)
        ingest([write_corpus(tmp_path / "a.jsonl", documents)], bank.uri, given)
        for row in bank.replay().to_pylist():
            splits.setdefault(row["key"], set()).add(row["split"])
    assert len(splits) == 120 and all(len(one) == 1 for one in splits.values())
    held_out = sum(one == {"heldout"} for one in splits.values())
    assert 3 <= held_out <= 25, "one in ten"


def test_a_revision_replaces_its_documents_questions_and_forget_removes_them(tmp_path):
    given = settings(tmp_path / "w")
    bank = empty_bank(tmp_path / "bank", given)
    first, second = asked("a", 0, "Old?"), asked("a", 2 * DAY, "New?", text="Other words.")
    ingest([write_corpus(tmp_path / "a.jsonl", [first, asked("b", 0, "Mine?")])], bank.uri, given)
    ingest([write_corpus(tmp_path / "b.jsonl", [second])], bank.uri, given)
    assert sorted(bank.replay()["question"].to_pylist()) == ["Mine?", "New?"]
    bank.forget(["a"])
    assert bank.replay()["question"].to_pylist() == bank.read("replay")["question"].to_pylist() == ["Mine?"]


# -------------------------------------------------------------------------------------------------------------- options


def test_size_and_lifetime_stay_with_the_bank_and_off_leaves_them_alone(tmp_path):
    given = settings(tmp_path / "w", replay_per_window=3, replay_lifetime=3600.0)
    bank = empty_bank(tmp_path / "bank", given)
    ingest([write_corpus(tmp_path / "a.jsonl", DATED[:60])], bank.uri, given)
    assert bank.replay_policy() == ReplayPolicy(3, 3600.0)
    before = sample(bank)
    assert max(np.unique([dict(row)["window"] for row in before], return_counts=True)[1]) == 3
    off = settings(tmp_path / "w", replay_per_window=0)
    ingest([write_corpus(tmp_path / "b.jsonl", DATED[60:90])], bank.uri, off)
    assert sample(bank) == before and bank.replay_policy() == ReplayPolicy(3, 3600.0)
    plain = settings(tmp_path / "w", replay_per_window=None)
    ingest([write_corpus(tmp_path / "c.jsonl", DATED[90:])], bank.uri, plain)
    assert bank.replay_policy() == ReplayPolicy(3, 3600.0) and len(sample(bank)) > len(before)


def test_both_command_lines_tell_size_lifetime_and_off(tmp_path, monkeypatch):
    seen = []

    def fake(sources, bank, given):
        seen.append((given.replay_per_window, given.replay_lifetime))
        raise UsageError("stop", fix="stop")

    monkeypatch.setattr("pipelines.ingest.run_ingest", fake)
    lines = [
        ([], (None, None)),
        (["--replay-per-window", "9", "--replay-lifetime", "90d"], (9, 90 * 86_400.0)),
        (["--replay-lifetime", "never"], (None, float("inf"))),
        (["--no-replay"], (0, None)),
    ]
    for words, wanted in lines:
        CliRunner().invoke(commands.ingest, ["a.jsonl", "--bank", str(tmp_path), *words])
        assert seen[-1] == wanted
        parsed = parse_arguments(["a.jsonl", "--bank", str(tmp_path), *words]).settings
        assert (parsed.replay_per_window, parsed.replay_lifetime) == wanted


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="--no-replay and --replay-per-window do not go together"):
        replay_settings(4, None, True)
    with pytest.raises(UsageError, match="--replay-lifetime cannot be read: 'soon'"):
        replay_settings(None, "soon", False)
    for wrong in ({"replay_per_window": -1}, {"replay_lifetime": 0.0}):
        with pytest.raises(UsageError, match="replay cannot be kept like this"):
            IngestSettings(**wrong)


def test_a_run_without_replay_writes_none(tmp_path):
    given = settings(tmp_path / "w", replay_per_window=0)
    bank = empty_bank(tmp_path / "bank", given)
    ingest([write_corpus(tmp_path / "a.jsonl", DATED[:20])], bank.uri, given)
    assert Bank.open(bank.uri).read("replay").num_rows == 0 and not bank.storage.exists("replay.json")


# ------------------------------------------------------------------------------------------------------------- quality

TEXTS = [
    "The Battle of Agincourt was an English victory in the Hundred Years' War. It took place on 25 October 1415 near "
    "Azincourt, in northern France.",
    "New York City is the most populous city of the United States. Newark is across the river from New York in Essex "
    "County, New Jersey, and has 311,549 people.",
    "In 2019 the firm said that 2019 would be its best year since 2007, according to Maria Lopez of Acme Holdings.",
]


def normal(text: str) -> str:
    return " ".join(text.split())


def test_cloze_questions_fill_in_to_a_sentence_of_the_passage_and_do_not_give_the_answer_away():
    documents = [Document(f"d{number}-{place}", text) for number in range(40) for place, text in enumerate(TEXTS)]
    batch = DocumentBatch.of(documents, b"s" * 16, DAY)
    rows = encode_documents(TinySpec().load(), batch, EncodeRule(24)).replay.to_pylist()
    keys = {one.key(b"s" * 16): one.text for one in documents}
    assert len(rows) > 80 and len({row["answer"] for row in rows}) > 4
    for row in rows:
        body, text = row["question"].removeprefix(PROMPT), normal(keys[row["key"]])
        assert body.count(BLANK) == 1 and body.replace(BLANK, row["answer"]) in text
        assert re.search(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", text), "whole words of the passage"
        for word in re.findall(r"\w{3,}", row["answer"]):
            assert not re.search(rf"(?<!\w){word}(?!\w)", body, re.IGNORECASE), (row["question"], row["answer"])
