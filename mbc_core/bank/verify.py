"""Whether everything a bank says about itself is true: `mbc inspect --verify`.

Every check yields lines for people; a line names the file (or the row of the ledger), what is wrong with it and the
fix. Files that nothing refers to are no fault: interrupted runs leave them, and nothing reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank import parquet
from mbc_core.bank.codebooks import load_codebook, version_rows
from mbc_core.bank.inspect import committed_dead_letters, inspect, nothing
from mbc_core.bank.rewrite import removed_rows
from mbc_core.bank.tombstones import load_tombstones
from mbc_core.bank.visible import HASH_BYTES, revision_places
from mbc_core.codebook.chain import MOST_VERSIONS
from mbc_core.codes import code_size
from mbc_core.errors import MbcError
from mbc_core.windows import window_order, window_start
from schemas.document import document_key
from schemas.results import VerifiedInspectResult
from schemas.tables import TABLES, UNDATED

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.bank.export import WordDecoder

RESTORE = "restore the file from a copy of the bank, or ingest its documents again into a new bank"
_RESTORE_TABLE = "restore the table from a copy of the bank"
_REPORT = "no command does this: report it with this line, and restore the bank from a copy"
_SHOWN = 5


def verify(bank: Bank, lexicon: WordDecoder | None = None) -> VerifiedInspectResult:
    """:func:`~mbc_core.bank.inspect.inspect`, then every check of this module; each fault is one line of ``problems``.

    A bank so damaged that it cannot be inspected has zero counts and names the fault.

    Args:
        lexicon: decodes the words; the release's own when None. Words of another lexicon are not decoded, which
            ``information`` says.
    """
    checks = _Checks(bank, lexicon)
    problems = list(dict.fromkeys(checks.run()))
    try:
        found = inspect(bank)
    except MbcError as error:
        problems = list(dict.fromkeys([*problems, str(error)]))
        found = nothing(bank)
    return {**found, "ok": not problems, "problems": problems, "information": checks.information}


def _line(thing: str, *, cause: str, fix: str) -> str:
    return str(MbcError(thing, cause=cause, fix=fix))


@dataclass
class _Checks:
    """One pass over a bank. ``information`` gathers what is worth knowing and no fault."""

    bank: Bank
    lexicon: WordDecoder | None
    information: list[str] = field(default_factory=list)

    def run(self) -> Iterator[str]:
        """Every fault, a line each; a check that cannot go on is a fault, and the next one is made."""
        checks = (
            self.files(),
            self.codebooks(),
            self.statistics(),
            self.codes(),
            self.documents(),
            self.ledger(),
            self.tombstones(),
            self.adapters(),
            self.leftovers(),
        )
        for check in checks:
            try:
                yield from check
            except MbcError as error:
                yield str(error)

    def where(self, table: str, path: str) -> str:
        """Full name of a table's file."""
        return self.bank.storage.locate(f"{table}/{path}")

    # ---------------------------------------------------------------------------------------------------------- files

    def files(self) -> Iterator[str]:
        """Every file that a log names: there, of the right size, of the right digest, readable, with all its rows."""
        for table in TABLES:
            try:
                actions = pa.table(self.bank.table(table).get_add_actions(flatten=True))
            except MbcError as error:
                yield str(error)
                continue
            for row in actions.select(["path", "size_bytes", "num_records"]).to_pylist():
                yield from self._file(table, row)

    def _file(self, table: str, told: dict[str, Any]) -> Iterator[str]:
        path, where = told["path"], self.where(table, told["path"])
        size = self.bank.storage.size(f"{table}/{path}")
        if size is not None and size != told["size_bytes"]:
            yield _line(
                f"{where} has {size} bytes; the log of `{table}` recorded {told['size_bytes']}",
                cause="it was cut short or replaced",
                fix=RESTORE,
            )
        try:
            rows = self.bank.read_file(table, path)
        except MbcError as error:
            yield str(error)
            return
        if told["num_records"] not in (None, rows.num_rows):
            yield _line(
                f"{where} holds {rows.num_rows} rows; the log of `{table}` recorded {told['num_records']}",
                cause="another program wrote the file or the log",
                fix=_RESTORE_TABLE,
            )

    # ------------------------------------------------------------------------------------------------------ codebooks

    def codebooks(self) -> Iterator[str]:
        """Every registered version can be read and is what its row says; every version in use is registered."""
        rows = version_rows(self.bank)
        for row in rows.values():
            try:
                codebook = load_codebook(self.bank, row)
            except MbcError as error:
                yield str(error)
                continue
            if (codebook.version, codebook.parent) != (row["version"], row["parent"]):
                yield _line(
                    f"the file {self.bank.storage.locate(row['file'])} of codebook version {row['version']} says it is"
                    f" version {codebook.version}",
                    cause="a row of codebook_versions names another version's file",
                    fix=_RESTORE_TABLE.replace("the table", "the table codebook_versions"),
                )
        used = set(self.bank.read("codes", ["codebook_version"])["codebook_version"].to_pylist())
        chosen = set(self.bank.read("ledger", ["codebook_version"])["codebook_version"].drop_null().to_pylist())
        for table, versions in (("codes", used), ("the ledger", chosen)):
            for version in sorted(versions - set(rows)):
                yield _line(
                    f"{table} name codebook version {version}, which is not registered",
                    cause="rows of codebook_versions were removed, or the tables are of two banks",
                    fix="restore the table codebook_versions from a copy of the bank",
                )
        if len(used) > MOST_VERSIONS:
            yield _line(
                f"codes name {len(used)} codebook versions; at most {MOST_VERSIONS} may be referenced",
                cause="another program published versions",
                fix="make a new bank with `mbc migrate`",
            )
        if len(rows) >= MOST_VERSIONS:
            self.information.append(
                f"{len(rows)} codebook versions are used up: the codebook learns no more until `mbc migrate` makes a"
                " new bank from this one."
            )

    def statistics(self) -> Iterator[str]:
        """Every file of codebook statistics that waits for the next version is there and whole."""
        from mbc_core.codebook.statistics import BatchStatistics

        rows = version_rows(self.bank)
        last = self.bank.codebook(max(rows)).last_window
        ledger = self.bank.read("ledger", ["ingest_id", "slice", "window", "statistics"])
        for row in ledger.filter(ledger["statistics"].is_valid()).to_pylist():
            folded = last is not None and window_order(row["window"]) <= window_order(last)
            path, where = row["statistics"], self.bank.storage.locate(row["statistics"])
            if row["window"] == UNDATED or not self.bank.storage.exists(path):
                if row["window"] != UNDATED and not folded:
                    yield _line(
                        f"the statistics {where} of window {row['window']} in {row['ingest_id']}/{row['slice']} are"
                        " missing",
                        cause="they were removed; the next codebook version would not learn from that window",
                        fix=RESTORE.split(",", maxsplit=1)[0],
                    )
                continue
            try:
                data = self.bank.storage.read_bytes(path)
                parquet.check_digest(data, path.removesuffix(".safetensors").rsplit("-", 1)[-1], where)
                BatchStatistics.from_bytes(data, where)
            except MbcError as error:
                yield str(error)

    # ---------------------------------------------------------------------------------------------------------- codes

    def codes(self) -> Iterator[str]:
        """Payloads of every file, then of all files together: no passage twice, none missing."""
        lexicon = self._lexicon()
        parts = []
        for path, _ in self.bank.files("codes"):
            try:
                rows = self.bank.read_file("codes", path)
            except MbcError:
                continue  # named by the check of files
            yield from self._payloads(path, rows, lexicon)
            parts.append(rows.select(["key", "passage", "added_at"]))
        if parts and (codes := pa.concat_tables(parts)).num_rows:
            yield from _whole_documents(codes)

    def _lexicon(self) -> WordDecoder | None:
        if not self.bank.manifest.words or self.lexicon is not None:
            return self.lexicon
        from mbc_core import defaults

        try:
            return defaults.lexicon_for(self.bank.manifest)
        except MbcError as error:
            self.information.append(f"The words were not decoded, only measured: {error}")
            return None

    def _payloads(self, path: str, rows: pa.Table, lexicon: WordDecoder | None) -> Iterator[str]:
        manifest, where = self.bank.manifest, self.where("codes", path)
        size = code_size(manifest.slots)
        if count := pc.sum(pc.not_equal(pc.binary_length(rows["address"]), size)).as_py():
            yield _line(f"{count} addresses do not have {size} bytes in {where}", cause="a foreign writer", fix=RESTORE)
        if count := pc.sum(pc.greater(pc.binary_length(rows["words"]), 2 * manifest.words)).as_py():
            yield _line(
                f"{count} passages have a broken word payload (at most {2 * manifest.words} bytes) in {where}",
                cause="a foreign writer, or another profile's rows",
                fix=RESTORE,
            )
        if lexicon is not None and (count := sum(not _readable(lexicon, one) for one in rows["words"].to_pylist())):
            yield _line(
                f"the words of {count} passages cannot be decoded in {where}",
                cause="they were written with another lexicon, or damaged before the file was written",
                fix=RESTORE,
            )
        if count := _misplaced(rows, manifest.window_seconds):
            yield _line(
                f"{count} passages are in another window than their time says in {where}",
                cause="the rows were written with another window length",
                fix=RESTORE,
            )

    # ------------------------------------------------------------------------------------------------------ documents

    def documents(self) -> Iterator[str]:
        """Each revision in codes has a row in documents, whose key is that of its id."""
        codes = self.bank.read("codes", ["key", "added_at"])
        documents = self.bank.read("documents", ["key", "added_at", "doc_id", "content_hash"])
        if missing := int((revision_places(codes, documents) < 0).sum()):
            yield _line(
                f"{missing} rows of codes have no row in documents",
                cause=f"files of {self.bank.storage.locate('documents')} or rows of its log were removed",
                fix=_RESTORE_TABLE.replace("the table", "the table documents"),
            )
        salt = self.bank.manifest.salt
        pairs = zip(documents["key"].to_pylist(), documents["doc_id"].to_pylist(), strict=True)
        if wrong := sum(document_key(doc_id, salt) != key for key, doc_id in pairs):
            yield _line(
                f"{wrong} rows of {self.bank.storage.locate('documents')} have another key than their id gives",
                cause="manifest.json was replaced: the salt in it keys the documents",
                fix="restore manifest.json from a copy of the bank",
            )
        sizes = pc.not_equal(pc.binary_length(documents["content_hash"]), HASH_BYTES)
        if count := pc.sum(sizes).as_py():
            yield _line(
                f"{count} content hashes of {self.bank.storage.locate('documents')} do not have {HASH_BYTES} bytes",
                cause="a foreign writer",
                fix=RESTORE,
            )

    # --------------------------------------------------------------------------------------------------------- ledger

    def ledger(self) -> Iterator[str]:
        """Each row of the ledger adds up, and the tables hold what the commits say."""
        ledger = self.bank.read("ledger")
        rows = ledger.to_pylist()
        yield from _sums(rows)
        codes = self.bank.read("codes", ["key", "added_at"])
        stored, stamps = codes["added_at"].cast(pa.int64()).to_numpy(), ledger["added_at"].cast(pa.int64()).to_numpy()
        if unknown := len(np.setdiff1d(stored, stamps)):
            yield _line(
                f"{unknown} slices are in codes but not in the ledger",
                cause="the run that added them was interrupted between its last two commits",
                fix="run it again with the same ingest id",
            )
        yield from self._commits(rows, stamps, codes, stored)
        yield from self._letters(rows)

    def _commits(
        self, rows: list[dict[str, Any]], stamps: npt.NDArray[np.int64], codes: pa.Table, stored: npt.NDArray[np.int64]
    ) -> Iterator[str]:
        """Documents and passages of every commit; what was compacted or forgotten since may be fewer."""
        removed = removed_rows(self.bank)
        order = np.lexsort((codes["key"].to_numpy(), stored))
        moments, keys = stored[order], codes["key"].to_numpy()[order]
        for stamp in np.unique(stamps).tolist():
            mine = [row for row, moment in zip(rows, stamps.tolist(), strict=True) if moment == stamp]
            start, end = np.searchsorted(moments, [stamp, stamp + 1])
            found = {"passages": int(end - start), "documents": len(np.unique(keys[start:end]))}
            gone = removed.get(stamp, 0)
            for what, count in found.items():
                told = sum(row[what] for row in mine)
                if not told - gone <= count <= told:
                    yield _line(
                        f"the ledger says that slice {mine[0]['slice']} added {told} {what}; codes hold {count}"
                        f" (ingest {mine[0]['ingest_id']})",
                        cause="files or rows of the logs of codes or ledger were removed or added by hand",
                        fix="restore the tables codes and ledger from one copy of the bank",
                    )

    def _letters(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        told: dict[str, int] = {}
        for row in rows:
            letters = sum(json.loads(row["dead_letters"] or "{}").values())
            told[row["ingest_id"]] = told.get(row["ingest_id"], 0) + letters
        stored = committed_dead_letters(self.bank)["ingest_id"].to_pylist()
        for ingest_id, count in told.items():
            if (found := stored.count(ingest_id)) != count:
                yield _line(
                    f"the ledger says that ingest {ingest_id} has {count} dead letters; the table dead_letter holds"
                    f" {found}",
                    cause="files or rows of the log of dead_letter were removed or added by hand",
                    fix="restore the tables dead_letter and ledger from one copy of the bank",
                )

    # ------------------------------------------------------------------------------------------- forgotten, adapters

    def tombstones(self) -> Iterator[str]:
        """Nothing of a forgotten document is in any table, and every forgetting came to its end."""
        from mbc_core.bank.forget import unfinished

        stones = load_tombstones(self.bank)
        for path in unfinished(self.bank):
            yield _line(
                f"forgetting the documents of {self.bank.storage.locate(path)} was interrupted",
                cause="the run died before its receipt was written",
                fix="run the same `mbc forget` again",
            )
        for table in ("codes", "documents", "replay", "dead_letter"):
            keys = self.bank.read(table, ["key"])["key"].drop_null().to_numpy()
            if count := int(stones.forgotten(keys).sum()):
                yield _line(
                    f"{count} rows of {self.bank.storage.locate(table)} belong to forgotten documents",
                    cause="a copy of older files was put back, or another program wrote to the bank",
                    fix="run `mbc forget` with their ids again",
                )

    def adapters(self) -> Iterator[str]:
        """Every adapter's files match their card; the live ones are there; every canary set matches its digest."""
        from mbc_core import canary
        from mbc_core.adapters import AdapterRegistry

        yield from AdapterRegistry(self.bank).problems()
        yield from canary.problems(self.bank)

    def leftovers(self) -> Iterator[str]:
        """Files that nothing refers to: information, no fault."""
        from mbc_core.bank.sweep import unreferenced

        try:
            left = unreferenced(self.bank)
        except MbcError:
            return  # a log that cannot be read was named above
        if left:
            names = ", ".join(one.path for one in left[:_SHOWN])
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            self.information.append(
                f"{len(left)} files of {sum(one.size for one in left)} bytes belong to nothing: interrupted runs left"
                f" them, or what they held was written anew. Nothing reads them; `mbc compact` deletes them: {names}"
                f"{more}"
            )
        yield from ()


def _whole_documents(codes: pa.Table) -> Iterator[str]:
    passages = codes.group_by(["key", "added_at"], use_threads=False).aggregate(
        [("passage", "count"), ("passage", "count_distinct"), ("passage", "min"), ("passage", "max")]
    )
    counts, distinct = passages["passage_count"].to_numpy(), passages["passage_count_distinct"].to_numpy()
    if twice := int((counts - distinct).sum()):
        yield _line(
            f"{twice} passages are there twice in codes", cause="a file was committed twice by hand", fix=_REPORT
        )
    lowest, highest = passages["passage_min"].to_numpy(), passages["passage_max"].to_numpy()
    if partial := int(((lowest != 0) | (highest + 1 != distinct)).sum()):
        yield _line(
            f"{partial} documents lack a passage in codes",
            cause="a file of codes, or its entry in the log, was removed",
            fix="restore the table codes from a copy of the bank, or ingest those documents again with another content",
        )


def _readable(lexicon: WordDecoder, stored: bytes) -> bool:
    try:
        lexicon.read(stored)
    except (MbcError, ValueError, KeyError, IndexError):
        return False
    return True


def _misplaced(rows: pa.Table, seconds: int) -> int:
    """Rows whose time is not in their window."""
    dated = rows.filter(rows["event_time"].is_valid())
    if not dated.num_rows:
        return 0
    windows = dated["window"].combine_chunks().dictionary_encode()
    starts = []
    for name in windows.dictionary.to_pylist():
        try:
            starts.append(window_start(name))
        except MbcError:
            starts.append(None)
    start = np.array([-1 if one is None else one * 1_000_000 for one in starts], np.int64)
    known = np.array([one is not None for one in starts], bool)
    place = windows.indices.to_numpy(zero_copy_only=False)
    times = dated["event_time"].cast(pa.int64()).to_numpy()
    inside = (times >= start[place]) & (times < start[place] + seconds * 1_000_000)
    return int((~(inside & known[place])).sum())


def _sums(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Documents in = ingested + duplicates + replaced + dead letters, in each row."""
    for row in rows:
        letters = sum(json.loads(row["dead_letters"] or "{}").values())
        out = row["documents"] + row["duplicates"] + row["replaced"] + letters
        if out != row["documents_in"]:
            yield _line(
                f"ledger row {row['ingest_id']}/{row['slice']} window {row['window']}: {row['documents_in']} documents"
                f" in, but {out} accounted for",
                cause="the row was written by another program, or by a defect of this one",
                fix="compare with the sources of that run; restore the table ledger from a copy of the bank",
            )
