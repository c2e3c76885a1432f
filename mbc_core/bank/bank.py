"""The bank: one folder or bucket prefix of Parquet tables under Delta logs, codebooks and adapters.

>>> bank = Bank.open("demo-bank")                                              # doctest: +SKIP
>>> bank.passages().column_names                                               # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from mbc_core.bank import export, inspect, parquet
from mbc_core.bank import verify as verification
from mbc_core.bank.codebooks import check_codebook, load_chain, load_codebook, register_codebook, version_rows
from mbc_core.bank.delta_log import LOADS, create_table, load_table, sorted_files
from mbc_core.bank.replay import ReplayPolicy, load_policy, sampled
from mbc_core.bank.slices import COMPACTED, ingest_of
from mbc_core.bank.storage import Storage, as_storage_error, may_pass
from mbc_core.bank.tombstones import Tombstones, load_tombstones
from mbc_core.bank.visible import VisibleKeys, join_documents, newest_revisions, revision_places, titled, visible_keys
from mbc_core.errors import DamagedFile, IncompatibleBank, StorageError, UsageError
from schemas.manifest import Manifest
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.export import WordDecoder
    from mbc_core.codebook.chain import CodebookChain
    from mbc_core.codebook.files import Codebook
    from mbc_core.codebook.update import UpdateRule
    from mbc_core.memory import Memory, Recalled
    from schemas.results import CompactResult, ForgetResult, InspectResult, VerifiedInspectResult

MANIFEST = "manifest.json"
_READS = 6

Found = TypeVar("Found")
PASSAGE_DOCUMENT_COLUMNS = ["doc_id", "title", "uri"]


@dataclass
class Bank:
    """An open bank. Make one with :meth:`open`, :meth:`create` or :meth:`open_or_create`; pickles to its address.

    Attributes:
        storage: where it lives.
        manifest: what its codes mean.
    """

    storage: Storage
    manifest: Manifest
    _codebooks: dict[int, Codebook] = field(default_factory=dict, init=False, repr=False, compare=False)
    _memory: tuple[int, Memory] | None = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> tuple[Storage, Manifest]:
        return self.storage, self.manifest

    def __setstate__(self, state: tuple[Storage, Manifest]) -> None:
        self.storage, self.manifest = state
        self._codebooks, self._memory = {}, None

    @property
    def uri(self) -> str:
        """Local path or URI of the bank's root."""
        return self.storage.uri

    @classmethod
    def open(cls, uri: str | Path) -> Bank:
        """Open a bank that is there.

        Raises:
            UsageError: nothing is there.
            DamagedFile, IncompatibleBank: its manifest cannot be used.
        """
        storage = Storage(str(uri))
        if not storage.exists(MANIFEST):
            raise UsageError(
                "there is no bank here",
                value=storage.uri,
                cause=f"it holds no {MANIFEST}; the path is wrong, or making the bank was interrupted",
                fix="check --bank, or make a bank with `mbc ingest SOURCE --bank URI`",
            )
        return cls(storage, _read_manifest(storage))

    @classmethod
    def create(cls, uri: str | Path, manifest: Manifest, codebook0: Codebook) -> Bank:
        """Make a new bank. An attempt that was interrupted is finished; of two at once both get the same bank.

        Raises:
            UsageError: a bank is there already (also one of other settings, half made), or the codebook does not fit.
            StorageError: the store is full or may not be written.
        """
        storage = Storage(str(uri))
        if storage.exists(MANIFEST):
            raise UsageError(
                "a bank is here already",
                value=storage.uri,
                cause="it was made earlier",
                fix="open it (ingest adds to it), or name a new place",
            )
        return cls._make(storage, manifest, codebook0)

    @classmethod
    def open_or_create(cls, uri: str | Path, manifest: Manifest, codebook0: Codebook) -> Bank:
        """Open the bank, which must have been made with ``manifest``'s settings, or make it.

        Raises:
            UsageError: it was made with another encoder, profile, rotation, lexicon or window length.
        """
        storage = Storage(str(uri))
        bank = cls.open(uri) if storage.exists(MANIFEST) else cls._make(storage, manifest, codebook0)
        bank.manifest.require_same(manifest, storage.uri)
        return bank

    @classmethod
    def _make(cls, storage: Storage, manifest: Manifest, codebook0: Codebook) -> Bank:
        check_codebook(manifest, codebook0)
        # On every store only one process writes version 0 of a Delta log, so the ledger's first description decides
        # whose manifest counts when two make the bank at once. manifest.json comes last: a bank that has it is whole.
        create_table(storage, "ledger", manifest.to_json())
        agreed = load_table(storage, "ledger", 0).metadata().description or ""
        bank = cls(storage, Manifest.from_json(agreed, storage.locate("ledger")))
        bank.manifest.require_same(manifest, storage.uri)
        for name in TABLES:
            create_table(storage, name, "")
        register_codebook(bank, codebook0)
        storage.write_new(MANIFEST, agreed.encode())
        return bank

    def table(self, name: str, version: int | None = None) -> DeltaTable:
        """The Delta table ``name``, at its newest version, or at an older one while its log is kept.

        Raises:
            IncompatibleBank: its columns are not those of this release.
            StorageError: it cannot be read.
        """
        delta = load_table(self.storage, name, version)
        found, expected = pa.schema(delta.schema()), TABLES[name]
        if not found.equals(expected):
            raise IncompatibleBank(
                f"the table `{name}` has other columns than this release reads and writes",
                value=sorted({str(one) for one in found} ^ {str(one) for one in expected})[:6],
                cause="another release or another program changed it",
                fix="use the release that wrote the bank, or ingest again into a new bank",
            )
        return delta

    def look(self, name: str, ask: Callable[[DeltaTable], Found]) -> Found:
        """What ``ask`` finds in the table ``name`` as it is now.

        deltalake reads parts of a log only when they are asked for; when it was cut short meanwhile (`mbc forget`),
        the table is loaded again.
        """
        for attempt in range(LOADS):
            delta = self.table(name)
            try:
                return ask(delta)
            except DeltaError as error:
                if attempt == LOADS - 1 or not may_pass(error):
                    raise as_storage_error(error, "read the log of the table", self.storage.locate(name)) from error
                time.sleep(0.02 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def files(self, table: str) -> list[tuple[str, int]]:
        """(path below the table's folder, bytes) of every file that counts, sorted by path."""
        return self.look(table, sorted_files)

    def read_file(self, table: str, path: str, columns: list[str] | None = None) -> pa.Table:
        """One file of a table, its digest checked.

        Raises:
            DamagedFile: it is missing, or does not match the digest in its name.
        """
        full = f"{table}/{path}"
        try:
            data = self.storage.read_bytes(full)
        except StorageError as error:
            if self.storage.exists(full):
                raise
            raise DamagedFile(
                f"the bank's file {self.storage.locate(full)} is missing",
                cause=f"the log of `{table}` names it, but it was removed",
                fix="restore the file from a copy of the bank; `mbc inspect --verify` lists every missing file",
            ) from error
        parquet.check_digest(data, path.removesuffix(".parquet").rsplit("-", 1)[-1], self.storage.locate(full))
        return parquet.from_bytes(data, self.storage.locate(full), columns, schema=TABLES[table])

    def read(self, table: str, columns: list[str] | None = None, keep: Callable[[str], bool] | None = None) -> pa.Table:
        """All rows of a table, digests checked; ``keep`` may choose files by their path.

        When files are replaced meanwhile (`mbc compact`, `mbc forget`), the table is read again.
        """
        schema = TABLES[table]
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])

        for attempt in range(_READS):
            version, files = self.look(table, lambda delta: (delta.version(), sorted_files(delta)))
            try:
                parts = [self.read_file(table, path, columns) for path, _ in files if keep is None or keep(path)]
                return pa.concat_tables([wanted.empty_table(), *parts])
            except (DamagedFile, StorageError):
                if attempt == _READS - 1 or self.table(table).version() == version:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def steady(self, read: Callable[[], Found], *tables: str) -> Found:
        """``read`` once more when it failed and a table was changed meanwhile: what it saw did not belong together."""
        for _ in range(_READS):
            before = [self.table(name).version() for name in tables]
            try:
                return read()
            except (DamagedFile, StorageError):
                if before == [self.table(name).version() for name in tables]:
                    raise
        return read()

    def codebook(self, version: int, rows: Mapping[int, dict[str, Any]] | None = None) -> Codebook:
        """One codebook version, its digest checked; kept in memory, since versions never change.

        Args:
            rows: of :func:`version_rows`, for those who ask for many and have read them.

        Raises:
            DamagedFile: no such version, or its file is damaged.
        """
        if version not in self._codebooks:
            rows = version_rows(self) if rows is None else rows
            if version not in rows:
                raise DamagedFile(
                    "codes name a codebook version that the bank does not hold",
                    value=version,
                    cause=f"versions 0 to {max(rows)} are registered; rows of codebook_versions were removed",
                    fix="restore the table codebook_versions from a copy of the bank",
                )
            self._codebooks[version] = load_codebook(self, rows[version])
        return self._codebooks[version]

    def codebooks(
        self, rule: UpdateRule | None = None, resuming: str | None = None, slice_name: str | None = None
    ) -> CodebookChain:
        """All codebook versions and the statistics that wait for the next one.

        Args:
            rule: when and how the next version is made; the default rule when None.
            resuming: an ingest id whose unfinished slice must decide as if it had published nothing yet.
            slice_name: the slice of that ingest that asks; its own statistics do not wait.
        """
        return self.steady(lambda: load_chain(self, rule, resuming, slice_name), "ledger", "codebook_versions")

    def visible(self, ignore_ingest: str | None = None) -> VisibleKeys:
        """The newest visible revision of every document, for judging what is new.

        Args:
            ignore_ingest: leave out what this ingest added, so that its rerun plans exactly as the first time.
        """
        return self.steady(lambda: self._visible(ignore_ingest), "codes")

    def _visible(self, ignore_ingest: str | None) -> VisibleKeys:
        columns = ["key", "added_at"]
        if ignore_ingest is None:
            codes = self.read("codes", columns)
        else:
            codes = self.read("codes", columns, lambda path: ingest_of(path) not in (ignore_ingest, COMPACTED))
            together = self.read("codes", columns, lambda path: ingest_of(path) == COMPACTED)
            mine = np.isin(together["added_at"].cast(pa.int64()).to_numpy(), self.moments_of(ignore_ingest))
            codes = pa.concat_tables([codes, together.filter(pa.array(~mine))])
        found = visible_keys(codes, lambda: self.read("documents", ["key", "added_at", "content_hash"]))
        return found.with_tombstones(self.tombstones())

    def moments_of(self, ingest_id: str) -> npt.NDArray[np.int64]:
        """``added_at`` of every slice that this ingest has added, microseconds: int64 [slices], ascending."""
        ledger = self.read("ledger", ["ingest_id", "added_at"])
        return np.unique(
            ledger.filter(pc.equal(ledger["ingest_id"], ingest_id))["added_at"].cast(pa.int64()).to_numpy()
        )

    def tombstones(self) -> Tombstones:
        """The documents that are to stay forgotten, by hashes of their keys."""
        return load_tombstones(self)

    def passages(self, as_of: int | None = None) -> pa.Table:
        """The passages of every document's newest revision, with their document's id, title and uri.

        Args:
            as_of: microseconds since the epoch: only what had been added by then. None: now.

        Returns:
            The columns of ``schemas.tables.CODES`` and ``doc_id, title, uri``, sorted by (key, passage). A document
            without a title has its id as title.
        """
        return self.steady(lambda: self._passages(as_of), "codes")

    def _passages(self, as_of: int | None) -> pa.Table:
        codes = self.read("codes")
        codes = codes.filter(pa.array(newest_revisions(codes, as_of)))
        codes = codes.sort_by([("key", "ascending"), ("passage", "ascending")])
        documents = titled(self.read("documents", ["key", "added_at", *PASSAGE_DOCUMENT_COLUMNS]))
        return join_documents(codes, documents, PASSAGE_DOCUMENT_COLUMNS, self.uri)

    def replay(self, as_of: int | None = None) -> pa.Table:
        """The sample of questions and answers that adaptation asks: the columns of ``schemas.tables.REPLAY``.

        Of documents' newest revisions, not expired, and no more of a window than the bank's policy says; see
        :mod:`mbc_core.bank.replay`.

        Args:
            as_of: microseconds since the epoch: as it was then. None: now.
        """
        rows = self.read("replay")  # codes last: rows that a revision has no more of are left out
        codes = self.read("codes", ["key", "added_at"])
        return rows.filter(pa.array(sampled(rows, codes, self.replay_policy(), as_of)))

    def replay_policy(self) -> ReplayPolicy:
        """How many questions a window keeps, and for how long."""
        return load_policy(self)

    def documents(self, keys: Iterable[int] | None = None) -> Mapping[int, dict[str, object]]:
        """Key → the columns of ``schemas.tables.DOCUMENTS`` of its newest visible revision; all keys when None."""
        codes = self.read("codes", ["key", "added_at"])
        codes = codes.filter(pa.array(newest_revisions(codes)))
        if keys is not None:
            codes = codes.filter(pc.is_in(codes["key"], pa.array(set(keys), pa.int64())))
        found = titled(self.read("documents"))
        place = np.unique(revision_places(codes, found))
        return {row["key"]: row for row in found.take(pa.array(place[place >= 0], pa.int64())).to_pylist()}

    def recall(self, question: str, k: int = 5) -> list[Recalled]:
        """The ``k`` passages that answer best by their codes, best first, with the words the bank kept of them.

        The encoder and the index are loaded at the first call and kept; the index is made again once the bank has
        grown. For another encoder, many questions at once or an earlier moment: :class:`mbc_core.memory.Memory`.

        Raises:
            IncompatibleBank: the bank was made with other pieces than this release's.
        """
        from mbc_core.memory import Memory  # brings torch, which a bank does not need

        version, kept = self.table("codes").version(), self._memory
        if kept is None or kept[0] != version:
            kept = (version, Memory.open(self, kept[1].encoder if kept is not None else None))
            self._memory = kept
        return kept[1].recall([question], k)[0]

    def inspect(self, verify: bool = False) -> InspectResult | VerifiedInspectResult:
        """What ``mbc inspect --json`` prints; with ``verify`` every file, digest, count and link is checked."""
        return verification.verify(self) if verify else inspect.inspect(self)

    def forget(self, doc_ids: Iterable[str], say: Callable[[str], None] | None = None) -> ForgetResult:
        """Remove documents for good; see :func:`mbc_core.bank.forget.forget`."""
        from mbc_core.bank.forget import forget

        return forget(self, doc_ids, say)

    def compact(self, history: float = 30 * 86_400.0, say: Callable[[str], None] | None = None) -> CompactResult:
        """Merge small files, drop what is superseded for longer than ``history`` seconds, and sweep; see
        :func:`mbc_core.bank.compact.compact`."""
        from mbc_core.bank.compact import compact

        return compact(self, history=history, say=say)

    def export(
        self,
        out: Path | BinaryIO,
        format: Literal["parquet", "jsonl"] = "parquet",
        lexicon: WordDecoder | None = None,
        as_of: int | None = None,
    ) -> int:
        """Write every passage decoded; see :func:`mbc_core.bank.export.export`."""
        return export.export(self, out, format, lexicon, as_of)


def _read_manifest(storage: Storage) -> Manifest:
    where = storage.locate(MANIFEST)
    try:
        text = storage.read_bytes(MANIFEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(
            f"the bank's manifest {where} cannot be read",
            cause="it is not UTF-8",
            fix="restore manifest.json from a copy; without it the codes have no meaning",
        ) from error
    return Manifest.from_json(text, where)
