"""Whether everything a bank says about itself is true: `mbc inspect --verify`.

Every check yields lines for people; a line names the file (or the row of the ledger), what is wrong with it and the
fix. Files that nothing refers to are no fault: interrupted runs leave them, and nothing reads them. What the rows of
codes, documents and ledger say is checked in :mod:`mbc_core.bank.verify_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mbc_core.bank import parquet
from mbc_core.bank.codebooks import load_codebook, version_rows
from mbc_core.bank.inspect import inspect, nothing
from mbc_core.bank.tombstones import load_tombstones
from mbc_core.bank.verify_rows import RESTORE, RESTORE_TABLE, code_faults, document_faults, ledger_faults, line
from mbc_core.codebook.chain import MOST_VERSIONS
from mbc_core.errors import MbcError
from mbc_core.windows import window_order
from schemas.results import VerifiedInspectResult
from schemas.tables import TABLES, UNDATED

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.bank.export import WordDecoder

_SHOWN = 5


def verify(bank: Bank, lexicon: WordDecoder | None = None) -> VerifiedInspectResult:
    """:func:`~mbc_core.bank.inspect.inspect`, then every check; each fault is one line of ``problems``.

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
            document_faults(self.bank),
            ledger_faults(self.bank),
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
            yield line(
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
            yield line(
                f"{where} holds {rows.num_rows} rows; the log of `{table}` recorded {told['num_records']}",
                cause="another program wrote the file or the log",
                fix=RESTORE_TABLE,
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
                yield line(
                    f"the file {self.bank.storage.locate(row['file'])} of codebook version {row['version']} says it is"
                    f" version {codebook.version}",
                    cause="a row of codebook_versions names another version's file",
                    fix=RESTORE_TABLE.replace("the table", "the table codebook_versions"),
                )
        used = set(self.bank.read("codes", ["codebook_version"])["codebook_version"].to_pylist())
        chosen = set(self.bank.read("ledger", ["codebook_version"])["codebook_version"].drop_null().to_pylist())
        for table, versions in (("codes", used), ("the ledger", chosen)):
            for version in sorted(versions - set(rows)):
                yield line(
                    f"{table} name codebook version {version}, which is not registered",
                    cause="rows of codebook_versions were removed, or the tables are of two banks",
                    fix="restore the table codebook_versions from a copy of the bank",
                )
        if len(used) > MOST_VERSIONS:
            yield line(
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
                    yield line(
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
        """The rows of codes, their words decoded where that is possible."""
        yield from code_faults(self.bank, self._lexicon())

    def _lexicon(self) -> WordDecoder | None:
        if not self.bank.manifest.words or self.lexicon is not None:
            return self.lexicon
        from mbc_core import defaults

        try:
            return defaults.lexicon_for(self.bank.manifest)
        except MbcError as error:
            self.information.append(f"The words were not decoded, only measured: {error}")
            return None

    # ------------------------------------------------------------------------------------------- forgotten, adapters

    def tombstones(self) -> Iterator[str]:
        """Nothing of a forgotten document is in any table, and every forgetting came to its end."""
        from mbc_core.bank.forget import unfinished

        stones = load_tombstones(self.bank)
        for path in unfinished(self.bank):
            yield line(
                f"forgetting the documents of {self.bank.storage.locate(path)} was interrupted",
                cause="the run died before its receipt was written",
                fix="run the same `mbc forget` again",
            )
        for table in ("codes", "documents", "replay", "dead_letter"):
            keys = self.bank.read(table, ["key"])["key"].drop_null().to_numpy()
            if count := int(stones.forgotten(keys).sum()):
                yield line(
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
