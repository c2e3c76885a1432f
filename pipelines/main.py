"""Console script ``mbc``: the core's commands, and those that run pipelines (ingest, adapt, eval, demo)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mbc_core.cli.app import COMMANDS, SETTINGS, LazyGroup, run

PIPELINE_COMMANDS = {
    "demo": ("pipelines.demo", "demo"),
    "ingest": ("pipelines.commands", "ingest"),
    "adapt": ("pipelines.adapt_command", "adapt"),
    "migrate": ("pipelines.migrate_command", "migrate"),
    "eval": ("pipelines.eval_command", "evaluate"),
}

HELP = """Compressed memory banks that keep a language model's knowledge current.

Start with `mbc demo`. Exit codes: 0 done, 1 failed, 2 wrong use.
"""


def build() -> LazyGroup:
    """All commands of ``mbc``, none of them imported yet."""
    # Those of the pipelines come first in the list, and win where both have one.
    lazy = {**PIPELINE_COMMANDS, **COMMANDS, **PIPELINE_COMMANDS}
    group = LazyGroup("mbc", lazy=lazy, context_settings=SETTINGS, help=HELP)
    return _with_version(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    return run(build(), arguments)


def _with_version(group: LazyGroup) -> LazyGroup:
    import click

    return click.version_option(package_name="mbc", prog_name="mbc")(group)


if __name__ == "__main__":
    sys.exit(main())
