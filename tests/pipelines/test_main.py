"""`mbc`: every command is there, has help with an example, and stands in the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipelines.main import build, main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below ``group``, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(build()))
LEAVES = {path: command for path, command in ALL.items() if not isinstance(command, click.Group)}


def test_the_commands_are_those_of_the_design():
    assert {path[0] for path in ALL} == {
        "demo",
        "ingest",
        "adapt",
        "ask",
        "recall",
        "inspect",
        "export",
        "forget",
        "compact",
        "migrate",
        "eval",
        "adapters",
        "train",
    }
    assert {path[1] for path in ALL if path[0] == "adapters" and len(path) > 1} == {
        "list",
        "show",
        "promote",
        "rollback",
        "add",
        "canary",
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help(path, capsys):
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: mbc {' '.join(path)}" in shown
    if path in LEAVES:
        assert f"Example: mbc {' '.join(path)}" in " ".join(shown.split())


@pytest.mark.parametrize("path", [path for path in LEAVES if path[0] not in ("train", "adapters")], ids=" ".join)
def test_the_readme_shows_every_command(path):
    assert f"mbc {' '.join(path)} " in README.replace("\n", " ") or f"`mbc {' '.join(path)}`" in README


@pytest.mark.parametrize("group", ["train", "adapters"])
def test_the_readme_names_the_groups(group):
    assert f"mbc {group} " in README


def test_the_readme_invents_no_command():
    named = set(re.findall(r"mbc ([a-z]+)\b", README)) - {"and"}
    assert named <= {path[0] for path in ALL}, f"the README names commands that do not exist: {named}"


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_shared_options_are_spelled_the_same_everywhere(path):
    options = {name for parameter in LEAVES[path].params for name in parameter.opts if name.startswith("--")}
    assert not options & {"--bank-uri", "--out-json", "--as-json", "--gpu"}
    if "--json" in options:
        (json_option,) = [parameter for parameter in LEAVES[path].params if "--json" in parameter.opts]
        assert "nothing else there" in json_option.help


@pytest.mark.parametrize(
    "path", [("ingest",), ("ask",), ("recall",), ("adapt",), ("inspect",), ("export",)], ids=" ".join
)
def test_a_missing_bank_is_wrong_use(path, capsys):
    assert main([*path, "something"]) == 2
    assert capsys.readouterr().out == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mbc, version \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_no_arguments_shows_what_there_is(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Start with `mbc demo`" in captured.out + captured.err
