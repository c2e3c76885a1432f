"""What commands print: one JSON object or readable text on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH_WITHOUT_TERMINAL = 120


def make_console(*, stderr: bool = False) -> Console:
    """A console on the standard stream of this moment (so that tests can catch it); lines are never cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else _WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


def err() -> Console:
    """Console for progress, notes and errors."""
    return make_console(stderr=True)


def out() -> Console:
    """Console for results."""
    return make_console()


def note(line: str) -> None:
    """One line for people on standard error."""
    err().print(line, markup=False)


@contextlib.contextmanager
def only_json(enabled: bool) -> Iterator[TextIO]:
    """Keep standard output clean: while inside, whatever any library prints goes to standard error.

    Yields:
        the real standard output, for the one object (:func:`print_json`).
    """
    real = sys.stdout
    if not enabled:
        yield real
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield real


def print_json(value: Mapping[str, Any], stream: TextIO) -> None:
    """One JSON object and a newline; times as ISO 8601, bytes as hex."""
    stream.write(json.dumps(value, ensure_ascii=False, default=_plain) + "\n")
    stream.flush()


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table; numbers are right-aligned and get thousands separators. Nameless columns have no header line."""
    headed = any(columns)
    box = rich.box.SIMPLE_HEAD if headed else rich.box.SIMPLE
    result = Table(title=title, title_justify="left", box=box, show_header=headed, show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) or row[number] == "–" for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(show(cell) for cell in row))
    return result


def show(value: object) -> str:
    """A value for people: 12,345 · 0.123 · text as it is · – for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return escape(str(value))


def escape(text: str) -> str:
    """Text from documents, made safe for rich's markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def bytes_for_people(size: float) -> str:
    """12,345 B · 1.2 MB · 3.4 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:,.0f} B"


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, *, quiet: bool = False) -> Iterator[Any]:
    """A bar on standard error; yields ``advance(n)``. Prints nothing when ``quiet`` or not on a terminal."""
    if quiet or not err().is_terminal:
        yield lambda amount=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount=1: bar.advance(task, amount)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")
