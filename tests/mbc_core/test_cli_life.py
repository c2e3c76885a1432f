"""`mbc forget` and `mbc compact`: keys, tables, exit codes, ids from files, wrong use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from bank_rows import make_bank, make_slice, numbered, shown

from mbc_core.bank import Bank, commit_slice
from mbc_core.cli import cli, life, run
from schemas import results


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    for number in range(3):
        commit_slice(bank, make_slice(f"r{number}", "0", numbered(3 * number, 3)), f"r{number}", "0")
    commit_slice(bank, make_slice("again", "0", numbered(0, 2, "other")), "again", "0")
    return bank


def test_forget_prints_one_object(bank, capsys):
    assert run(cli, ["forget", "x0001", "nobody", "--bank", bank.uri, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == set(results.ForgetResult.__annotations__) and err == ""
    assert (found["forgotten"], found["not_found"]) == (1, 1) and Path(found["receipt"]).is_file()
    assert "x0001" not in {name for name, _ in shown(bank)}


def test_forget_for_people(bank, capsys):
    assert run(cli, ["forget", "x0001", "nobody", "--bank", bank.uri]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 documents forgotten, 1 not found\nreceipt ") and bank.uri in out
    assert "rewriting codes" in err and "refused from now on" in err
    assert "x0001" not in out + err
    assert run(cli, ["forget", "x0001", "--bank", bank.uri]) == 0, "once more is no error"


@pytest.mark.parametrize("given", ["file", "-"])
def test_ids_from_a_file(bank, tmp_path, monkeypatch, capsys, given):
    text = 'x0001\n\n{"id": "x0002"}\n{"doc_id": "x0003"}\n{odd\n'
    if given == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    else:
        (tmp_path / "file").write_text(text)
        given = str(tmp_path / "file")
    assert run(cli, ["forget", "x0008", "--ids-file", given, "--bank", bank.uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["forgotten"], found["not_found"]) == (4, 1)


def test_ids_from_a_file_of_another_system(tmp_path):
    """A byte-order mark is no part of the first id, and only a line feed ends a line."""
    file = tmp_path / "ids"
    file.write_bytes('\ufeffd1\r\na\x85b\r\n{"id": "c\u2028d"}\r\n'.encode())
    assert life._ids_of(file) == ["d1", "a\x85b", "c\u2028d"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "Give ids of documents, or --ids-file FILE"),
        (["--ids-file", "nowhere"], "the ids cannot be read"),
        (["--ids-file", "bad"], "a line of the ids has no `id`"),
        (["--ids-file", "latin"], "name a text file in UTF-8"),
        (["x" * 2000], "this is no document's id"),
    ],
)
def test_wrong_use_of_forget(bank, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    Path("bad").write_text('{"name": "x0001"}\n')
    Path("latin").write_bytes("é\n".encode("latin-1"))
    assert run(cli, ["forget", *words, "--bank", bank.uri]) == 2
    out, err = capsys.readouterr()
    assert told in err and out == ""
    assert len(shown(bank)) == 9


def test_compact_prints_one_object_and_a_table(bank, capsys):
    assert run(cli, ["compact", "--bank", bank.uri, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == set(results.CompactResult.__annotations__) and err == ""
    assert found["before"]["files"] > found["after"]["files"]
    assert found["before"]["bytes"] == found["before"]["parts"]["total"]
    assert found["dropped"] == dict.fromkeys(("codes", "documents", "replay", "ledger"), 0)
    assert run(cli, ["compact", "--bank", bank.uri, "--history", "0", "--safe-age", "0"]) == 0
    out, err = capsys.readouterr()
    assert "before" in out and "6 superseded rows dropped" in out and "merging codes" in err
    assert len(shown(bank)) == 9


@pytest.mark.parametrize("words", [["--history", "soon"], ["--safe-age", "-1"], ["--history"]])
def test_wrong_use_of_compact(bank, capsys, words):
    assert run(cli, ["compact", "--bank", bank.uri, *words]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["forget", "a"], ["compact"]])
def test_no_bank(tmp_path, capsys, words):
    assert run(cli, [*words, "--bank", str(tmp_path / "none")]) == 2
    assert "there is no bank here" in capsys.readouterr().err
