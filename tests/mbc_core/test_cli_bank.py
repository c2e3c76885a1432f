"""`mbc inspect`, `export` and `adapters` on small banks: keys, exit codes, standard output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bank_rows import make_bank, make_slice, numbered

from mbc_core import defaults
from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank, commit_slice
from mbc_core.cli import cli, run
from schemas import results

BASE, OTHER = "f" * 64, "e" * 64


class Numbers:
    """A lexicon whose words are the codes themselves, with the digest that the small banks name."""

    digest = "bb" * 32

    def read(self, stored):
        return " ".join(str(stored[at] + 256 * stored[at + 1]) for at in range(0, len(stored), 2))


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = make_bank(tmp_path / "bank")
    commit_slice(bank, make_slice("one", "0", numbered(0, 5), passages=2, dead=3), "one", "0")
    return bank


@pytest.fixture
def registry(bank: Bank) -> AdapterRegistry:
    return AdapterRegistry(bank)


def add(registry: AdapterRegistry, text: str, base: str = BASE) -> str:
    files = {"adapter_model.safetensors": text.encode(), "adapter_config.json": b"{}"}
    card = {"before": {"new_f1": 10.0, "old_f1": 20.0}, "after": {"new_f1": 12.34, "old_f1": None}}
    return registry.save_candidate(files, card, base)


def the_json(capsys) -> dict:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_inspect_prints_the_published_keys(bank, capsys):
    assert run(cli, ["inspect", "--bank", bank.uri, "--json"]) == 0
    found = the_json(capsys)
    assert set(results.InspectResult.__annotations__) <= set(found)
    assert (found["documents"], found["passages"], found["dead_letters"]) == (5, 10, 3)


def test_inspect_for_people(bank, capsys):
    assert run(cli, ["inspect", "--bank", bank.uri, "--verify"]) == 0
    shown = capsys.readouterr().out
    for text in ("documents", "dead letters", "codebook perplexity", "codes table", "counts add up"):
        assert text in shown


def test_inspect_verify_fails_on_a_damaged_shard(bank, capsys):
    path, _ = bank.files("codes")[0]
    shard = Path(bank.uri) / "codes" / path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    assert run(cli, ["inspect", "--bank", bank.uri, "--verify", "--json"]) == 1
    found = the_json(capsys)
    assert found["ok"] is False
    assert any(path in problem for problem in found["problems"])
    assert run(cli, ["inspect", "--bank", bank.uri, "--verify"]) == 1
    assert "problem: " in capsys.readouterr().out


def test_leftovers_are_a_note_and_no_problem(bank, capsys):
    path, _ = bank.files("codes")[0]
    (Path(bank.uri) / "codes" / path).with_name("left.parquet").write_bytes(b"half a file")
    assert run(cli, ["inspect", "--bank", bank.uri, "--verify"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note: 1 files of 11 bytes belong to nothing" in shown and "counts add up" in shown


def test_a_bank_that_is_not_there_is_wrong_use(tmp_path, capsys):
    assert run(cli, ["inspect", "--bank", str(tmp_path / "nothing"), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no bank here" in captured.err


def test_a_bank_is_needed(capsys):
    assert run(cli, ["inspect"]) == 2
    assert "Missing option '--bank'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_export_to_a_file_by_its_ending(bank, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(defaults, "lexicon", Numbers)
    out = tmp_path / name
    assert run(cli, ["export", "--bank", bank.uri, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "10 rows in" in captured.err
    if name.endswith("parquet"):
        rows = pq.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(rows) == 10
    assert all(len(row["codes"]) == 24 and len(row["words"].split()) == 3 for row in rows)


def test_export_as_json_tells_what_was_written(bank, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(defaults, "lexicon", Numbers)
    out = tmp_path / "decoded.jsonl"
    assert run(cli, ["export", "--bank", bank.uri, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"rows": 10, "out": str(out), "format": "jsonl"}
    assert len(out.read_text("utf-8").splitlines()) == 10


def test_export_as_json_needs_a_file_for_the_rows(bank, capsys):
    assert run(cli, ["export", "--bank", bank.uri, "--json"]) == 2
    assert "name it with --out" in capsys.readouterr().err


def test_export_to_standard_output(bank, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(defaults, "lexicon", Numbers)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(cli, ["export", "--bank", bank.uri]) == 0
    lines = stream.buffer.getvalue().decode("utf-8").splitlines()
    assert {json.loads(line)["doc_id"] for line in lines} == {f"x{number:04d}" for number in range(5)}


def buffered() -> dict[str, str]:
    """The environment of a program whose standard output is buffered, as it is unless somebody asks for other."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_reader_that_goes_away_ends_the_export_quietly(bank):
    program = (
        "import sys; from mbc_core import defaults; from test_cli_bank import Numbers; defaults.lexicon = Numbers; "
        f"from mbc_core.cli import cli, run; sys.exit(run(cli, ['export', '--bank', {bank.uri!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=buffered() | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_reader_that_goes_away_after_the_last_line_ends_the_command_quietly():
    program = (
        "import sys, click; from mbc_core.cli import run; "
        "say = click.Command('say', callback=lambda: sys.stdin.readline() and sys.stdout.write('kept in a buffer')); "
        "sys.exit(run(click.Group('all', [say]), ['say']))"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered()
    ) as process:
        process.stdout.close()
        process.stdin.write("now\n")
        process.stdin.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == ""


def test_parquet_does_not_go_to_standard_output(bank, capsys):
    assert run(cli, ["export", "--bank", bank.uri, "--format", "parquet"]) == 2
    assert "name a file with --out" in capsys.readouterr().err


def test_export_of_a_bank_with_another_lexicon_is_refused_by_name(bank, capsys):
    assert run(cli, ["export", "--bank", bank.uri]) == 1
    assert "the bank was made with another lexicon: 'bbbb" in capsys.readouterr().err


def test_adapters_life(bank, registry, capsys):
    uri = ["--bank", bank.uri, "--json"]
    first, second = add(registry, "one"), add(registry, "two")
    assert run(cli, ["adapters", "list", *uri]) == 0
    assert [entry["live"] for entry in the_json(capsys)["adapters"]] == [False, False]
    for version in (first, second):
        assert run(cli, ["adapters", "promote", version, "--reason", "better", *uri]) == 0
        told = the_json(capsys)
        assert (told["live"], told["reason"]) == (version, "better") and told["seconds"] >= 0
    assert run(cli, ["adapters", "show", second, *uri]) == 0
    shown = the_json(capsys)
    assert (shown["version"], shown["live"], shown["base_digest"]) == (second, True, BASE)
    assert shown["card"]["before"] == {"new_f1": 10.0, "old_f1": 20.0}
    assert run(cli, ["adapters", "rollback", *uri]) == 0
    assert the_json(capsys)["live"] == first
    assert run(cli, ["adapters", "rollback", *uri]) == 0
    assert the_json(capsys)["live"] is None
    assert run(cli, ["adapters", "rollback", *uri]) == 2
    assert "no adapter to roll back" in capsys.readouterr().err


def test_adapters_for_people(bank, registry, capsys):
    version = add(registry, "one")
    assert run(cli, ["adapters", "list", "--bank", bank.uri]) == 0
    captured = capsys.readouterr()
    assert version in captured.out
    assert "10.0 → 12.3" in captured.out and "20.0 → –" in captured.out
    assert "the one that comes with the release is used" in captured.err
    run(cli, ["adapters", "promote", version, "--bank", bank.uri])
    assert run(cli, ["adapters", "show", version, "--bank", bank.uri]) == 0
    assert "(live)" in capsys.readouterr().out
    assert run(cli, ["adapters", "rollback", "--bank", bank.uri]) == 0
    assert "is used again" in capsys.readouterr().err


def test_no_such_adapter_is_wrong_use(bank, capsys):
    assert run(cli, ["adapters", "show", "0001-0000000000000000", "--bank", bank.uri]) == 2
    assert "no such adapter" in capsys.readouterr().err


def test_rollback_without_adapters(bank, capsys):
    assert run(cli, ["adapters", "rollback", "--bank", bank.uri]) == 2
    assert "no adapter for such a base model" in capsys.readouterr().err


def test_rollback_asks_which_base_model(bank, registry, capsys):
    registry.promote(add(registry, "one"), "good")
    kept = add(registry, "two", OTHER)
    registry.promote(kept, "good")
    assert run(cli, ["adapters", "rollback", "--bank", bank.uri]) == 2
    assert "which base model is meant is not clear" in capsys.readouterr().err
    assert run(cli, ["adapters", "rollback", "--base", BASE[:6], "--bank", bank.uri]) == 0
    assert registry.live(BASE) is None
    assert registry.live(OTHER) == kept


def test_the_module_runs_without_beam(bank):
    program = (
        "import sys; sys.modules['apache_beam'] = None; sys.modules['pipelines'] = None; sys.argv = ['mbc', 'inspect',"
        f" '--bank', {bank.uri!r}, '--json']; import runpy; runpy.run_module('mbc_core.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 5
