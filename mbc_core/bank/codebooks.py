"""Codebook versions and pending statistics of a bank: immutable files, registered create-only in a Delta table.

Version numbers are app ids in the log of ``codebook_versions``: of two runs that would publish the same version at
once, one wins; the other sees the winner's row and goes on if it is the same codebook, or stops.

Statistics that have not reached a publication yet are files named by the ledger rows of the slices which gathered
them. So they count exactly when their slice does, and nothing has to be updated in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mbc_core.bank import parquet
from mbc_core.bank.commit import commit_files, finished_slices
from mbc_core.bank.slices import check_ingest_id, safe_name, write_rows
from mbc_core.errors import DamagedFile, LostRace, UsageError
from mbc_core.windows import window_order
from schemas.manifest import Manifest
from schemas.tables import CODEBOOK_VERSIONS, UNDATED

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.codebook.chain import CodebookChain
    from mbc_core.codebook.files import Codebook
    from mbc_core.codebook.statistics import BatchStatistics
    from mbc_core.codebook.update import CodebookUpdate, UpdateRule

FOLDER = "codebooks"
PENDING = f"{FOLDER}/pending"


def check_codebook(manifest: Manifest, codebook: Codebook) -> None:
    """Whether the codebook has the bank's K and d_c.

    Raises:
        UsageError: it has not.
    """
    found, wanted = (codebook.size, codebook.width), (manifest.codewords, manifest.width)
    if found != wanted:
        raise UsageError(
            "the codebook does not fit the bank",
            value=f"K = {found[0]}, d_c = {found[1]}",
            cause=f"the bank has K = {wanted[0]}, d_c = {wanted[1]}",
            fix=f"use the codebook trained for T = {manifest.slots}",
        )


def register_codebook(
    bank: Bank, codebook: Codebook, update: CodebookUpdate | None = None, *, ingest_id: str = "", slice_name: str = ""
) -> bool:
    """Add a version to the bank's chain: first its file, then its row; a retry changes nothing.

    Args:
        update: the figures of the update that made it; for version 0 they follow from its counts.
        ingest_id, slice_name: the slice that publishes it.

    Returns:
        True when registered now, False when this very codebook was registered before.

    Raises:
        LostRace: another codebook was registered under this version.
        UsageError: the codebook does not fit the bank.
    """
    check_codebook(bank.manifest, codebook)
    data = codebook.to_bytes()
    path = f"{FOLDER}/{codebook.version:05d}-{codebook.digest[: parquet.DIGEST_CHARACTERS]}.safetensors"
    bank.storage.write_new(path, data)
    row = {
        "version": codebook.version,
        "parent": codebook.parent,
        "built_from": list(codebook.built_from),
        "file": path,
        "digest": codebook.digest,
        "vectors": 0 if update is None else update.vectors,
        **_figures(codebook, update),
        "ingest_id": ingest_id,
        "slice": slice_name,
        "added_at": time.time_ns() // 1000,
    }
    rows = pa.Table.from_pylist([row], CODEBOOK_VERSIONS)
    file = write_rows(bank, "codebook_versions", rows, f"{codebook.version:05d}")
    if commit_files(bank, "codebook_versions", [file], f"codebook/{codebook.version}"):
        return True
    winner = version_rows(bank)[codebook.version]
    if winner["digest"] != codebook.digest:
        again = (winner["ingest_id"], winner["slice"]) == (ingest_id, slice_name)
        raise LostRace(
            f"codebook version {codebook.version} was published by another run meanwhile",
            value=f"{winner['digest'][:12]}… by ingest {winner['ingest_id'] or 'of the bank itself'}",
            cause="two runs that update the codebook write to this bank at the same time, or did when one died",
            fix="name this run anew with --ingest-id: what it has added counts as duplicates"
            if again
            else "run the same command again: it goes on from the other run's codebook",
        )
    return False


def version_rows(bank: Bank) -> dict[int, dict[str, Any]]:
    """Version → its row of ``codebook_versions``, ascending.

    Raises:
        DamagedFile: a version is missing from the chain.
    """
    rows = {row["version"]: row for row in bank.read("codebook_versions").sort_by("version").to_pylist()}
    if list(rows) != list(range(len(rows))) or not rows:
        raise DamagedFile(
            "the bank's chain of codebook versions has gaps",
            value=list(rows),
            cause="rows of the table codebook_versions were removed",
            fix="restore the table from a copy of the bank",
        )
    return rows


def load_codebook(bank: Bank, row: dict[str, Any]) -> Codebook:
    """The codebook of a row of ``codebook_versions``, its digest checked.

    Raises:
        DamagedFile: the file is missing, damaged, or holds another version or size.
    """
    from mbc_core.codebook.files import Codebook

    where = bank.storage.locate(row["file"])
    if not bank.storage.exists(row["file"]):
        raise DamagedFile(
            f"the file {where} of codebook version {row['version']} is missing",
            cause="it was removed; the codes of this version cannot be read without it",
            fix="restore the file from a copy of the bank",
        )
    codebook = Codebook.from_bytes(bank.storage.read_bytes(row["file"]), where, digest=row["digest"])
    check_codebook(bank.manifest, codebook)
    return codebook


def load_chain(
    bank: Bank, rule: UpdateRule | None, resuming: str | None, slice_name: str | None = None
) -> CodebookChain:
    """The chain of versions with the statistics that wait for the next publication.

    Args:
        resuming: an ingest id: versions published by slices of this ingest that were not finished are left out
            while nothing was built on them, so that the rerun decides (and publishes) exactly as the first time.
        slice_name: a slice of that ingest that is about to gather its statistics: if another process that runs the
            same ingest has committed them already, they are left out, so that they do not count twice.
    """
    from mbc_core.codebook.chain import CodebookChain

    own = None if resuming is None or slice_name is None else _statistics_prefix(resuming, slice_name)
    rows = list(version_rows(bank).values())
    if resuming is not None:
        rows = _before_unfinished(bank, rows, resuming)
    by_version = {row["version"]: row for row in rows}
    versions = [bank.codebook(version, by_version) for version in by_version]
    pending = load_pending(bank, versions[-1].last_window, own)
    return CodebookChain(versions, pending, window_seconds=bank.manifest.window_seconds, rule=rule)


def _before_unfinished(bank: Bank, rows: list[dict[str, Any]], ingest_id: str) -> list[dict[str, Any]]:
    """The versions without those that unfinished slices of this ingest published, if all is as it was before them.

    If another run has used such a version since, or added or folded statistics, the rerun could not make the same
    version again. Then they all stay: to the rerun they are versions like any other's.
    """
    finished = finished_slices(bank, ingest_id)
    kept = list(rows)
    while kept[-1]["ingest_id"] == ingest_id and kept[-1]["slice"] not in finished:
        kept.pop()
    dropped = rows[len(kept) :]
    if not dropped:
        return rows
    used = bank.read("ledger", ["codebook_version"])["codebook_version"].drop_null().to_pylist()
    taken_in = {window for row in dropped for window in row["built_from"]}
    last = bank.codebook(kept[-1]["version"]).last_window
    waiting = _statistics_paths(bank, lambda window: not _is_folded(window, last))
    as_before = max(used, default=0) < dropped[0]["version"] and all(
        window in taken_in and bank.storage.exists(path) for window, path in waiting
    )
    return kept if as_before else rows


def save_statistics(bank: Bank, ingest_id: str, slice_name: str, window: str, statistics: BatchStatistics) -> str:
    """Write what a slice gathered in a window; the path belongs into the slice's ledger row of that window.

    Returns:
        Path below the bank's root, for the ledger's column ``statistics``.
    """
    data = statistics.to_bytes()
    path = f"{_statistics_prefix(ingest_id, slice_name)}{safe_name(window)}-{parquet.digest(data)}.safetensors"
    bank.storage.write_new(path, data)
    return path


def _statistics_prefix(ingest_id: str, slice_name: str) -> str:
    return f"{PENDING}/{check_ingest_id(ingest_id)}/{safe_name(slice_name)}-"


def load_pending(
    bank: Bank, last_window: str | None, leave_out: str | None = None
) -> list[tuple[str, BatchStatistics]]:
    """(window, statistics) of every committed slice whose window no codebook version has taken in, in window order.

    Args:
        last_window: newest window of the head; None takes all.
        leave_out: start of the paths that do not count; None takes all.
    """
    from mbc_core.codebook.statistics import BatchStatistics

    found = []
    for window, path in _statistics_paths(bank, lambda window: not _is_folded(window, last_window)):
        if leave_out is not None and path.startswith(leave_out):
            continue
        data = bank.storage.read_bytes(path)
        where = bank.storage.locate(path)
        parquet.check_digest(data, path.removesuffix(".safetensors").rsplit("-", 1)[-1], where)
        found.append((window, BatchStatistics.from_bytes(data, where)))
    return found


def drop_folded_statistics(bank: Bank, last_window: str | None) -> int:
    """Delete the statistics files that a published version has taken in (they hold samples of vectors).

    Call it after a slice is committed, with the head's last window; a crash leaves files that the next call deletes.

    Returns:
        How many files were deleted.
    """
    if last_window is None:
        return 0
    paths = [
        path
        for _, path in _statistics_paths(bank, lambda window: _is_folded(window, last_window))
        if bank.storage.exists(path)
    ]
    for path in paths:
        bank.storage.delete(path)
    return len(paths)


def _is_folded(window: str, last_window: str | None) -> bool:
    return last_window is not None and window_order(window) <= window_order(last_window)


def _statistics_paths(bank: Bank, keep: Callable[[str], bool]) -> list[tuple[str, str]]:
    ledger = bank.read("ledger", ["window", "statistics"])
    pairs = zip(ledger["window"].to_pylist(), ledger["statistics"].to_pylist(), strict=True)
    kept = [(window, path) for window, path in pairs if path and window != UNDATED and keep(window)]
    return sorted(kept, key=lambda pair: (window_order(pair[0]), pair[1]))


def _figures(codebook: Codebook, update: CodebookUpdate | None) -> dict[str, Any]:
    if update is not None:
        return {
            "used": int(update.used),
            "perplexity": float(update.perplexity),
            "resets": int(update.resets),
            "error": float(update.error),
        }
    share = codebook.count / codebook.count.sum()
    share = share[share > 0]
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    return {"used": int((codebook.count > 0).sum()), "perplexity": perplexity, "resets": 0, "error": None}
