"""The codebook learns on the stream: versions by window, windows in order, and the same bits as in batch."""

from __future__ import annotations

from dataclasses import replace

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream
from apache_beam.transforms.window import TimestampedValue
from oracle import empty_bank, held, plain_loop
from stream_run import DAY, LIVE, Watermark, day, new_bank, panes, plan_of, run
from tiny import RULE, TinySpec, corpus, settings, write_corpus

from mbc_core.windows import window_start
from pipelines.ingest import run_ingest
from pipelines.plain import EncodeRule, encode_documents
from pipelines.records import DocumentBatch
from pipelines.stream_graph import _CommitWindowsDoFn
from pipelines.stream_records import StreamPart, WindowPane

DOCUMENTS = sorted((one for one in corpus(105) if one.event_time is not None), key=lambda one: one.event_time)
"""Seven days, about 35 passages a day: a version every second day."""


def live_steps(documents, bundle=15):
    """As they happen: the watermark stands at the oldest document that is not there yet."""
    steps = []
    for start in range(0, len(documents), bundle):
        some = documents[start : start + bundle]
        steps += [Watermark(min(one.event_time for one in some) / 1e6), some]
    return steps


@pytest.fixture(scope="module")
def expected():
    found = plain_loop(DOCUMENTS)
    assert len(found.digests) > 3, "several versions, or the tests below show nothing"
    return found


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    bank = new_bank(tmp_path_factory.mktemp("live"))
    run(live_steps(DOCUMENTS), plan_of(bank))
    return bank


def test_a_stream_learns_to_the_bit_what_the_plain_loop_learns(live, expected):
    found = held(live)
    assert found.codes == expected.codes
    assert found.digests == expected.digests


def test_a_window_uses_the_newest_version_built_from_windows_two_before_it(live):
    versions = {one.version: one for one in live.codebooks().versions}
    used = {row["window"]: row["codebook_version"] for row in live.read("ledger").to_pylist()}
    assert [used[day(number)] for number in range(7)] == [0, 0, 1, 2, 2, 3, 3]
    for window, version in used.items():
        latest = window_start(window) - 2 * DAY
        fitting = [0] + [
            number for number, one in versions.items() if one.built_from and window_start(one.last_window) <= latest
        ]
        assert version == max(fitting)


def test_a_published_version_names_the_windows_it_was_built_from(live):
    rows = live.read("codebook_versions").sort_by("version").to_pylist()
    assert [(row["built_from"], row["slice"]) for row in rows[:3]] == [
        ([], ""),
        ([day(0)], day(0)),
        ([day(1)], day(1)),
    ]
    assert {row["ingest_id"] for row in rows[1:]} == {"stream"}


def test_windows_that_end_at_once_wait_for_each_other(tmp_path, expected):
    """A source that catches up: the watermark stands still while seven days come in, then all end together."""
    bank = new_bank(tmp_path)
    mixed = [DOCUMENTS[place] for step in range(7) for place in range(step, len(DOCUMENTS), 7)]
    run([mixed[start : start + 40] for start in range(0, len(mixed), 40)], plan_of(bank, shards=2))
    found = held(bank)
    assert found.codes == expected.codes
    assert found.digests == expected.digests
    rows = sorted(bank.read("ledger").to_pylist(), key=lambda row: row["added_at"])
    assert [row["window"] for row in rows] == [day(number) for number in range(7)]


def test_a_window_is_held_until_the_decisions_before_it_exist(tmp_path, expected):
    """Its pane comes first, but is committed after the panes of earlier windows that come later."""
    bank = new_bank(tmp_path)
    plan = plan_of(bank)
    stream = test_stream.TestStream()
    for number in (4, 2, 3, 0, 1):
        stream = stream.add_elements([TimestampedValue((0, pane_of(bank, number)), number * DAY)])
    stream = stream.advance_watermark_to(5 * DAY).advance_watermark_to_infinity()
    pipeline = beam.Pipeline(options=PipelineOptions(LIVE))
    panes_in = pipeline | stream.with_output_types(tuple[int, WindowPane])
    _ = panes_in | beam.ParDo(_CommitWindowsDoFn(plan, "held")).with_output_types(str)
    pipeline.run().wait_until_finish()
    wanted = {place: row for place, row in expected.codes.items() if row[0] <= day(4)}
    assert held(bank).codes == wanted
    rows = sorted(bank.read("ledger").to_pylist(), key=lambda row: row["added_at"])
    assert [(row["window"], row["codebook_version"]) for row in rows] == list(
        zip([day(number) for number in range(5)], [0, 0, 1, 2, 2], strict=True)
    )


def pane_of(bank, number):
    mine = [one for one in DOCUMENTS if one.event_time // 1_000_000 // DAY == number]
    batch = encode_documents(TinySpec().load(), DocumentBatch.of(mine, bank.manifest.salt, DAY), EncodeRule(24))
    return WindowPane(day(number), (number + 1) * DAY, 0, 0, StreamPart(batches=(batch,)))


def test_a_stream_stores_what_a_batch_run_stores(tmp_path, live):
    given = settings(tmp_path / "w")
    bank = empty_bank(tmp_path / "batch", given)
    run_ingest([write_corpus(tmp_path / "a.jsonl", DOCUMENTS)], bank.uri, given, show_progress=False)
    assert held(bank) == held(live)
    assert (
        bank.replay()
        .drop_columns(["added_at"])
        .sort_by([("key", "ascending"), ("question", "ascending")])
        .equals(live.replay().drop_columns(["added_at"]).sort_by([("key", "ascending"), ("question", "ascending")]))
    )


def test_a_late_pane_uses_the_version_of_its_windows_first_commit(tmp_path):
    bank = new_bank(tmp_path)
    of_day = [[one for one in DOCUMENTS if one.event_time // 1_000_000 // DAY == number] for number in range(6)]
    kept, late = of_day[1][:-2], of_day[1][-2:]
    steps = [of_day[0], kept, *of_day[2:5], Watermark(5 * DAY + 1), late, late[0], of_day[5]]
    run(steps, plan_of(bank, lateness=10 * DAY))
    assert len(bank.codebooks().versions) >= 3
    rows = [row for row in bank.read("ledger").to_pylist() if row["window"] == day(1)]
    assert sorted((row["pane"], row["codebook_version"]) for row in rows) == [(0, 0), (1, 0), (2, None)]
    assert {row[4] for row in held(bank).codes.values() if row[0] == day(1)} == {0}


def test_windows_older_than_the_head_use_the_head_and_publish_nothing(tmp_path):
    """Backfill: another stream brings days that came before what the newest version was built from."""
    bank = new_bank(tmp_path)
    run(live_steps(DOCUMENTS[:60]), plan_of(bank, "first"))
    head = bank.codebooks().head
    old = [replace(one, doc_id=f"old-{one.doc_id}") for one in DOCUMENTS if one.event_time < 2 * DAY * 1_000_000]
    run(live_steps(old), plan_of(bank, "backfill"))
    assert bank.codebooks().head.version == head.version, "nothing was published"
    ledger = [row for row in bank.read("ledger").to_pylist() if row["ingest_id"] == "backfill"]
    assert {row["codebook_version"] for row in ledger} == {head.version}
    assert {row["statistics"] for row in ledger} == {None}


def test_a_stream_follows_versions_that_another_run_publishes(tmp_path):
    """Both learn; whoever is slower takes the other's version as its head, and no chain breaks."""
    bank = new_bank(tmp_path)
    first, second = DOCUMENTS[:50], [replace(one, doc_id=f"b-{one.doc_id}") for one in DOCUMENTS[50:]]
    run(live_steps(first), plan_of(bank, "first"))
    between = len(bank.codebooks().versions)
    run(live_steps(second), plan_of(bank, "second"))
    versions = bank.codebooks().versions
    assert len(versions) > between >= 2
    assert [one.parent for one in versions] == [None, *range(len(versions) - 1)]
    assert panes(bank, "second")


def test_a_rule_that_asks_for_more_publishes_nothing(tmp_path):
    bank = new_bank(tmp_path)
    run(live_steps(DOCUMENTS[:40]), plan_of(bank, rule=replace(RULE, min_vectors=1_000_000)))
    assert len(bank.codebooks().versions) == 1
    assert set(bank.codebooks().pending_windows) == {day(number) for number in range(3)}
