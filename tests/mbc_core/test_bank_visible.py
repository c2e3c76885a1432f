"""Visible keys, revisions, as-of: against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bank_rows import hash_of, key_of, make_bank, make_slice, numbered, shown, window
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.bank import Bank, Status, VisibleKeys, commit_slice
from mbc_core.bank.visible import binary_matrix, newest_revisions, revision_places
from mbc_core.errors import DamagedFile, UsageError
from schemas.tables import TIME


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


def _status(bank: Bank, *pairs: tuple[str, str], **options: str) -> list[int]:
    keys = np.array([key_of(doc_id) for doc_id, _ in pairs], np.int64)
    hashes = np.stack([np.frombuffer(hash_of(content), np.uint8) for _, content in pairs])
    return bank.visible(**options).status(keys, hashes).tolist()


def _added(bank: Bank) -> list[int]:
    return sorted(set(bank.read("codes")["added_at"].cast(pa.int64()).to_pylist()))


def test_new_duplicate_revision(bank):
    assert _status(bank, ("a", "x")) == [Status.NEW]
    commit_slice(bank, make_slice("one", "0", [("a", "x"), ("b", "y")]), "one", "0")
    asked = [("a", "x"), ("a", "other"), ("b", "y"), ("c", "x")]
    assert _status(bank, *asked) == [Status.DUPLICATE, Status.REVISION, Status.DUPLICATE, Status.NEW]
    assert _status(bank, *asked, ignore_ingest="one") == [Status.NEW] * 4


def test_the_newest_revision_is_read_and_older_content_is_a_revision_again(bank):
    commit_slice(bank, make_slice("one", "0", [("a", "x"), ("b", "y")], passages=3), "one", "0")
    commit_slice(bank, make_slice("two", "0", [("a", "z")], day=4), "two", "0")
    assert shown(bank) == [("a", 0), ("b", 0), ("b", 1), ("b", 2)]
    assert _status(bank, ("a", "z"), ("a", "x")) == [Status.DUPLICATE, Status.REVISION]
    assert _status(bank, ("a", "z"), ("a", "x"), ignore_ingest="two") == [Status.REVISION, Status.DUPLICATE]
    assert sorted(row["answer"] for row in bank.replay().to_pylist()) == ["y", "z"]
    passages = bank.passages()
    assert set(zip(passages["doc_id"].to_pylist(), passages["window"].to_pylist(), strict=True)) == {
        ("a", window(4)),
        ("b", window(0)),
    }


def test_as_of_shows_the_bank_of_then(bank):
    commit_slice(bank, make_slice("one", "0", [("a", "x")], passages=2), "one", "0")
    commit_slice(bank, make_slice("two", "0", [("a", "z"), ("c", "q")]), "two", "0")
    first, second = _added(bank)
    counts = {moment: bank.passages(as_of=moment).num_rows for moment in (first - 1, first, second - 1, second)}
    assert counts == {first - 1: 0, first: 2, second - 1: 2, second: 2}
    assert bank.passages(as_of=first)["doc_id"].to_pylist() == ["a", "a"]
    assert sorted(bank.passages(as_of=second)["doc_id"].to_pylist()) == ["a", "c"]
    assert bank.replay(as_of=first)["answer"].to_pylist() == ["x"]


def test_passages_are_joined_with_their_document_and_sorted(bank):
    commit_slice(bank, make_slice("one", "0", numbered(0, 20), passages=2), "one", "0")
    rows = bank.passages().to_pylist()
    assert [(row["key"], row["passage"]) for row in rows] == sorted((row["key"], row["passage"]) for row in rows)
    assert all(row["key"] == key_of(row["doc_id"]) for row in rows)
    assert all(row["title"] == f"About {row['doc_id']}" for row in rows)


def test_a_title_that_repeats_the_id_is_not_stored_but_shown(bank):
    rows = make_slice("one", "0", [("a", "x"), ("b", "y"), ("c", "z")])
    titles = pa.array(["a", "The b", None], pa.string())
    place = rows.documents.column_names.index("title")
    object.__setattr__(rows, "documents", rows.documents.set_column(place, "title", titles))
    commit_slice(bank, rows, "one", "0")
    stored = bank.read("documents", ["doc_id", "title"]).to_pylist()
    assert {row["doc_id"]: row["title"] for row in stored} == {"a": None, "b": "The b", "c": None}
    assert {row["doc_id"]: row["title"] for row in bank.documents().values()} == {"a": "a", "b": "The b", "c": "c"}
    assert sorted(bank.passages()["title"].to_pylist()) == ["The b", "a", "c"]


def test_documents_of_chosen_keys(bank):
    commit_slice(bank, make_slice("one", "0", numbered(0, 5)), "one", "0")
    wanted = [key_of("x0001"), key_of("x0003"), key_of("nobody")]
    assert {row["doc_id"] for row in bank.documents(wanted).values()} == {"x0001", "x0003"}


revisions = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4), st.integers(0, 2)), max_size=40)


@given(revisions, st.one_of(st.none(), st.integers(-1, 5)))
def test_newest_revisions_against_a_plain_loop(rows, as_of):
    codes = pa.table(
        {
            "key": pa.array([key for key, _, _ in rows], pa.int64()),
            "added_at": pa.array([added for _, added, _ in rows], pa.int64()).cast(TIME),
        }
    )
    newest: dict[int, int] = {}
    for key, added, _ in rows:
        if as_of is None or added <= as_of:
            newest[key] = max(added, newest.get(key, added))
    expected = [newest.get(key) == added for key, added, _ in rows]
    assert newest_revisions(codes, as_of).tolist() == expected


@given(revisions, revisions)
def test_revision_places_against_a_plain_loop(rows, documents):
    def table(pairs):
        return pa.table(
            {
                "key": pa.array([key for key, _, _ in pairs], pa.int64()),
                "added_at": pa.array([added for _, added, _ in pairs], pa.int64()).cast(TIME),
            }
        )

    places = revision_places(table(rows), table(documents))
    for (key, added, _), place in zip(rows, places, strict=True):
        matching = [number for number, one in enumerate(documents) if one[:2] == (key, added)]
        assert place in matching if matching else place == -1


known = st.dictionaries(st.integers(-5, 5), st.integers(0, 2), max_size=8)


@given(known, st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 2)), max_size=20))
def test_status_against_a_plain_loop(held, asked):
    keys = np.array(sorted(held), np.int64)
    hashes = np.array([[held[key], 7] for key in sorted(held)], np.uint64).reshape(-1, 2)
    visible = VisibleKeys(keys, hashes)
    pairs = np.array([[value, 7] for _, value in asked], np.uint64).reshape(-1, 2)
    found = visible.status(np.array([key for key, _ in asked], np.int64), pairs.view(np.uint8).reshape(-1, 16))
    expected = [
        Status.NEW if key not in held else Status.DUPLICATE if held[key] == value else Status.REVISION
        for key, value in asked
    ]
    assert found.tolist() == expected


def test_status_refuses_hashes_of_another_shape(bank):
    with pytest.raises(UsageError, match=r"content hashes have another shape: \(\(2, 8\), 'uint8'\)"):
        bank.visible().status(np.zeros(2, np.int64), np.zeros((2, 8), np.uint8))
    with pytest.raises(UsageError, match="keys and content hashes do not belong together"):
        bank.visible().status(np.zeros(3, np.int64), np.zeros((2, 16), np.uint8))


def test_binary_matrix_takes_slices_and_chunks_and_refuses_other_lengths():
    values = [bytes([number] * 3) for number in range(6)]
    chunked = pa.chunked_array([pa.array(values[:4]).slice(1), pa.array(values[4:])])
    assert binary_matrix(chunked, 3, "address").tolist() == [[number] * 3 for number in range(1, 6)]
    assert binary_matrix(pa.chunked_array([pa.array(values)]).slice(2, 2), 3, "address").tolist() == [[2] * 3, [3] * 3]
    assert binary_matrix(pa.chunked_array([], pa.binary()), 3, "address").shape == (0, 3)
    with pytest.raises(DamagedFile, match=r"the column `address` holds a value of another length: \[2\]"):
        binary_matrix(pa.chunked_array([pa.array([b"abc", b"ab"])]), 3, "address")


def test_codes_without_their_document_are_an_error_that_names_the_way_out(bank):
    commit_slice(bank, make_slice("one", "0", numbered(0, 3)), "one", "0")
    empty = bank.read("documents").slice(0, 0)
    from mbc_core.bank.visible import join_documents

    with pytest.raises(DamagedFile, match="codes refer to documents that the bank does not hold: '3 rows'"):
        join_documents(bank.read("codes"), empty, ["doc_id"], bank.uri)
