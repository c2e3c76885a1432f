"""What a bank holds and weighs, and whether everything it says about itself is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank.codebooks import load_codebook, version_rows
from mbc_core.bank.rewrite import removed_rows
from mbc_core.bank.visible import newest_revisions, revision_places
from mbc_core.codebook.chain import MOST_VERSIONS
from mbc_core.codes import code_size
from mbc_core.errors import MbcError
from schemas.results import BankBytes, BytesPerPassage, CodebookFigures, InspectResult, VerifiedInspectResult
from schemas.tables import TABLES

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_FOLDERS = {
    "codes": "codes",
    "documents": "documents",
    "replay": "replay",
    "codebooks": "codebooks",
    "codebook_versions": "codebooks",
    "adapters": "adapters",
}
"""First folder of a path → the entry of ``bytes`` it counts in; the rest counts as ``other``."""


def inspect(bank: Bank) -> InspectResult:
    """Counts of visible documents and passages, bytes on storage, the newest codebook and the live adapter."""
    from mbc_core.adapters import AdapterRegistry

    codes = bank.read("codes", ["key", "added_at", "window", "address", "words"])
    codes = codes.filter(pa.array(newest_revisions(codes)))
    sizes = stored_bytes(bank)
    passages = codes.num_rows
    return {
        "documents": pc.count_distinct(codes["key"]).as_py(),
        "passages": passages,
        "dead_letters": committed_dead_letters(bank).num_rows,
        "windows": pc.count_distinct(codes["window"]).as_py(),
        "bytes": sizes,
        "bytes_per_passage": _per_passage(codes, sizes),
        "codebook": _codebook_figures(bank),
        "adapter": AdapterRegistry(bank).newest_live(),
    }


def verify(bank: Bank) -> VerifiedInspectResult:
    """:func:`inspect`, then every check of this module; each fault is one line of ``problems``.

    A bank so damaged that it cannot be inspected has zero counts and names the fault.
    """
    problems = [
        *_file_problems(bank),
        *_guarded(_codebook_problems(bank)),
        *_guarded(_code_problems(bank)),
        *_guarded(_ledger_problems(bank)),
        *_guarded(_adapter_problems(bank)),
    ]
    problems = list(dict.fromkeys(problems))
    try:
        found = inspect(bank)
    except MbcError as error:
        problems = list(dict.fromkeys([*problems, str(error)]))
        found = _nothing(bank)
    return {**found, "ok": not problems, "problems": problems}


def stored_bytes(bank: Bank) -> BankBytes:
    """What the store holds below each folder, logs and files that no longer count included."""
    sizes = BankBytes(codes=0, documents=0, replay=0, codebooks=0, adapters=0, other=0, total=0)
    for one in bank.storage.list():
        entry = _FOLDERS.get(one.path.split("/", 1)[0], "other")
        sizes[entry] += one.size  # type: ignore[literal-required]
        sizes["total"] += one.size
    return sizes


def committed_dead_letters(bank: Bank) -> pa.Table:
    """Rows of ``dead_letter`` whose slice was committed: a crashed attempt's rows do not count."""
    rows = bank.read("dead_letter")
    ledger = bank.read("ledger", ["ingest_id", "added_at"])
    committed = set(zip(ledger["ingest_id"].to_pylist(), ledger["added_at"].to_pylist(), strict=True))
    pairs = zip(rows["ingest_id"].to_pylist(), rows["added_at"].to_pylist(), strict=True)
    return rows.filter(pa.array([pair in committed for pair in pairs], pa.bool_()))


def _per_passage(codes: pa.Table, sizes: BankBytes) -> BytesPerPassage:
    passages = max(codes.num_rows, 1)
    return {
        "address": (pc.sum(pc.binary_length(codes["address"])).as_py() or 0) / passages,
        "words": (pc.sum(pc.binary_length(codes["words"])).as_py() or 0) / passages,
        "codes_table": sizes["codes"] / passages if codes.num_rows else 0.0,
        "all_in": (sizes["codes"] + sizes["documents"]) / passages if codes.num_rows else 0.0,
    }


def _codebook_figures(bank: Bank) -> CodebookFigures:
    head = list(version_rows(bank).values())[-1]
    return {
        "version": head["version"],
        "K": bank.manifest.codewords,
        "T": bank.manifest.slots,
        "used": head["used"],
        "perplexity": head["perplexity"],
        "resets": head["resets"],
    }


def _nothing(bank: Bank) -> InspectResult:
    manifest = bank.manifest
    return {
        "documents": 0,
        "passages": 0,
        "dead_letters": 0,
        "windows": 0,
        "bytes": stored_bytes(bank),
        "bytes_per_passage": {"address": 0.0, "words": 0.0, "codes_table": 0.0, "all_in": 0.0},
        "codebook": {
            "version": -1,
            "K": manifest.codewords,
            "T": manifest.slots,
            "used": 0,
            "perplexity": 0.0,
            "resets": 0,
        },
        "adapter": None,
    }


def _guarded(problems: Iterator[str]) -> Iterator[str]:
    """Pass problems on; an error that stops the check is a problem too."""
    try:
        yield from problems
    except MbcError as error:
        yield str(error)


def _file_problems(bank: Bank) -> Iterator[str]:
    """Every file that a log names: there, of the right size, of the right digest, readable."""
    for table in TABLES:
        try:
            files = bank.files(table)
        except MbcError as error:
            yield str(error)
            continue
        for path, size in files:
            found = bank.storage.size(f"{table}/{path}")
            if found is not None and found != size:
                where = bank.storage.locate(f"{table}/{path}")
                yield f"{where} has {found} bytes; the log of `{table}` recorded {size}."
            try:
                bank.read_file(table, path)
            except MbcError as error:
                yield str(error)


def _codebook_problems(bank: Bank) -> Iterator[str]:
    rows = version_rows(bank)
    for row in rows.values():
        try:
            codebook = load_codebook(bank, row)
        except MbcError as error:
            yield str(error)
            continue
        if (codebook.version, codebook.parent) != (row["version"], row["parent"]):
            yield f"the file of codebook version {row['version']} says it is version {codebook.version}."
    used = set(bank.read("codes", ["codebook_version"])["codebook_version"].to_pylist())
    for version in sorted(used - set(rows)):
        yield f"codes name codebook version {version}, which is not registered."
    if len(used) > MOST_VERSIONS:
        yield f"codes name {len(used)} codebook versions; at most {MOST_VERSIONS} may be referenced."


def _code_problems(bank: Bank) -> Iterator[str]:
    """Payload sizes, whole documents, no row twice, and a documents row for each."""
    codes = bank.read("codes", ["key", "passage", "added_at", "address", "words"])
    manifest = bank.manifest
    wrong = pc.not_equal(pc.binary_length(codes["address"]), code_size(manifest.slots))
    if count := pc.sum(wrong).as_py():
        yield f"{count} addresses do not have {code_size(manifest.slots)} bytes."
    lengths = pc.binary_length(codes["words"]).to_numpy()
    if count := int(((lengths % 2 != 0) | (lengths > 2 * manifest.words)).sum()):
        yield f"{count} passages have a broken word payload (2 bytes a code, at most {manifest.words} codes)."
    if codes.num_rows:
        passages = codes.group_by(["key", "added_at"], use_threads=False).aggregate(
            [("passage", "count"), ("passage", "count_distinct"), ("passage", "min"), ("passage", "max")]
        )
        counts, distinct = passages["passage_count"].to_numpy(), passages["passage_count_distinct"].to_numpy()
        if twice := int((counts - distinct).sum()):
            yield f"{twice} passages are there twice."
        lowest, highest = passages["passage_min"].to_numpy(), passages["passage_max"].to_numpy()
        if partial := int(((lowest != 0) | (highest + 1 != distinct)).sum()):
            yield f"{partial} documents lack a passage."
    documents = bank.read("documents", ["key", "added_at"])
    if missing := int((revision_places(codes, documents) < 0).sum()):
        yield f"{missing} rows of codes have no row in documents."


def _ledger_problems(bank: Bank) -> Iterator[str]:
    """Each ledger row adds up, and codes hold what the ledger says."""
    ledger = bank.read("ledger")
    for row in ledger.to_pylist():
        letters = sum(json.loads(row["dead_letters"] or "{}").values())
        out = row["documents"] + row["duplicates"] + row["replaced"] + letters
        if out != row["documents_in"]:
            yield (
                f"ledger row {row['ingest_id']}/{row['slice']} window {row['window']}: {row['documents_in']} documents"
                f" in, but {out} accounted for."
            )
    codes = bank.read("codes", ["key", "added_at"])
    stored, stamps = codes["added_at"].cast(pa.int64()).to_numpy(), ledger["added_at"].cast(pa.int64()).to_numpy()
    if unknown := len(np.setdiff1d(stored, stamps)):
        yield (
            f"{unknown} slices are in codes but not in the ledger: the run that added them was interrupted;"
            " run it again with the same ingest id."
        )
    removed = removed_rows(bank)  # compacted or forgotten
    for stamp in np.unique(stamps):
        mine = pc.equal(ledger["added_at"].cast(pa.int64()), pa.scalar(int(stamp), pa.int64()))
        passages = pc.sum(ledger["passages"].filter(mine)).as_py()
        found = int((stored == stamp).sum())
        if not passages - removed.get(int(stamp), 0) <= found <= passages:
            name = ledger["slice"].filter(mine)[0].as_py()
            yield f"the ledger says that slice {name} added {passages} passages; codes hold {found}."


def _adapter_problems(bank: Bank) -> Iterator[str]:
    from mbc_core.adapters import AdapterRegistry

    yield from AdapterRegistry(bank).problems()


def unreferenced_files(bank: Bank) -> list[str]:
    """Data files that no log names: left by interrupted runs, never read. Paths below the bank's root."""
    found = []
    for table in TABLES:
        named = {f"{table}/{path}" for path, _ in bank.files(table)}
        found += [
            one.path
            for one in bank.storage.list(table)
            if one.path.endswith(".parquet") and "/_delta_log/" not in one.path and one.path not in named
        ]
    return found
