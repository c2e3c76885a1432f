"""The command group, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from mbc_core.cli.output import note
from mbc_core.errors import MbcError

COMMANDS = {
    "ask": ("mbc_core.cli.ask", "ask"),
    "recall": ("mbc_core.cli.ask", "recall"),
    "inspect": ("mbc_core.cli.bank", "inspect"),
    "export": ("mbc_core.cli.bank", "export"),
    "forget": ("mbc_core.cli.life", "forget"),
    "compact": ("mbc_core.cli.life", "compact"),
    "eval": ("mbc_core.cli.evaluate", "evaluate"),
    "adapters": ("mbc_core.cli.adapters", "adapters"),
    "train": ("mbc_core.cli.train", "train"),
}
"""Command → module and name; imported when used, so that `mbc --help` answers at once."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is used."""

    def __init__(self, *args: object, lazy: dict[str, tuple[str, str]] | None = None, **extra: object) -> None:
        super().__init__(*args, **extra)  # type: ignore[arg-type]
        self.lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in the order they are met in practice."""
        return [*self.lazy, *(name for name in super().list_commands(ctx) if name not in self.lazy)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, name = self.lazy[cmd_name]
        command = getattr(importlib.import_module(module), name)
        return command if isinstance(command, click.Command) else None


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings=SETTINGS)
@click.version_option(package_name="mbc", prog_name="mbc")
def cli() -> None:
    """Compressed memory banks that keep a language model's knowledge current.

    Exit codes: 0 done, 1 failed, 2 wrong use.
    """


def run(group: click.Group, arguments: Sequence[str] | None = None, *, prog: str = "mbc") -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong use.

    Args:
        group: the commands.
        arguments: the words after the program's name; ``sys.argv`` when None.
        prog: the program's name in help texts.
    """
    try:
        result = group.main(args=arguments, prog_name=prog, standalone_mode=False)
        sys.stdout.flush()  # at exit it would be too late: a reader that went away meanwhile is no error of ours
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        error.show(file=sys.stderr)
        return 2
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 1
    except (click.Abort, KeyboardInterrupt):
        note("interrupted; what was committed stays, and the same command goes on from there")
        return 1
    except BrokenPipeError:
        return _reader_went_away()
    except MbcError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return _reader_went_away()
        note(f"error: {error}")
        return error.exit_code
    except Exception as error:  # the last resort: a person sees one line, a developer sets MBC_DEBUG
        note(f"error: {type(error).__name__}: {error}")
        note(traceback.format_exc() if os.environ.get("MBC_DEBUG") else "Set MBC_DEBUG=1 to see where it came from.")
        return 1


def _reader_went_away() -> int:
    """End quietly, as `mbc export … | head` expects; Python must not try to flush into the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
