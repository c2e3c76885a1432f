"""The codebook of a stream: which version a window uses, what is learned from it, and when a version is published.

The same chain decides as in batch (``mbc_core.codebook.chain``). Here it lives as long as the stream, is asked for
one window after the other, and follows what other runs publish in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterable

from mbc_core.bank import Bank, SliceId, drop_folded_statistics
from mbc_core.codebook.chain import CodebookChain
from mbc_core.codebook.files import Codebook
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codebook.update import UpdateRule
from mbc_core.errors import LostRace
from pipelines.codebook_store import BankCodebooks

_TABLE = "codebook_versions"
_ATTEMPTS = 5


class LiveCodebooks:
    """The chain of a bank, as one ingest that streams into it sees it. One thread at a time.

    Args:
        bank: opened. ingest_id: versions that an interrupted run under this name published for windows it never
            finished are decided again. rule: when to publish; the default when None.
    """

    def __init__(self, bank: Bank, ingest_id: str, rule: UpdateRule | None = None) -> None:
        self._bank, self._ingest_id, self._rule = bank, ingest_id, rule
        self._chain: CodebookChain
        self._chosen: dict[str, int] = {}
        self._follow(ingest_id)
        self._folded: str | None = None

    def version_for(self, window: str) -> Codebook:
        """The version that codes of ``window`` are made with: the one its first commit recorded, if there was one."""
        if self._version_of(_TABLE) != self._table_version:
            self._follow(self._ingest_id)
        known = self._chosen.get(window)
        if known is None:
            return self._chain.version_for(window)
        return self._bank.codebook(known)

    def learn(self, slice_id: SliceId, window: str, statistics: BatchStatistics) -> str | None:
        """Take in what a window showed, before it is committed; publish a version when enough has gathered.

        Args:
            slice_id: the commit that is being made. window: its window.
            statistics: of new documents only, under the version of :meth:`version_for`.

        Returns:
            The file that the commit's ledger row must name, while no version has taken the statistics in.

        Raises:
            LostRace: other runs published first every time. StorageError: the store refused.
        """
        store = self._store(slice_id.name, slice_id.pane)
        for attempt in range(_ATTEMPTS):
            update = self._chain.add(window, statistics)
            if update is None:
                return self._keep(store, window, statistics)
            if self._behind:
                self._follow(self._ingest_id)  # others have shown something too: it belongs into this version
                continue
            try:
                store.publish(update)
            except LostRace:
                if attempt == _ATTEMPTS - 1:
                    raise
                # Another run was faster, or this one published before it died and saw the window otherwise then:
                # go on from the version that is there.
                self._follow(resuming=None)
            else:
                self._table_version = self._version_of(_TABLE)
                return None
        raise AssertionError("the loop ends by a return or a raise")

    def committed(self, window: str, version: int | None) -> None:
        """Remember the choice of a committed window, and drop statistics files that a version has taken in."""
        if version is not None:
            self._chosen.setdefault(window, version)
        before, self._ledger_version = self._ledger_version, self._version_of("ledger")
        self._behind |= self._ledger_version != before + 1
        last = self._chain.head.last_window
        if last != self._folded:
            drop_folded_statistics(self._bank, last)
            self._folded = last

    def doubt(self) -> None:
        """A commit failed after its window was learned from: take the chain from the bank before the next window."""
        self._table_version = -1

    @property
    def versions(self) -> Iterable[Codebook]:
        """All versions, oldest first."""
        return self._chain.versions

    def _keep(self, store: BankCodebooks, window: str, statistics: BatchStatistics) -> str | None:
        waits = window in self._chain.pending_windows
        return store.keep(window, statistics) if waits else None

    def _follow(self, resuming: str | None) -> None:
        """Take the chain as the bank has it now; what this ingest has committed is in it."""
        self._table_version, self._ledger_version = self._version_of(_TABLE), self._version_of("ledger")
        self._chain, self._behind = self._bank.codebooks(self._rule, resuming=resuming), False
        self._chosen.update(self._store("all", 0).recorded())

    def _version_of(self, table: str) -> int:
        return int(self._bank.table(table).version())

    def _store(self, name: str, pane: int) -> BankCodebooks:
        return BankCodebooks(self._bank, SliceId(self._ingest_id, name, pane, 0), self._rule)
