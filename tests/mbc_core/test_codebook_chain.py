"""The chain of versions: which one a window uses, when the next is published, and resuming to equal bytes."""

from __future__ import annotations

import numpy as np
import pytest
from codebook_data import codebook_of, four_by_five, topical_embeddings
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.codebook.chain import CodebookChain
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import UpdateRule
from mbc_core.codes import Rotation, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.windows import window_order, window_start

EVERY_WINDOW = UpdateRule(tau=500.0, dead_share=0.05, min_vectors=1, growth=0, judged=False)
ROTATION = Rotation.random(32, seed=1)
VECTORS = to_slots(topical_embeddings(400, 32), ROTATION, 4)
BOOK = codebook_of(VECTORS, 12)


def day(number: int) -> str:
    return f"2024-07-{number:02}T00:00:00Z"


def gathered(chain: CodebookChain, window: str, rows) -> BatchStatistics:
    """Quantize rows of VECTORS with the window's version, as the pipeline does."""
    rows = np.asarray(rows, dtype=np.int64)
    book = chain.version_for(window)
    codes = quantize(VECTORS[rows], book.codewords)
    return BatchStatistics.of(book, VECTORS[rows], codes, rows, np.zeros(len(rows), np.int32), sample_size=64)


def feed(chain: CodebookChain, windows, rows_each: int = 10) -> list[int]:
    """Add windows in order; the version each one's codes were made with."""
    used = []
    for window in windows:
        used.append(chain.version_for(window).version)
        at = int(window[8:10]) * rows_each
        chain.add(window, gathered(chain, window, range(at, at + rows_each)))
    return used


def test_a_window_uses_the_newest_version_built_from_windows_two_before_it():
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW)
    assert feed(chain, [day(number) for number in range(1, 7)]) == [0, 0, 1, 2, 3, 4]
    assert [book.last_window for book in chain.versions] == [None, *(day(number) for number in range(1, 7))]
    assert [book.built_from for book in chain.versions[1:3]] == [(day(1),), (day(2),)]
    assert chain.status == "published version 6 from 40 vectors; its words went 100% of the way to their new means"


def test_gaps_count_in_calendar_time():
    """After a silent week the next window may use all that was built before the gap."""
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW)
    assert feed(chain, [day(1), day(2), day(9), day(10), day(11)]) == [0, 0, 2, 2, 3]


def test_the_lag_follows_the_window_length():
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW, window_seconds=3600)
    hours = [f"2024-07-01T{hour:02}:00:00Z" for hour in range(4)]
    for window in hours:
        chain.add(window, gathered(chain, window, range(10)))
    assert [chain.version_for(window).version for window in hours] == [4, 4, 4, 2]
    weekly = CodebookChain(chain.versions, window_seconds=7 * 86_400)
    assert weekly.version_for("2024-07-08T00:00:00Z").version == 0
    assert weekly.version_for("2024-07-15T03:00:00Z").version == 4


def test_undated_and_late_windows_use_the_head_and_publish_nothing():
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW)
    feed(chain, [day(5), day(6)])
    head = chain.head
    for window, why in (("undated", "without a date"), (day(3), "not newer than"), (day(6), "not newer than")):
        assert chain.add(window, gathered(chain, window, range(50))) is None
        assert why in chain.status
    assert chain.head is head
    assert chain.pending is None
    assert chain.version_for("undated") is head
    assert chain.version_for(day(3)) is head
    assert chain.version_for(day(5)) is head
    assert chain.version_for(day(6)).version == 0, "the head's own last window is not older than the head"
    assert chain.version_for(day(7)).version == 1


def test_version_zero_serves_everything_until_something_is_published():
    chain = CodebookChain([BOOK])
    assert {chain.version_for(window).version for window in ("undated", day(1), "0001-01-01T00:00:00Z")} == {0}


def test_publishing_waits_for_enough_vectors_and_takes_all_that_waited():
    chain = CodebookChain([BOOK], rule=UpdateRule(min_vectors=100, growth=0))
    assert chain.add(day(1), gathered(chain, day(1), range(10))) is None
    assert chain.status == "40 vectors wait; version 1 needs 100"
    assert chain.add(day(3), gathered(chain, day(3), range(10, 20))) is None
    assert chain.pending_windows == (day(1), day(3))
    published = chain.add(day(2), gathered(chain, day(2), range(20, 30)))
    assert published.codebook is chain.head
    assert published.vectors == chain.head.vectors_seen == 120
    assert chain.head.built_from == (day(1), day(2), day(3))
    assert chain.head.last_window == day(3)
    assert (chain.pending, chain.pending_windows, chain.pending_vectors) == (None, (), 0)


def test_versions_thin_out_as_the_bank_grows():
    chain = CodebookChain([BOOK], rule=UpdateRule(min_vectors=40, growth=1.0))
    feed(chain, [day(number) for number in range(1, 17)])
    assert [book.vectors_seen for book in chain.versions] == [0, 40, 80, 160, 320, 640]


def test_a_window_that_spans_slices_publishes_at_its_end_and_the_cut_does_not_matter():
    whole, cut = (CodebookChain([BOOK], rule=EVERY_WINDOW) for _ in range(2))
    whole.add(day(1), gathered(whole, day(1), range(40)))
    for slice_rows, ended in ((range(30, 40), False), (range(0, 25), False), (range(25, 30), True)):
        assert cut.head.version == 0
        published = cut.add(day(1), gathered(cut, day(1), slice_rows), ended=ended)
        assert (published is not None) == ended
    assert cut.head.to_bytes() == whole.head.to_bytes()


def test_a_last_slice_without_vectors_still_ends_its_window():
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW)
    chain.add(day(1), gathered(chain, day(1), range(40)), ended=False)
    assert chain.status == f"window {day(1)} goes on; 160 vectors wait"
    assert chain.add(day(1), gathered(chain, day(1), [])).vectors == 160


def test_at_most_64_versions_then_publishing_waits_and_says_so():
    chain = CodebookChain(
        [BOOK], rule=UpdateRule(tau=500.0, min_vectors=1, growth=0, judged=False), window_seconds=3600
    )
    hours = [f"2024-07-{1 + hour // 24:02}T{hour % 24:02}:00:00Z" for hour in range(70)]
    published = [chain.add(window, gathered(chain, window, range(3))) is not None for window in hours]
    assert published == [True] * 63 + [False] * 7
    assert len(chain.versions) == 64
    assert chain.pending_vectors == 7 * 12
    assert "already refers to 64 codebook versions, the most allowed" in chain.status
    assert "mbc migrate" in chain.status
    assert chain.version_for(hours[-1]).version == 63


@given(
    days=st.sets(st.integers(1, 28), min_size=2, max_size=9).map(sorted),
    min_vectors=st.sampled_from([1, 60, 100]),
    stops=st.sets(st.integers(0, 8)),
)
def test_stopping_anywhere_and_going_on_gives_equal_bytes(days, min_vectors, stops):
    """Versions and pending statistics go through bytes, as they do in a bank, and nothing changes."""
    rule = UpdateRule(tau=500.0, dead_share=0.05, min_vectors=min_vectors, growth=0, judged=False)
    straight, resumed = (CodebookChain([BOOK], rule=rule) for _ in range(2))
    stored: list[tuple[str, bytes]] = []
    for position, number in enumerate(days):
        window = day(number)
        rows = range(number * 10, number * 10 + 10)
        straight.add(window, gathered(straight, window, rows))
        statistics = gathered(resumed, window, rows)
        stored.append((window, statistics.to_bytes()))
        resumed.add(window, statistics)
        if position in stops:
            versions = [type(BOOK).from_bytes(book.to_bytes(), "bank") for book in resumed.versions]
            kept = [(name, BatchStatistics.from_bytes(data, "bank")) for name, data in stored]
            resumed = CodebookChain(versions, kept, rule=rule)  # what the head took in already drops out by itself
    assert [book.digest for book in resumed.versions] == [book.digest for book in straight.versions]
    assert resumed.pending_windows == straight.pending_windows
    assert resumed.pending_vectors == straight.pending_vectors


@given(st.sets(st.integers(1, 28), min_size=1, max_size=12).map(sorted))
def test_no_window_ever_uses_a_version_that_knows_a_newer_time(days):
    """In order, with any gaps: last window of the version used ≤ window − 2 days, and it is the newest such."""
    chain = CodebookChain([BOOK], rule=EVERY_WINDOW)
    for number in days:
        used = chain.version_for(day(number))
        fitting = [book for book in chain.versions if book.last_window is None or book.last_window <= day(number - 2)]
        assert used is (fitting[-1] if number > 2 else BOOK)
        chain.add(day(number), gathered(chain, day(number), range(5)))


def test_pending_statistics_gathered_under_an_older_version_drop_codes_reset_since():
    """Window 2's codes name version 0; when version 1 resets a code meanwhile, version 2 ignores its old vectors."""
    far = BOOK.codewords.copy()
    far[5] = 100.0
    start = type(BOOK).first(far, np.full(12, 20.0))
    chain = CodebookChain([start], rule=UpdateRule(tau=100.0, dead_share=0.05, min_vectors=1, growth=0, judged=False))
    first = chain.add(day(1), gathered(chain, day(1), range(100)))
    assert first.resets == 1
    assert chain.head.reset_at[5] == 1
    book = chain.version_for(day(2))
    assert book.version == 0
    codes = np.full((1, 4), 5, np.uint16)  # a vector that was, under version 0, nearest to the word now gone
    vectors = np.full((1, 4, 8), 90.0, np.float32)
    stale = BatchStatistics.of(book, vectors, codes, np.array([1]), np.array([0], np.int32), sample_size=64)
    chain.add(day(2), stale)
    assert np.abs(chain.head.codewords[5]).max() < 1


def test_wrong_use_is_named():
    with pytest.raises(UsageError, match="these codebook versions form no chain: \\[\\]"):
        CodebookChain([])
    with pytest.raises(UsageError, match="form no chain"):
        CodebookChain([BOOK, BOOK])
    chain = CodebookChain([BOOK])
    with pytest.raises(UsageError, match="not the name of a window: 'yesterday'"):
        chain.version_for("yesterday")
    with pytest.raises(UsageError, match="statistics do not belong to this chain"):
        chain.add(day(1), BatchStatistics.zero(4, 5, 0))
    with pytest.raises(UsageError, match="of two kinds"):
        chain.add(day(1), BatchStatistics.zero(12, 8, 0, seed=1))
        chain.add(day(2), BatchStatistics.zero(12, 8, 0, seed=2))
    assert four_by_five().version == 0


def test_windows_order_by_time_with_undated_first():
    names = [day(3), "undated", "1969-12-31T00:00:00Z", day(1)]
    assert sorted(names, key=window_order) == ["undated", "1969-12-31T00:00:00Z", day(1), day(3)]
    assert window_start("1970-01-02T00:00:00Z") == 86_400
    assert window_start("1969-12-31T00:00:00Z") == -86_400
    assert window_start("undated") is None
