"""The command line's own rules: exit codes, clean standard output, shared options, lazy commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime

import click
import pytest
from click.testing import CliRunner

from mbc_core.cli.app import LazyGroup, cli, run
from mbc_core.cli.options import Duration, Time, as_of_option, json_option, window_option
from mbc_core.cli.output import bytes_for_people, only_json, print_json, show, table
from mbc_core.errors import DamagedFile, UsageError


@click.group()
def toy() -> None:
    """A group whose commands end in every possible way."""


@toy.command()
def fine() -> None:
    """Ends well."""


@toy.command()
def failed() -> None:
    """Ends in an error of ours."""
    raise DamagedFile("the shard is damaged", value="a.parquet", cause="a full disk", fix="restore it")


@toy.command()
def wrong() -> None:
    """Ends in wrong use."""
    raise UsageError("the bank was made with another encoder", value="x", fix="name a new bank")


@toy.command()
def surprise() -> None:
    """Ends in something nobody thought of."""
    raise ZeroDivisionError("by nought")


@toy.command()
def stopped() -> None:
    """Is interrupted."""
    raise KeyboardInterrupt


@toy.command()
@json_option
def noisy(as_json: bool) -> None:
    """A library prints to standard output while we work."""
    with only_json(as_json) as stream:
        print("downloading…")
        if as_json:
            print_json({"answer": "é", "when": datetime(2025, 1, 1, tzinfo=UTC)}, stream)
        else:
            click.echo("readable")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fine"], 0, ""),
        (["--help"], 0, ""),
        (["failed"], 1, "error: the shard is damaged: 'a.parquet'. Likely cause: a full disk. Fix: restore it."),
        (["wrong"], 2, "error: the bank was made with another encoder: 'x'. Fix: name a new bank."),
        (["surprise"], 1, "error: ZeroDivisionError: by nought"),
        (["stopped"], 1, "interrupted; what was committed stays"),
        (["nothing-of-that-name"], 2, "No such command"),
        (["fine", "--colour"], 2, "No such option"),
    ],
)
def test_exit_codes_and_messages(capsys, arguments, code, message):
    assert run(toy, arguments) == code
    assert message in capsys.readouterr().err


def test_a_surprise_shows_its_traceback_on_request(capsys, monkeypatch):
    run(toy, ["surprise"])
    assert "MBC_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("MBC_DEBUG", "1")
    run(toy, ["surprise"])
    assert "Traceback" in capsys.readouterr().err


def test_json_is_alone_on_standard_output(capsys):
    assert run(toy, ["noisy", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {"answer": "é", "when": "2025-01-01T00:00:00Z"}
    assert "downloading…" in captured.err


def test_without_json_standard_output_is_left_alone(capsys):
    run(toy, ["noisy"])
    assert capsys.readouterr().out == "downloading…\nreadable\n"


def test_json_of_what_has_none_is_an_error():
    with pytest.raises(TypeError, match="object has no JSON form"):
        print_json({"x": object()}, io.StringIO())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-07-01", datetime(2024, 7, 1, tzinfo=UTC)),
        ("2024-07-01T09:30:00+02:00", datetime(2024, 7, 1, 7, 30, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ],
)
def test_time_option(text, expected):
    assert Time().convert(text, None, None) == expected


@pytest.mark.parametrize(
    ("text", "seconds"), [("1d", 86_400), ("6h", 21_600), ("30m", 1_800), ("45s", 45), ("90", 90), ("2W", 1_209_600)]
)
def test_duration_option(text, seconds):
    assert Duration().convert(text, None, None) == seconds


@click.command()
@as_of_option
@window_option
def shared(as_of: datetime | None, window_seconds: int | None) -> None:
    """Takes the shared options."""
    click.echo(f"{as_of} {window_seconds}")


@pytest.mark.parametrize(
    "arguments",
    [["--as-of", "yesterday"], ["--as-of", ""], ["--window", "0d"], ["--window", "1 week"], ["--window", "²d"]],
)
def test_wrong_values_of_shared_options_are_wrong_use(arguments):
    result = CliRunner().invoke(shared, arguments)
    assert result.exit_code == 2
    assert "write it like" in result.stderr


def test_defaults_of_shared_options():
    assert CliRunner().invoke(shared, []).stdout == "None None\n"


def test_lazy_commands_are_listed_without_being_imported():
    group = LazyGroup("g", lazy={"never": ("no_such_module", "never")})
    assert group.list_commands(click.Context(group)) == ["never"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        group.get_command(click.Context(group), "never")


def test_help_is_quick_and_needs_no_model_library():
    program = (
        "import sys; from mbc_core.cli import cli, run; code = run(cli, ['--help']); "
        "heavy = {'torch', 'transformers', 'peft', 'apache_beam', 'faiss'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in cli.list_commands(click.Context(cli)):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12_345, "12,345"),
        (None, "–"),
        (True, "yes"),
        (0.12345, "0.123"),
        (12.34, "12.3"),
        (12_345.6, "12,346"),
        ("[b]", r"\[b]"),
    ],
)
def test_values_for_people(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(14.0, "14 B"), (12_345, "12,345 B"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB")]
)
def test_bytes_for_people(size, text):
    assert bytes_for_people(size) == text


def test_tables_align_numbers_right():
    made = table("T", ["name", "count"], [["a", 1], ["b", "–"]])
    assert [column.justify for column in made.columns] == ["left", "right"]
