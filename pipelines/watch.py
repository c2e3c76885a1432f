"""A watched folder, glob or bucket prefix as a live source: each file read once, when it is whole.

A file is known by its path, size and time of change. It is read when a writer has plainly finished with it: it did
not change between two polls, or has been left alone for twice as long as a poll. Objects of a store appear whole and
are read at once. A changed file is read again: its unchanged documents are duplicates then, the others revisions.
After a restart everything is looked at again, and the bank knows what it has.

The watermark (no older document follows) would have to be the wall clock for a folder, and every document of the past
late. Here it stands at the oldest document that was found and not yet handed on; while a file is being written or
waits to be read it does not move; only when nothing is open does it follow the clock. Documents older than that can
still come, in a file that appears later: they are late, and how late a document may be is the graph's business.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mbc_core.errors import MbcError, UsageError
from pipelines.backlog import Backlog
from pipelines.live import Drain, SourceCounts, Step
from pipelines.readers import Record, Rejected, read_source
from pipelines.sources import KINDS, STDIN, FileState, Source, kind_of, list_files, require_bucket, state_of
from schemas.document import Document

UNFINISHED = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".swp", "~")
"""Endings of names that programs give to files they are still writing; such files are never read."""

RELEASE_DOCUMENTS = 128
RELEASE_CHARACTERS = 1 << 18
"""Most of what is handed on at once: enough to fill the encoder's batches, and encoded within seconds."""

LONGEST_HOLD = 600.0
"""Seconds for which one file that keeps changing may hold the watermark; its documents may be late after that."""

_READING = 0.5
_MOMENT = 0.25


@dataclass(frozen=True, slots=True)
class WatchRule:
    """How a folder is watched.

    Attributes:
        poll: seconds between two looks.
        idle_exit: seconds without anything new after which the stream ends; None never.
        drain_wait: most seconds that the end waits for a file that may still be written.
    """

    poll: float = 5.0
    idle_exit: float | None = None
    drain_wait: float = 5.0


class FolderWatch:
    """Looks at the sources and says which files are whole and not read yet.

    Args:
        given: folders, globs, files, ``s3://…`` or ``gs://…``.
        poll: seconds between two looks.
        wall: the time, in seconds since the epoch.
    """

    def __init__(self, given: Sequence[str], poll: float, wall: Callable[[], float] = time.time) -> None:
        self._given, self._settle_ns, self._wall = tuple(given), round(2e9 * poll), wall
        self._seen: dict[str, FileState] = {}
        self._read: dict[str, FileState] = {}
        self.open: dict[str, float] = {}

    def look(self) -> tuple[list[FileState], bool]:
        """List everything once.

        Returns:
            Files to read now, in order of their names; and whether anything is new or has changed.

        Raises:
            StorageError: a source cannot be listed.
        """
        now = self._wall()
        listed = {one.path: one for given in self._given for one in list_files(given) if not unfinished(one.path)}
        whole, news = [], False
        for path, state in sorted(listed.items()):
            if self._read.get(path) == state:
                continue
            unchanged = self._seen.get(path) == state
            news = news or not unchanged
            if unchanged or self._left_alone(state, now):
                whole.append(state)
                self.open.pop(path, None)
            else:
                self.open.setdefault(path, now)
        self.open = {path: since for path, since in self.open.items() if path in listed}
        self._seen = listed
        self._read = {path: state for path, state in self._read.items() if path in listed}
        return whole, news

    def mark_read(self, state: FileState) -> bool:
        """Call after reading; False when the file changed meanwhile and must be read again when it is whole."""
        try:
            unchanged = state_of(state.path, state.kind) in (state, None)
        except MbcError:
            unchanged = True  # what the reader found wrong with it stands
        if unchanged:
            self._read[state.path] = state
        else:
            self._seen.pop(state.path, None)
            self.open.setdefault(state.path, self._wall())
        return unchanged

    def holding(self) -> bool:
        """Whether a file that is being written keeps the watermark from moving."""
        return any(self._wall() - since < LONGEST_HOLD for since in self.open.values())

    def _left_alone(self, state: FileState, now: float) -> bool:
        if "://" in state.path and not state.path.startswith("file://"):
            return True
        return state.size >= 0 and now * 1e9 - state.mtime_ns >= self._settle_ns


def unfinished(path: str) -> bool:
    """Whether the name says that a program is still writing the file."""
    name = PurePosixPath(path).name.lower()
    return name.startswith((".", "_")) or name.endswith(UNFINISHED)


class FileStream:
    """The live source: what :class:`FolderWatch` finds, read, put into order of event time, and handed on.

    Args:
        given: what to watch. rule: how. folder: for what memory should not hold. drain: how it is told to end.
        say: gets a line for people when something is wrong that does not end the stream.
    """

    def __init__(
        self, given: Sequence[str], rule: WatchRule, folder: Path, drain: Drain, say: Callable[[str], None] = print
    ) -> None:
        self._watch, self._rule, self._drain, self._say = FolderWatch(given, rule.poll), rule, drain, say
        self._backlog = Backlog(folder)
        self._queue: deque[FileState] = deque()
        self.counts = SourceCounts()
        self._next_look = 0.0
        self._looked_at: int | None = None
        self._idle_since: float | None = None
        self._last_looks: list[float] | None = None
        self._trouble = ""

    def step(self) -> Step:
        """Look when it is time, read for a moment, or hand on the oldest documents."""
        self.counts.passed = self.counts.watermark  # the pipeline is idle: it has taken in all that was said
        self._look_when_due()
        released: list[tuple[int, Record]] = []
        ended = False
        if self._queue and self._drain.level < 2:
            self._read_for_a_moment()
        elif len(self._backlog) and self._drain.level < 2:
            released = [(one.time, one.record) for one in self._backlog.release(RELEASE_DOCUMENTS, RELEASE_CHARACTERS)]
        else:
            ended = self._ended()
        if released or self._queue:
            self._idle_since = None
        return self._tell(released, ended)

    def _look_when_due(self) -> None:
        now = time.monotonic()
        if self._drain.level == 0 and now >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + self._rule.poll
        elif self._drain.level == 1:
            if self._last_looks is None:
                self._last_looks = [now, now + min(self._rule.poll, self._rule.drain_wait)]
            if self._last_looks and now >= self._last_looks[0]:
                self._last_looks.pop(0)
                self._look()
                if not self._watch.open:
                    self._last_looks = []

    def _look(self) -> None:
        began = round(time.time() * 1e6)
        try:
            whole, news = self._watch.look()
        except MbcError as error:  # the store may be back at the next look
            self._complain(str(error))
            return
        self._trouble = ""
        waiting = {one.path for one in self._queue}
        self._queue.extend(one for one in whole if one.path not in waiting)
        self._looked_at = began
        if news or whole:
            self._idle_since = None

    def _complain(self, what: str) -> None:
        if what != self._trouble:
            self._say(f"{what} Watching goes on.")
        self._trouble = what

    def _read_for_a_moment(self) -> None:
        until = time.monotonic() + _READING
        while self._queue and self._drain.level < 2 and time.monotonic() < until:
            self._read(self._queue.popleft())

    def _read(self, state: FileState) -> None:
        """One file into the backlog; nothing of it when it changed while it was read."""
        batch = self._backlog.batch()
        arrived = min(max(state.mtime_ns // 1000, 0), round(time.time() * 1e6))
        for record in _records(state):
            time_of = record.event_time if isinstance(record, Document) else None
            batch.add(arrived if time_of is None else time_of, record)
            if self._drain.level == 2:
                batch.discard()
                self._queue.appendleft(state)
                return
        if self._watch.mark_read(state):
            self._backlog.take(batch)
            self.counts.files += 1
        else:
            batch.discard()

    def _ended(self) -> bool:
        """Nothing is left to do: is that the end?"""
        if self._drain.level == 2 or (self._drain.level == 1 and self._last_looks == []):
            return True
        now = time.monotonic()
        if self._idle_since is None or self._watch.open:
            self._idle_since = now
        elif self._rule.idle_exit is not None and now - self._idle_since >= self._rule.idle_exit:
            return True
        due = self._next_look if self._drain.level == 0 else (self._last_looks or [now])[0]
        time.sleep(min(max(due - now, 0.0), _MOMENT))
        return False

    def _tell(self, released: list[tuple[int, Record]], ended: bool) -> Step:
        """Count, move the watermark, and say so."""
        counts = self.counts
        counts.records += len(released)
        counts.waiting = len(self._backlog)
        counts.open_files = len(self._queue) + len(self._watch.open)
        oldest = self._backlog.oldest
        if oldest is None and not self._watch.holding():
            oldest = self._looked_at
        if oldest is not None and not self._queue:
            counts.watermark = max(oldest, counts.watermark if counts.watermark is not None else oldest)
        if ended:
            counts.left = tuple(sorted({*self._watch.open, *(one.path for one in self._queue)}))
            if counts.waiting:
                self._say(f"{counts.waiting:,} records were read and not handed on: the next run reads them again.")
        return Step(released, counts.watermark, ended)


def _records(state: FileState) -> Iterator[Record]:
    for record in read_source(Source(state.path, state.kind)):
        yield record if isinstance(record, Document) else _printable(record)


def _printable(rejected: Rejected) -> Rejected:
    """File names need not be UTF-8, columns must be."""
    source, message = (_utf8(one) for one in (rejected.source, rejected.message))
    doc_id = rejected.doc_id if rejected.doc_id is not None and _utf8(rejected.doc_id) == rejected.doc_id else None
    return dataclasses.replace(rejected, source=source, message=message, doc_id=doc_id)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_watched(given: Iterable[str]) -> None:
    """Refuse what cannot be watched before any work is done.

    Raises:
        UsageError: standard input, a folder that is not there, an unknown store or kind of file.
        StorageError: it cannot be listed.
    """
    for one in given:
        if one == STDIN:
            raise UsageError(
                "standard input cannot be watched",
                value=one,
                cause="--streaming waits for new files, and a pipe has none",
                fix="leave out --streaming, or write files into a folder and name it",
            )
        path = one.removeprefix("file://")
        if "://" in path:
            require_bucket(path)
        elif not Path(fixed_part(path)).exists():
            raise UsageError(
                "the watched folder does not exist",
                value=one,
                cause="a misspelt path",
                fix="make the folder first, or check the path",
            )
        elif Path(path).is_file() and not kind_of(path):
            raise UsageError(
                "the kind of this source is unknown",
                value=one,
                cause=f"it ends in none of {', '.join(KINDS)} (each may be followed by .gz or .zst)",
                fix="rename it, or watch its folder",
            )


def fixed_part(given: str) -> str:
    """The folder that a glob starts from; anything else as it is."""
    path = Path(given)
    if path.exists() or not any(char in given for char in "*?["):
        return given
    fixed = [*path.parts]
    while any(char in part for part in fixed for char in "*?["):
        fixed.pop()
    return str(Path(*fixed)) if fixed else "."
