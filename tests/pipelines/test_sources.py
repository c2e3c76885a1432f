"""Finding and reading sources: every record comes out once, as a document or with the reason why not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mbc_core.errors import StorageError, UsageError
from pipelines.readers import MAX_LINE_BYTES, MAX_RAW_BYTES, Rejected, read_source
from pipelines.sources import Source, find_sources, kind_of
from schemas.document import MAX_TEXT_BYTES, Document

GOOD = [
    {"id": "a", "text": "Alpha text.", "timestamp": "2024-07-01"},
    {"doc_id": 7, "text": "Beta text.", "title": "Beta", "qa": [{"question": "Which?", "answer": "Beta"}]},
]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Path | str) -> list[Document | Rejected]:
    return list(read_source(Source(str(path), kind_of(str(path)))))


def reasons(records) -> list[str]:
    return [one.reason if isinstance(one, Rejected) else "" for one in records]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.ndjson.gz", gzip.compress), ("a.jsonl.zst", zstandard.ZstdCompressor().compress)],
)
def test_json_lines_plain_and_compressed(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(lines(GOOD)))
    first, second = read(tmp_path / name)
    assert (first.doc_id, first.event_time) == ("a", 1_719_792_000_000_000)
    assert (second.doc_id, second.title, second.qa) == ("7", "Beta", (("Which?", "Beta"),))


def test_two_zstandard_frames_are_one_file(tmp_path):
    frames = b"".join(zstandard.ZstdCompressor().compress(lines([row])) for row in GOOD)
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert [one.doc_id for one in read(tmp_path / "a.jsonl.zst")] == ["a", "7"]


def test_each_bad_line_is_one_rejected_record_and_the_good_ones_stay(tmp_path):
    content = [
        b'{"id": "ok", "text": "fine"}',
        b"not json at all",
        b'{"id": "x", "text": "\xff\xfe"}',
        b"[1, 2]",
        b'{"text": "no id"}',
        b'{"id": "n"}',
        b'{"id": "blank", "text": "  "}',
        b'{"id": "d", "text": "t", "timestamp": "yesterday"}',
        b'{"id": ["list"], "text": "t"}',
        b'{"id": "t", "text": "t", "title": 3}',
        b'{"id": "big", "text": "' + b"x" * (10 << 20) + b'"}',
        b"",
        b'{"id": "cut", "text": "\\ud83d"}',
        b'{"id": "last", "text": "no newline at the end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    records = read(tmp_path / "a.jsonl")
    assert reasons(records) == [
        "", "not_json", "not_utf8", "not_an_object", "no_id", "no_text", "no_text", "bad_timestamp",
        "bad_id", "bad_field", "text_too_long", "not_utf8", "",
    ]  # fmt: skip
    by_position = {one.position: one for one in records if isinstance(one, Rejected)}
    assert by_position[2].raw == b"not json at all\n"
    assert by_position[8].doc_id == "d", "a rejected document that can be named can be forgotten"
    assert by_position[2].doc_id is None
    assert len(by_position[11].raw) == MAX_RAW_BYTES
    assert "the timestamp is not a date: 'yesterday'" in by_position[8].message


def test_a_line_beyond_the_limit_is_skipped_not_held(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as out:
        out.write(b'{"id": "a", "text": "' + b"y" * (MAX_LINE_BYTES + 10_000) + b'"}\n')
        out.write(lines(GOOD[:1]))
    records = read(tmp_path / "a.jsonl")
    assert reasons(records) == ["text_too_long", ""]
    assert len(records[0].raw) == MAX_RAW_BYTES


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(GOOD).replace(b"\n", b"\r\n"))
    assert reasons(read(tmp_path / "a.jsonl")) == ["", ""]


def test_a_json_array_is_named_as_such(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD, indent=1))
    (only,) = read(tmp_path / "a.json")
    assert only.reason == "source_unreadable"
    assert "one JSON array, not JSON Lines; convert it: jq -c '.[]'" in only.message


def test_an_empty_file_does_not_pass_unseen(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        (only,) = read(tmp_path / name)
        assert only.reason == "no_text", name
    (tmp_path / "header.csv").write_text("id,text\n")
    assert "the file is empty" in read(tmp_path / "header.csv")[0].message


def test_a_file_that_vanishes_is_one_rejected_record(tmp_path):
    for kind in ("jsonl", "csv", "parquet", "text"):
        (only,) = read_source(Source(str(tmp_path / "gone"), kind))
        assert (only.reason, only.position) == ("source_vanished", 0)


def test_a_file_that_breaks_off_keeps_what_was_read(tmp_path):
    packed = gzip.compress(lines([{"id": i, "text": f"text {os.urandom(2000).hex()}"} for i in range(500)]))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    records = read(tmp_path / "a.jsonl.gz")
    assert len(records) > 100
    assert reasons(records)[:-1] == [""] * (len(records) - 1)
    assert records[-1].reason == "source_unreadable"
    assert f"reading stopped after {len(records) - 1} records" in records[-1].message
    assert records[-1].position == len(records) - 1


def test_a_zstandard_file_that_breaks_off_is_not_taken_for_a_shorter_one(tmp_path):
    rows = [{"id": i, "text": f"text {os.urandom(2000).hex()}"} for i in range(500)]
    blocks = zstandard.ZstdCompressor().compressobj()
    # Cut where a line ends and a block ends: nothing but the missing end of the frame tells of the loss.
    packed = b"".join(blocks.compress(lines([row])) + blocks.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for row in rows)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    records = read(tmp_path / "a.jsonl.zst")
    assert len(records) > 450
    assert reasons(records)[:-1] == [""] * (len(records) - 1)
    assert records[-1].reason == "source_unreadable"
    assert f"reading stopped after {len(records) - 1} records: Truncated compressed stream" in records[-1].message


def test_parquet_with_dates_integers_and_pairs(tmp_path):
    table = pa.table(
        {
            "id": pa.array([1, 2, 3], pa.int64()),
            "text": ["one", None, "three"],
            "timestamp": pa.array([datetime(2024, 7, 1, tzinfo=UTC), None, datetime(2024, 7, 2, tzinfo=UTC)]).cast(
                pa.timestamp("ns", tz="UTC")
            ),
            "qa": [[{"question": "Q?", "answer": "A"}], None, []],
            "ignored": [b"x", b"y", b"z"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert (first.doc_id, first.event_time, first.qa) == ("1", 1_719_792_000_000_000, (("Q?", "A"),))
    assert (second.reason, second.position, second.doc_id) == ("no_text", 2, "2")
    assert third.qa == ()


def test_parquet_date_column_and_damaged_string(tmp_path):
    text = pa.array([b"good", b"\xff\xfe bad"], pa.binary()).view(pa.string())
    table = pa.table({"id": ["a", "b"], "text": text, "timestamp": [date(2024, 7, 1)] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.event_time == 1_719_792_000_000_000
    assert (second.reason, second.raw) == ("not_utf8", b"\xff\xfe bad")


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing of the sort")
    (only,) = read(tmp_path / "a.parquet")
    assert only.reason == "source_unreadable"


def test_csv_rows(tmp_path):
    sink = io.StringIO()
    writer = csv.DictWriter(sink, ["id", "text", "timestamp", "qa"])
    writer.writeheader()
    qa = '[{"question":"Q","answer":"A"}]'
    writer.writerow({"id": "a", "text": "with, comma\nand line", "timestamp": "2024-07-01", "qa": qa})
    writer.writerow({"id": "b", "text": "plain"})
    writer.writerow({"id": "", "text": "no id"})
    writer.writerow({"id": "c", "text": "bad qa", "qa": "{"})
    content = sink.getvalue().encode() + b"d,caf\xe9,,\n" + b"e,text,2024-07-01,,too,many\n"
    (tmp_path / "a.csv").write_bytes(content)
    records = read(tmp_path / "a.csv")
    assert reasons(records) == ["", "", "no_id", "bad_field", "not_utf8", "bad_field"]
    assert (records[0].text, records[0].qa) == ("with, comma\nand line", (("Q", "A"),))
    assert b"caf\xe9" in records[4].raw


def test_csv_with_an_unclosed_quote_stops_with_a_reason(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text\na,fine\nb,"' + b"z" * (MAX_LINE_BYTES + 10))
    records = read(tmp_path / "a.csv")
    assert reasons(records) == ["", "source_unreadable"]
    assert "unclosed quote" in records[1].message


@pytest.mark.parametrize("tail", ['b,"never closed\nc,swallowed\n', 'b,"never closed\nc,"swallowed"\nd,text\n'])
def test_csv_rows_are_not_swallowed_by_a_quote_left_open(tmp_path, tail):
    (tmp_path / "a.csv").write_text("id,text\na,fine\n" + tail)
    records = read(tmp_path / "a.csv")
    assert reasons(records) == ["", "source_unreadable"]
    assert "an unclosed quote is the usual cause" in records[1].message


def test_text_files_are_named_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "deep" / "one.md").write_text("# Title\n\nBody.")
    (tmp_path / "notes" / "two.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes" / "long.txt").write_text("ä" * MAX_TEXT_BYTES)
    (tmp_path / "notes" / ".hidden.txt").write_text("not seen")
    (tmp_path / "notes" / "picture.png").write_bytes(b"png")
    found = find_sources(["./notes"])
    assert [one.path for one in found.sources] == ["notes/deep/one.md", "notes/long.txt", "notes/two.txt"]
    assert found.passed_over == ("notes/picture.png",)
    one, long, two = (record for source in found.sources for record in read_source(source))
    assert (one.doc_id, one.title, one.text) == ("notes/deep/one.md", "one", "# Title\n\nBody.")
    assert (long.reason, two.reason) == ("text_too_long", "not_utf8")
    assert two.doc_id == "notes/two.txt"


def test_globs_sort_and_skip_what_is_hidden(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "_tmp.jsonl", "c.bin"):
        (tmp_path / name).write_bytes(lines(GOOD))
    found = find_sources([f"{tmp_path}/*"])
    assert [Path(one.path).name for one in found.sources] == ["a.jsonl", "b.jsonl"]
    assert [Path(one).name for one in found.passed_over] == ["c.bin"]


def test_a_source_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    path = str(tmp_path / "a.jsonl")
    assert len(find_sources([path, path]).sources) == 1


def test_file_addresses_work_like_object_stores(tmp_path):
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "a.jsonl").write_bytes(lines(GOOD))
    for address in (f"file://{tmp_path}", f"file://{tmp_path}/day=*/*.jsonl", f"file://{tmp_path}/day=1/a.jsonl"):
        (only,) = find_sources([address]).sources
        assert only.path == f"file://{tmp_path}/day=1/a.jsonl"
        assert [one.doc_id for one in read_source(only)] == ["a", "7"]


def test_standard_input_plain_and_compressed():
    (source,) = find_sources(["-"]).sources
    for packed in (lines(GOOD), gzip.compress(lines(GOOD))):
        assert [one.doc_id for one in read_source(source, io.BytesIO(packed))] == ["a", "7"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no source was given"),
        (["-", "-"], "standard input is named twice"),
        (["missing.jsonl"], "the source does not exist: 'missing.jsonl'"),
        (["*.nothing"], "no document file was found"),
        (["odd.xyz"], "the kind of this source is unknown: 'odd.xyz'"),
        (["ftp://host/a.jsonl"], "the store is unknown: 'ftp://host/a.jsonl'"),
    ],
)
def test_wrong_sources_stop_before_any_work(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.xyz").write_text("x")
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        find_sources(given)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may read everything")
def test_a_named_file_without_permission_stops_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(StorageError, match="the source cannot be opened"):
        find_sources([str(tmp_path / "a.jsonl")])


def test_a_folder_inside_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    real = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"the source cannot be opened: '.*closed'.*Permission denied"):
        find_sources([str(tmp_path)])


def test_a_named_file_in_a_folder_that_may_not_be_searched(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(StorageError, match=r"the source cannot be opened: '.*a.jsonl'.*Permission denied"):
        find_sources([str(tmp_path / "a.jsonl")])


def test_a_broken_link_in_a_folder_is_a_rejected_record(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    (source,) = find_sources([str(tmp_path)]).sources
    assert reasons(read_source(source)) == ["source_vanished"]


def test_a_listed_file_that_cannot_be_opened_is_rejected_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    (only,) = read(tmp_path / "a.jsonl")
    assert only.reason == "source_unreadable"
    assert "Permission denied" in only.message
