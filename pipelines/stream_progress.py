"""What a stream tells people on standard error while it goes on: rate, open windows, last commit, watermark.

The figures are counted by two small steps of the graph in the process that runs it; the result's counts are the
ledger's, never these.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import apache_beam as beam
from rich.console import Console

from pipelines.live import SourceCounts
from pipelines.progress import ENCODED

REFRESH_SECONDS = 0.5
LINE_SECONDS = 30.0
"""How often a line is written where there is no terminal, if anything has changed."""


class Figures:
    """Windows that documents went into, and commits, of the stream that this process runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """A new stream begins."""
        with self._lock:
            self._ends: set[int] = set()
            self.commits = 0
            self.last_commit: float | None = None

    def saw(self, end: int) -> None:
        """A record of the window that ends at ``end``, in microseconds."""
        with self._lock:
            self._ends.add(end)

    def committed(self) -> None:
        """One more commit."""
        with self._lock:
            self.commits += 1
            self.last_commit = time.time()

    def open_windows(self, watermark: int | None) -> int:
        """Windows with records whose end ``watermark`` has not passed."""
        with self._lock:
            if watermark is not None:
                self._ends = {end for end in self._ends if end > watermark}
            return len(self._ends)


FIGURES = Figures()


def tell(line: str) -> None:
    """One line for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


class CountRecords(beam.PTransform):
    """Records pass unchanged; their windows are noted.

    Args:
        window_seconds: length of a window.
    """

    def __init__(self, window_seconds: int) -> None:
        super().__init__()
        self.window_seconds = window_seconds

    def expand(self, pcoll: beam.PCollection[Any]) -> beam.PCollection[Any]:
        """One DoFn."""
        return pcoll | "NoteWindow" >> beam.ParDo(_NoteWindowDoFn(self.window_seconds * 1_000_000))


class _NoteWindowDoFn(beam.DoFn):
    def __init__(self, window: int) -> None:
        self._window = window

    def process(self, element: Any, moment: Any = beam.DoFn.TimestampParam) -> Iterator[Any]:  # noqa: ANN401
        FIGURES.saw((moment.micros // self._window + 1) * self._window)
        yield element


class CountCommits(beam.PTransform):
    """Names of commits pass unchanged; they are counted."""

    def expand(self, pcoll: beam.PCollection[str]) -> beam.PCollection[str]:
        """One DoFn."""
        return pcoll | "NoteCommit" >> beam.Map(_note_commit).with_output_types(str)


def _note_commit(name: str) -> str:
    FIGURES.committed()
    return name


def status_line(counts: SourceCounts, began: float, now: float) -> str:
    """One line for people.

    Args:
        counts: of the source. began, now: seconds since the epoch.
    """
    rate = ENCODED.value / max(now - began, 1e-9)
    parts = [f"{counts.records:,} read", f"{ENCODED.value:,.0f} encoded ({rate:.1f} documents/s)"]
    if counts.waiting:
        parts.append(f"{counts.waiting:,} waiting")
    if counts.open_files:
        parts.append(f"{counts.open_files:,} files open")
    parts.append(f"{FIGURES.open_windows(counts.passed):,} open windows")
    last = "" if FIGURES.last_commit is None else f", the last {_time(FIGURES.last_commit)}"
    parts.append(f"{FIGURES.commits:,} commits{last}")
    parts.append(f"watermark {'not set yet' if counts.watermark is None else _time(counts.watermark / 1e6)}")
    return " · ".join(parts)


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError):
        return "at the end of time" if seconds > 0 else "before all time"


@contextmanager
def stream_report(show: bool | None, counts: SourceCounts, say: Callable[[str], None]) -> Iterator[None]:
    """Keep people informed while the context lasts.

    Args:
        show: None: a status line on terminals, now and then a line elsewhere. True: lines in any case. False: nothing.
    """
    if show is False:
        yield
        return
    stop = threading.Event()
    began = time.time()
    terminal = show is None and sys.stderr.isatty()
    target = _show_status if terminal else _write_lines
    watcher = threading.Thread(target=target, args=(counts, began, stop, say), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        say(status_line(counts, began, time.time()))


def _show_status(counts: SourceCounts, began: float, stop: threading.Event, say: Callable[[str], None]) -> None:
    console = Console(stderr=True)
    with console.status("starting") as status:
        while not stop.wait(REFRESH_SECONDS):
            status.update(status_line(counts, began, time.time()))


def _write_lines(counts: SourceCounts, began: float, stop: threading.Event, say: Callable[[str], None]) -> None:
    told = None
    while not stop.wait(LINE_SECONDS):
        now = (counts.records, ENCODED.value, FIGURES.commits)
        if now != told:
            say(status_line(counts, began, time.time()))
        told = now
