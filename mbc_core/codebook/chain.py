"""The chain of codebook versions of one bank: which version a window uses, and when the next one is published.

Pure and in memory. The bank stores the versions and the statistics that wait; batch and stream both decide here,
so they decide alike (invariant 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mbc_core.codebook.files import Codebook
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import CodebookUpdate, UpdateRule, update
from mbc_core.errors import UsageError
from mbc_core.windows import DAY, window_order, window_start

MOST_VERSIONS = 64
"""Versions a bank may refer to; past that publishing waits for a migration."""

_LAG_WINDOWS = 2


class CodebookChain:
    """Versions, oldest first, and the statistics that wait for the next one.

    Walk the windows in order; for each, quantize with :meth:`version_for` and hand the statistics to :meth:`add`:

    >>> chain = CodebookChain([codebook0])                                          # doctest: +SKIP
    >>> book = chain.version_for(window)                                            # doctest: +SKIP
    >>> published = chain.add(window, BatchStatistics.of(book, z, quantize(z, book.codewords), keys, passages))
    ...                                                                             # doctest: +SKIP

    Args:
        versions: 0, 1, 2, … without a gap, each the parent of the next.
        pending: (window, statistics) gathered earlier and not yet in any version; what the head already took in
            (its window is not newer than the head's last) is left out.
        window_seconds: length of a window; the lag of two windows is counted in calendar time, gaps or not.
        rule: when and how to update; the default when None.
        most_versions: publish no more than this many versions, version 0 included.

    Raises:
        UsageError: versions that form no chain.
    """

    def __init__(
        self,
        versions: Sequence[Codebook],
        pending: Iterable[tuple[str, BatchStatistics]] = (),
        *,
        window_seconds: int = DAY,
        rule: UpdateRule | None = None,
        most_versions: int = MOST_VERSIONS,
    ) -> None:
        _require_chain(versions)
        self._versions = list(versions)
        self._pending: BatchStatistics | None = None
        self._pending_windows: set[str] = set()
        self._status = "no statistics were added yet"
        self.window_seconds = window_seconds
        self.rule = rule or UpdateRule()
        self.most_versions = most_versions
        for window, statistics in pending:
            self._gather(window, statistics)

    @property
    def versions(self) -> tuple[Codebook, ...]:
        """All versions, oldest first."""
        return tuple(self._versions)

    @property
    def head(self) -> Codebook:
        """The newest version."""
        return self._versions[-1]

    @property
    def pending(self) -> BatchStatistics | None:
        """The sum of the statistics that wait for the next version; None when none do."""
        return self._pending

    @property
    def pending_vectors(self) -> int:
        """Slot vectors that wait for the next version."""
        return 0 if self._pending is None else self._pending.vectors

    @property
    def pending_windows(self) -> tuple[str, ...]:
        """Windows whose statistics wait for the next version, in order."""
        return tuple(sorted(self._pending_windows, key=window_order))

    @property
    def status(self) -> str:
        """What the last :meth:`add` did or why it published nothing, for people."""
        return self._status

    def version_for(self, window: str) -> Codebook:
        """The version that codes of ``window`` are made with, when nothing recorded another choice before.

        The newest version built only from windows at least two windows before ``window``, counted in calendar
        time; the head for ``undated`` and for windows older than the head's last, because waiting would not help.

        Raises:
            UsageError: not the name of a window.
        """
        start, newest = window_start(window), _last_start(self.head)
        if start is None or newest is None or start < newest:
            return self.head
        latest = start - _LAG_WINDOWS * self.window_seconds
        fitting = (book for book in reversed(self._versions) if _precedes(_last_start(book), latest))
        return next(fitting, self._versions[0])

    def add(self, window: str, statistics: BatchStatistics, *, ended: bool = True) -> CodebookUpdate | None:
        """Take in the statistics of ``window``, and publish the next version once enough vectors have gathered.

        Args:
            statistics: gathered under the version the window's codes were made with; several calls for one window
                add up.
            ended: False while more of this window follows (it spans slices): then nothing is published yet.

        Returns:
            The new version with its figures, already the head; None when nothing is published (see ``status``).

        Raises:
            UsageError: not the name of a window, or statistics of another chain.
        """
        pending = self._gather(window, statistics)
        if pending is None:
            return None
        needed, waiting = self.rule.vectors_needed(self.head), pending.vectors
        if not ended:
            self._status = f"window {window} goes on; {waiting} vectors wait"
        elif waiting < needed:
            self._status = f"{waiting} vectors wait; version {self.head.version + 1} needs {needed}"
        elif len(self._versions) >= self.most_versions:
            self._status = (
                f"{waiting} vectors wait: the bank already refers to {len(self._versions)} codebook versions, the most "
                f"allowed. Version {self.head.version} serves on; `mbc migrate` makes room"
            )
        else:
            return self._publish(pending)
        return None

    def _publish(self, pending: BatchStatistics) -> CodebookUpdate:
        result = update(self.head, pending, self.rule, self.pending_windows)
        self._versions.append(result.codebook)
        self._pending, self._pending_windows = None, set()
        self._status = f"published version {result.codebook.version} from {result.vectors} vectors; " + (
            f"its words went {result.step.share:.0%} of the way to their new means"
            if result.step.share
            else "its words stay: held-out passages would not be found better"
        )
        return result

    def _gather(self, window: str, statistics: BatchStatistics) -> BatchStatistics | None:
        """Keep statistics for the next version and return all that wait; None for a window that publishes nothing."""
        carried = statistics.carried_to(self.head)
        start, newest = window_start(window), _last_start(self.head)
        if start is None:
            self._status = "documents without a date publish nothing"
            return None
        if newest is not None and start <= newest:
            self._status = f"window {window} is not newer than {self.head.last_window}, which version "
            self._status += f"{self.head.version} was built from: late windows publish nothing"
            return None
        self._pending = carried if self._pending is None else self._pending + carried
        self._pending_windows.add(window)
        return self._pending


def _last_start(book: Codebook) -> int | None:
    return None if book.last_window is None else window_start(book.last_window)


def _precedes(last: int | None, latest: int) -> bool:
    return last is None or last <= latest


def _require_chain(versions: Sequence[Codebook]) -> None:
    found = [(book.version, book.parent) for book in versions]
    wanted = [(number, number - 1 if number else None) for number in range(len(versions))]
    shapes = {book.codewords.shape for book in versions}
    if not versions or found != wanted or len(shapes) != 1:
        raise UsageError(
            "these codebook versions form no chain",
            value=found,
            cause="a version is missing, doubled, out of order, or of another K or d_c",
            fix="give all versions from 0 to the head, oldest first",
        )
