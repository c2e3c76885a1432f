"""Where the codebook chain comes from and where new versions go: a bank, or memory for pipelines without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mbc_core.bank import Bank, SliceId, register_codebook, save_statistics
from mbc_core.codebook.chain import CodebookChain
from mbc_core.codebook.files import Codebook
from mbc_core.windows import DAY

if TYPE_CHECKING:
    from mbc_core.codebook.statistics import BatchStatistics
    from mbc_core.codebook.update import CodebookUpdate, UpdateRule


class CodebookStore(Protocol):
    """Picklable; asked by one worker at a time, and again with the same answers when a worker is retried."""

    def chain(self) -> CodebookChain:
        """The versions before this slice, and the statistics that wait."""
        ...

    def recorded(self) -> Mapping[str, int]:
        """Window → version already chosen, where part of the window's codes is committed."""
        ...

    def publish(self, update: CodebookUpdate) -> None:
        """Keep a new version; a second call with the same one changes nothing."""
        ...

    def keep(self, window: str, statistics: BatchStatistics) -> str | None:
        """Keep statistics until a version takes them in; returns the file that the ledger must name."""
        ...


@dataclass(frozen=True)
class BankCodebooks:
    """Codebooks of a bank, seen from one slice of one run.

    Attributes:
        bank: opened. slice_id: the slice that publishes. rule: when to publish; the default when None.
    """

    bank: Bank
    slice_id: SliceId
    rule: UpdateRule | None = None

    def chain(self) -> CodebookChain:
        """The bank's chain, without what an interrupted attempt at this slice published."""
        return self.bank.codebooks(self.rule, resuming=self.slice_id.ingest_id, slice_name=self.slice_id.name)

    def recorded(self) -> Mapping[str, int]:
        """What this run's earlier slices (and panes) chose."""
        ledger = self.bank.read("ledger", ["ingest_id", "window", "codebook_version"]).to_pylist()
        mine = [row for row in ledger if row["ingest_id"] == self.slice_id.ingest_id]
        return {row["window"]: row["codebook_version"] for row in mine if row["codebook_version"] is not None}

    def publish(self, update: CodebookUpdate) -> None:
        """Register the version, create-only."""
        register_codebook(
            self.bank, update.codebook, update, ingest_id=self.slice_id.ingest_id, slice_name=self.slice_id.name
        )

    def keep(self, window: str, statistics: BatchStatistics) -> str | None:
        """Write the statistics beside the codebooks; they count once the slice's ledger row names them."""
        return save_statistics(self.bank, self.slice_id.ingest_id, self.slice_id.name, window, statistics)


@dataclass(frozen=True)
class MemoryCodebooks:
    """A chain given as safetensors bytes; nothing is stored. For tests and pipelines that keep codes elsewhere.

    Attributes:
        versions: ``Codebook.to_bytes()`` of every version, oldest first.
        window_seconds: length of a window. rule: when to publish; the default when None.
    """

    versions: Sequence[bytes]
    window_seconds: int = DAY
    rule: UpdateRule | None = None

    def chain(self) -> CodebookChain:
        """A fresh chain of these versions."""
        books = [Codebook.from_bytes(data, "memory") for data in self.versions]
        return CodebookChain(books, window_seconds=self.window_seconds, rule=self.rule)

    def recorded(self) -> Mapping[str, int]:
        """Nothing was chosen before."""
        return {}

    def publish(self, update: CodebookUpdate) -> None:
        """The transform's output carries the version; there is nothing else to do."""

    def keep(self, window: str, statistics: BatchStatistics) -> str | None:
        """Statistics that no version took in are dropped with the pipeline."""
        return None
