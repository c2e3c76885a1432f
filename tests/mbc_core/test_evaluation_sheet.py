"""Question sheets come back from disk as they went, and a damaged one is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from mbc_core.errors import DamagedFile, StorageError
from mbc_core.evaluation.sheet import READS, Lines, Sheet, Shown, load_sheet, save_sheet


@pytest.fixture
def sheet() -> Sheet:
    lines = Lines()
    shown = [
        Shown("recall", "default", 2, [0, 1], [lines.places(["a", "b"]), lines.places(["b", "ü"])], 75.0, 1.5),
        Shown("closed", "-", 0, [1], [[]], 0.0, 0.0, documents=200),
    ]
    return Sheet(["q0", "q1"], [["x"], ["y", "z"]], lines.all(), shown, {"notes": [], "settings": {"seed": 3}})


def test_lines_are_kept_once(sheet):
    assert sheet.lines == ["a", "b", "ü"]
    assert sheet.memory(sheet.shown[0]) == [["a", "b"], ["b", "ü"]]
    assert sheet.memory(sheet.shown[1]) == [[]]


def test_a_sheet_survives_the_disk_byte_for_byte(sheet, tmp_path):
    save_sheet(tmp_path / "deep" / "a.gz", sheet)
    found = load_sheet(tmp_path / "deep" / "a.gz")
    assert found == sheet
    save_sheet(tmp_path / "b.gz", found)
    assert (tmp_path / "b.gz").read_bytes() == (tmp_path / "deep" / "a.gz").read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["deep", "b.gz"] or len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "mbc-question-sheet-0"}, "has another format: 'mbc-question-sheet-0'"),
        ({"answers": [["x"]]}, "2 questions, 1 lists of answers"),
        ({"lines": ["a"]}, "names a line that is not there"),
        ({"questions": ["q0"], "answers": [["x"]]}, "names a question that is not there"),
        ({"shown": [{"read": "recall"}]}, "cannot be read"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_a_damaged_sheet_is_refused(sheet, tmp_path, change, told):
    path = tmp_path / "a.gz"
    save_sheet(path, sheet)
    fields = json.loads(gzip.decompress(path.read_bytes())) | change
    path.write_bytes(gzip.compress(json.dumps(fields).encode()))
    with pytest.raises(DamagedFile, match=told):
        load_sheet(path)


def test_an_unknown_read_and_a_cut_file_are_refused(sheet, tmp_path):
    path = tmp_path / "a.gz"
    save_sheet(path, sheet)
    fields = json.loads(gzip.decompress(path.read_bytes()))
    fields["shown"][0]["read"] = "telepathy"
    path.write_bytes(gzip.compress(json.dumps(fields).encode()))
    with pytest.raises(DamagedFile, match="the read 'telepathy' is unknown"):
        load_sheet(path)
    save_sheet(path, sheet)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedFile, match="the question sheet cannot be read"):
        load_sheet(path)
    with pytest.raises(StorageError, match="the question sheet cannot be written"):
        save_sheet(path / "below-a-file", sheet)


def test_every_read_says_what_it_is():
    assert all(
        kind.says and kind.adapter in ("own", "closed", "text", "attend", "aggregate") for kind in READS.values()
    )
    assert {name for name, kind in READS.items() if kind.adapter != "own"} == {
        "closed-equal",
        "text-equal",
        "right-text-equal",
        "attend-closed",
        "attend-shuffled",
        "attend",
        "attend-right",
        "aggregate-shuffled",
        "aggregate",
    }
    assert all((kind.store is None) == (kind.places == "none") for kind in READS.values())
