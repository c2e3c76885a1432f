"""The codebook of a stream alone: publishing, following others, and going on after a death."""

from __future__ import annotations

import numpy as np
import pytest
from stream_run import DAY, day, document, new_bank, plan_of, run
from tiny import RULE, SLOTS, WIDTH

from mbc_core.bank import SliceId
from mbc_core.codebook.chain import CodebookChain
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codes import quantize
from mbc_core.errors import LostRace
from pipelines import stream_codebook
from pipelines.stream_codebook import LiveCodebooks

ENOUGH = RULE.min_vectors // SLOTS


def statistics(book, seed, passages=ENOUGH):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((passages, SLOTS, WIDTH // SLOTS)).astype(np.float32) * 0.2
    keys = rng.integers(0, 1 << 40, passages)
    return BatchStatistics.of(book, z, quantize(z, book.codewords), keys, np.zeros(passages, np.int32))


def at(window, ingest_id="stream"):
    return SliceId(ingest_id, window, 0, 0)


def learn(live, window, seed, passages=ENOUGH, ingest_id="stream"):
    return live.learn(at(window, ingest_id), window, statistics(live.version_for(window), seed, passages))


@pytest.fixture
def bank(tmp_path):
    return new_bank(tmp_path)


def versions(bank):
    return [
        (row["version"], row["built_from"]) for row in bank.read("codebook_versions").sort_by("version").to_pylist()
    ]


def test_statistics_wait_in_a_file_until_a_version_takes_them_in(bank):
    live = LiveCodebooks(bank, "stream", RULE)
    path = learn(live, day(0), 1, ENOUGH // 2)
    assert bank.storage.exists(path)
    assert learn(live, day(1), 2, ENOUGH - ENOUGH // 2) is None
    assert versions(bank) == [(0, []), (1, [day(0), day(1)])]
    assert [live.version_for(day(number)).version for number in (1, 2, 3)] == [0, 0, 1]


def test_a_recorded_choice_stays_whatever_is_published(bank):
    live = LiveCodebooks(bank, "stream", RULE)
    assert live.version_for(day(1)).version == 0
    live.committed(day(1), 0)
    learn(live, day(3), 1)
    assert live.version_for(day(1)).version == 0, "recorded"
    assert live.version_for(day(2)).version == 1, "older than the head: the head"


def test_a_version_of_another_run_is_the_head_from_then_on(bank):
    live = LiveCodebooks(bank, "stream", RULE)
    other = LiveCodebooks(bank, "other", RULE)
    learn(other, day(0), 1, ingest_id="other")
    assert live.version_for(day(2)).version == 1
    assert learn(live, day(1), 2) is None
    assert versions(bank) == [(0, []), (1, [day(0)]), (2, [day(1)])]
    assert [one.parent for one in live.versions] == [None, 0, 1]


def test_what_other_runs_have_shown_goes_into_the_version_too(bank):
    live = LiveCodebooks(bank, "stream", RULE)
    run([document("a", 0), document("b", DAY)], plan_of(bank, "other"))
    assert versions(bank) == [(0, [])]
    live.committed(day(2), None)  # as after each commit of its own: here the ledger shows that others commit as well
    learn(live, day(3), 1)
    assert versions(bank) == [(0, []), (1, [day(0), day(1), day(3)])]


def test_who_loses_the_race_for_a_version_builds_on_the_winners(bank):
    """Both read the chain before either published."""
    live, other = LiveCodebooks(bank, "stream", RULE), LiveCodebooks(bank, "other", RULE)
    mine = statistics(live.version_for(day(1)), 2)
    learn(other, day(0), 1, ingest_id="other")
    assert live.learn(at(day(1)), day(1), mine) is None
    assert versions(bank) == [(0, []), (1, [day(0)]), (2, [day(1)])]
    plain = CodebookChain([bank.codebook(0)], rule=RULE)
    plain.add(day(0), statistics(bank.codebook(0), 1))
    plain.add(day(1), mine)
    assert [one.digest for one in plain.versions] == [one.digest for one in bank.codebooks().versions]


def test_a_version_published_before_a_death_is_published_again_or_taken_as_it_is(bank):
    learn(LiveCodebooks(bank, "stream", RULE), day(0), 1)
    again = LiveCodebooks(bank, "stream", RULE)
    assert [one.version for one in again.versions] == [0], "its window was never committed: decided again"
    assert learn(again, day(0), 1) is None
    otherwise = LiveCodebooks(bank, "stream", RULE)
    assert learn(otherwise, day(0), 99) is None, "more documents came meanwhile: the registered version stands"
    assert [one.digest for one in otherwise.versions] == [one.digest for one in bank.codebooks().versions]
    assert versions(bank) == [(0, []), (1, [day(0)])]
    assert otherwise.version_for(day(2)).version == 1


def test_after_a_failed_commit_nothing_is_learned_twice(bank):
    live = LiveCodebooks(bank, "stream", RULE)
    for _ in range(3):
        learn(live, day(0), 1, ENOUGH // 2)
        live.doubt()
    assert versions(bank) == [(0, [])], "half of what a version needs, however often"


def test_who_loses_every_race_says_so(bank, monkeypatch):
    live = LiveCodebooks(bank, "stream", RULE)

    class Loser:
        def publish(self, update):
            raise LostRace("codebook version 1 was published by another run meanwhile")

        def recorded(self):
            return {}

    monkeypatch.setattr(stream_codebook.LiveCodebooks, "_store", lambda self, *_: Loser())
    with pytest.raises(LostRace, match="published by another run"):
        learn(live, day(0), 1)
