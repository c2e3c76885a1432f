"""Progress of a run on standard error: documents read, documents encoded, documents a second.

The encoder counts inside this process; with workers in other processes the count moves once a slice.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Counter:
    """Documents encoded in this process since it was last set; safe to call from Beam's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0.0

    def add(self, documents: float) -> None:
        """Count more documents; parts of one are allowed."""
        with self._lock:
            self._value += documents

    def set(self, documents: float) -> None:
        """What is known for certain, after a slice."""
        with self._lock:
            self._value = documents

    @property
    def value(self) -> float:
        """Documents so far."""
        with self._lock:
            return self._value


ENCODED = Counter()
"""Fed by the Encode DoFn."""


class Report:
    """What a run tells a person while it goes on; every method is cheap."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._began = time.monotonic()
        self._task = None if progress is None else progress.add_task("reading", total=None, rate="")

    def read(self, records: int) -> None:
        """So many more records were read."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, records)

    def start_encoding(self, documents: int, done: int) -> None:
        """``documents`` are to be made visible, ``done`` of them are already."""
        self._began, self._skipped = time.monotonic(), done
        ENCODED.set(done)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="encoding", total=documents, completed=done)

    def slice_done(self, documents: int) -> None:
        """All slices so far hold ``documents``."""
        ENCODED.set(documents)
        self.refresh()

    def refresh(self) -> None:
        """Show the counter's value."""
        if self._progress is None or self._task is None:
            return
        done = ENCODED.value
        rate = max(done - self._skipped, 0.0) / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(self._task, completed=done, rate=f"{rate:.1f} documents/s")


@contextmanager
def report(show: bool | None) -> Iterator[Report]:
    """A :class:`Report`, shown on standard error; ``show`` None: only where that is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield Report(None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        found = Report(progress)
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(found, stop), daemon=True)
        watcher.start()
        try:
            yield found
        finally:
            stop.set()
            watcher.join()


def _watch(shown: Report, stop: threading.Event) -> None:
    while not stop.wait(0.5):
        if ENCODED.value:
            shown.refresh()
