"""The streaming graph, one case of time a test, the expected windows written out."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from oracle import held
from stream_run import DAY, At, Watermark, day, document, new_bank, panes, plan_of, run, stored
from tiny import POISON

from pipelines.readers import Rejected
from schemas.document import Document

HOUR = 3_600


def only(*names, window=0):
    return [(name, day(window)) for name in names]


def test_documents_on_time_make_one_commit_a_window(tmp_path):
    bank = new_bank(tmp_path)
    run(
        [
            document("a", 0),
            document("b", DAY - 1),
            Watermark(DAY),
            document("c", DAY),
            document("d", 3 * DAY + 5),
            Watermark(5 * DAY),
        ],
        plan_of(bank),
    )
    assert stored(bank) == [("a", day(0)), ("b", day(0)), ("c", day(1)), ("d", day(3))]
    assert panes(bank) == {
        (day(0), 0, day(0)): {"documents_in": 2, "documents": 2},
        (day(1), 0, day(1)): {"documents_in": 1, "documents": 1},
        (day(3), 0, day(3)): {"documents_in": 1, "documents": 1},
    }
    names = [path for path, _ in bank.files("codes")]
    assert len(names) == 3, "one file a window, none for the empty days"
    assert bank.table("codes").transaction_version(f"codes/stream/{day(0)}") == 0


def test_order_within_a_window_does_not_matter(tmp_path):
    found = []
    for turn, order in enumerate(([3, 1, 2], [1, 2, 3])):
        bank = new_bank(tmp_path, f"bank{turn}")
        run([document(f"n{number}", number * HOUR, f"Words of {number}.") for number in order], plan_of(bank))
        found.append(held(bank))
    assert found[0] == found[1]
    assert len(found[0].codes) == 3


def test_a_late_document_within_the_allowed_lateness_makes_a_second_pane(tmp_path):
    bank = new_bank(tmp_path)
    run(
        [
            document("a", HOUR),
            document("next", DAY + HOUR),
            Watermark(DAY + 1),
            document("late", 2 * HOUR),
            Watermark(DAY + HOUR - 1),
            document("later", 3 * HOUR),
        ],
        plan_of(bank, lateness=HOUR),
    )
    assert stored(bank) == sorted([*only("a", "late", "later"), ("next", day(1))])
    assert panes(bank) == {
        (day(0), 0, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 1, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 2, day(0)): {"documents_in": 1, "documents": 1},
        (day(1), 0, day(1)): {"documents_in": 1, "documents": 1},
    }
    assert bank.table("codes").transaction_version(f"codes/stream/{day(0)}") == 2, "version = pane"
    assert len([path for path, _ in bank.files("codes") if "1970-01-01" in path]) == 3, "each pane has its file"


@pytest.mark.parametrize("first", ["same window", "later window"])
def test_a_document_that_comes_too_late_is_a_dead_letter_with_its_reason(tmp_path, first):
    bank = new_bank(tmp_path)
    seen = document("a", HOUR) if first == "same window" else document("a", DAY + HOUR)
    run([seen, Watermark(DAY + 2 * HOUR), document("late", 2 * HOUR)], plan_of(bank, lateness=HOUR))
    window = 0 if first == "same window" else 1
    assert stored(bank) == [("a", day(window))]
    pane = 1 if first == "same window" else 0
    assert panes(bank)[day(0), pane, day(0)] == {"documents_in": 1, "too_late": 1}
    (row,) = bank.read("dead_letter").to_pylist()
    assert (row["reason"], row["source"], row["ingest_id"]) == ("too_late", "stream", "stream")
    assert row["key"] == document("late", 0).key(bank.manifest.salt)
    assert row["message"] == (
        f"the document of 1970-01-01T02:00:00Z came after its window {day(0)} had closed. Likely cause: it was held up "
        "for longer than the 3600 s that are allowed. Fix: allow more lateness, or ingest it without streaming."
    )
    assert b'"late"' in row["raw"]


def test_the_moment_a_window_closes_is_exact(tmp_path):
    bank = new_bank(tmp_path)
    run(
        [
            document("a", HOUR),
            Watermark(DAY + HOUR - 1),
            document("just", 2 * HOUR),
            Watermark(DAY + HOUR),
            document("over", 3 * HOUR),
        ],
        plan_of(bank, lateness=HOUR),
    )
    assert stored(bank) == only("a", "just")
    assert panes(bank)[day(0), 2, day(0)] == {"documents_in": 1, "too_late": 1}


def test_documents_without_a_date_are_in_the_window_they_arrive_in(tmp_path):
    bank = new_bank(tmp_path)
    run(
        [
            At(HOUR, document("early", None)),
            Watermark(2 * DAY),
            At(2 * DAY + 7, document("next", None)),
        ],
        plan_of(bank),
    )
    assert stored(bank) == [("early", day(0)), ("next", day(2))]
    times = {row["doc_id"]: row["event_time"].timestamp() for row in bank.read("documents").to_pylist()}
    assert times == {"early": HOUR, "next": 2 * DAY + 7}
    known = bank.visible().status(
        *_keys_and_hashes([document("early", None), document("next", None)], bank.manifest.salt)
    )
    assert known.tolist() == [1, 1], "the same documents without a date are duplicates, whenever they come again"


def test_empty_windows_and_gaps_commit_nothing(tmp_path):
    bank = new_bank(tmp_path)
    run(
        [Watermark(DAY), document("a", 20 * DAY), Watermark(25 * DAY), document("b", 27 * DAY), Watermark(29 * DAY)],
        plan_of(bank, lateness=HOUR),
    )
    assert stored(bank) == [("a", day(20)), ("b", day(27))]
    assert set(panes(bank)) == {(day(20), 0, day(20)), (day(27), 0, day(27))}
    assert bank.table("codes").version() == 2


def test_the_ends_of_the_calendar_are_windows_like_any_other(tmp_path):
    bank = new_bank(tmp_path)
    first, last = (int(datetime(*day, tzinfo=UTC).timestamp()) for day in ((1, 1, 1), (9999, 12, 31)))
    run([document("first", first), document("last", last), Watermark(last + 1)], plan_of(bank))
    assert stored(bank) == [("first", "0001-01-01T00:00:00Z"), ("last", "9999-12-31T00:00:00Z")]


def test_a_stream_without_documents_commits_nothing(tmp_path):
    bank = new_bank(tmp_path)
    run([Watermark(3 * DAY)], plan_of(bank))
    assert bank.table("codes").version() == 0
    assert panes(bank) == {}


def test_of_two_documents_with_one_id_in_a_window_the_newest_is_stored(tmp_path):
    bank = new_bank(tmp_path)
    newest, older = document("x", 5 * HOUR, "Newest words."), document("x", 2 * HOUR, "Older words.")
    run([newest, [older, document("y", HOUR)]], plan_of(bank))
    assert panes(bank) == {(day(0), 0, day(0)): {"documents_in": 3, "documents": 2, "replaced": 1}}
    assert _shown(bank, "x") == newest.content_hash(bank.manifest.salt)


def test_an_id_again_in_another_pane_is_a_duplicate_a_revision_or_older(tmp_path):
    bank = new_bank(tmp_path)
    first, second = document("x", 2 * HOUR, "First words."), document("x", 5 * HOUR, "Second words.")
    older = document("x", HOUR, "Older words.")
    run([first, Watermark(DAY), first, second, older], plan_of(bank, lateness=HOUR))
    assert panes(bank) == {
        (day(0), 0, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 1, day(0)): {"documents_in": 1, "duplicates": 1},
        (day(0), 2, day(0)): {"documents_in": 1, "documents": 1},
        (day(0), 3, day(0)): {"documents_in": 1, "replaced": 1},
    }
    assert _shown(bank, "x") == second.content_hash(bank.manifest.salt)


def test_what_another_run_stored_is_a_duplicate_or_revised(tmp_path):
    bank = new_bank(tmp_path)
    mine = [document("same", HOUR), document("changed", 2 * HOUR, "Old words.")]
    run(mine, plan_of(bank, "earlier"))
    run([document("same", HOUR), document("changed", HOUR, "New words.")], plan_of(bank))
    assert panes(bank) == {(day(0), 0, day(0)): {"documents_in": 2, "documents": 1, "duplicates": 1}}
    changed = document("changed", HOUR, "New words.")
    assert _shown(bank, "changed") == changed.content_hash(bank.manifest.salt), "the newer run counts, as in batch"


def test_a_text_that_comes_back_while_another_one_is_under_way_is_no_duplicate(tmp_path):
    """When it came the bank showed this very text; when its turn comes the bank shows the other one."""
    bank = new_bank(tmp_path)
    first, second = (document("back", None, text) for text in ("First text.", "Second text."))
    steps = [At(HOUR, first), Watermark(DAY + 1), document("b", DAY + HOUR), Watermark(2 * DAY + 1)]
    run([*steps, [At(2 * DAY + HOUR, second), At(3 * DAY + HOUR, first)]], plan_of(bank))
    assert _shown(bank, "back") == first.content_hash(bank.manifest.salt)
    assert [counts.get("documents") for counts in panes(bank).values()] == [1, 1, 1, 1]


def test_bad_records_do_not_stop_the_stream(tmp_path):
    bank = new_bank(tmp_path)
    bad = Rejected("not_json", "the line is not JSON.", "feed.jsonl", 7, b"no json", None)
    run(
        [
            At(HOUR, bad),
            [document("poison", 2 * HOUR, f"{POISON} here"), document("good", 2 * HOUR)],
            Watermark(DAY),
            At(DAY + 5, bad),
            document("next", DAY + 5),
        ],
        plan_of(bank),
    )
    assert stored(bank) == [("good", day(0)), ("next", day(1))]
    assert panes(bank) == {
        (day(0), 0, day(0)): {"documents_in": 2, "documents": 1, "encode_failed": 1},
        (day(0), 0, ""): {"documents_in": 1, "not_json": 1},
        (day(1), 0, day(1)): {"documents_in": 2, "documents": 1, "duplicates": 1},
    }, "the same line of the same file is stored once, and seen twice"
    assert bank.read("dead_letter").num_rows == 2
    reasons = {row["reason"]: row for row in bank.read("dead_letter").to_pylist()}
    assert set(reasons) == {"not_json", "encode_failed"}
    assert (reasons["not_json"]["source"], reasons["not_json"]["position"]) == ("feed.jsonl", 7)


def test_shards_of_a_window_are_one_commit(tmp_path):
    bank = new_bank(tmp_path)
    names = [f"n{number}" for number in range(12)]
    run(
        [[document(name, HOUR) for name in names], Watermark(DAY + 1), document("late", HOUR)],
        plan_of(bank, lateness=HOUR, shards=3),
    )
    assert stored(bank) == sorted(only(*names, "late"))
    assert sum(counts["documents"] for counts in panes(bank).values()) == 13
    assert len(panes(bank)) == 2
    assert len([path for path, _ in bank.files("codes")]) == 4, "three shards, then the late one"


def test_replay_rows_of_a_window_are_bounded_over_its_panes(tmp_path):
    bank = new_bank(tmp_path)
    asked = [
        Document(f"n{number}", "Some words.", event_time=HOUR * 1_000_000, qa=((f"Question {number}?", "Words"),))
        for number in range(11)
    ]
    run([asked[:4], Watermark(DAY + 1), asked[4], asked[5]], plan_of(bank, lateness=HOUR, replay=8))
    run([asked[:6], Watermark(DAY + 1), *asked[6:]], plan_of(bank, lateness=HOUR, replay=8))
    rows = bank.replay()
    assert rows.num_rows == 8
    assert set(rows["window"].to_pylist()) == {day(0)}


def _keys_and_hashes(documents, salt):
    hashes = b"".join(one.content_hash(salt) for one in documents)
    return np.array([one.key(salt) for one in documents]), np.frombuffer(hashes, np.uint8).reshape(-1, 16)


def _shown(bank, name):
    (row,) = bank.documents([document(name, 0).key(bank.manifest.salt)]).values()
    return row["content_hash"]
