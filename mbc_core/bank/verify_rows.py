"""What the rows of a bank's codes, documents and ledger say, and whether it is true; part of `mbc inspect --verify`.

Each check yields one line for every fault, made by :func:`line`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank.inspect import committed_dead_letters
from mbc_core.bank.rewrite import removed_rows
from mbc_core.bank.visible import HASH_BYTES, revision_places
from mbc_core.codes import code_size
from mbc_core.errors import MbcError
from mbc_core.windows import window_start
from schemas.document import document_key

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.bank.export import WordDecoder

RESTORE = "restore the file from a copy of the bank, or ingest its documents again into a new bank"
RESTORE_TABLE = "restore the table from a copy of the bank"
_REPORT = "no command does this: report it with this line, and restore the bank from a copy"


def line(thing: str, *, cause: str, fix: str) -> str:
    """A fault as one line: the thing, its cause and the fix."""
    return str(MbcError(thing, cause=cause, fix=fix))


def code_faults(bank: Bank, lexicon: WordDecoder | None) -> Iterator[str]:
    """Payloads of every file, then of all files together: no passage twice, none missing.

    Args:
        lexicon: decodes the words; None only measures them.
    """
    parts = []
    for path, _ in bank.files("codes"):
        try:
            rows = bank.read_file("codes", path)
        except MbcError:
            continue  # named by the check of files
        yield from _payloads(bank, path, rows, lexicon)
        parts.append(rows.select(["key", "passage", "added_at"]))
    if parts and (codes := pa.concat_tables(parts)).num_rows:
        yield from _whole_documents(codes)


def _payloads(bank: Bank, path: str, rows: pa.Table, lexicon: WordDecoder | None) -> Iterator[str]:
    manifest, where = bank.manifest, bank.storage.locate(f"codes/{path}")
    size = code_size(manifest.slots)
    if count := pc.sum(pc.not_equal(pc.binary_length(rows["address"]), size)).as_py():
        yield line(f"{count} addresses do not have {size} bytes in {where}", cause="a foreign writer", fix=RESTORE)
    if count := pc.sum(pc.greater(pc.binary_length(rows["words"]), 2 * manifest.words)).as_py():
        yield line(
            f"{count} passages have a broken word payload (at most {2 * manifest.words} bytes) in {where}",
            cause="a foreign writer, or another profile's rows",
            fix=RESTORE,
        )
    if lexicon is not None and (count := sum(not _readable(lexicon, one) for one in rows["words"].to_pylist())):
        yield line(
            f"the words of {count} passages cannot be decoded in {where}",
            cause="they were written with another lexicon, or damaged before the file was written",
            fix=RESTORE,
        )
    if count := _misplaced(rows, manifest.window_seconds):
        yield line(
            f"{count} passages are in another window than their time says in {where}",
            cause="the rows were written with another window length",
            fix=RESTORE,
        )


def _whole_documents(codes: pa.Table) -> Iterator[str]:
    passages = codes.group_by(["key", "added_at"], use_threads=False).aggregate(
        [("passage", "count"), ("passage", "count_distinct"), ("passage", "min"), ("passage", "max")]
    )
    counts, distinct = passages["passage_count"].to_numpy(), passages["passage_count_distinct"].to_numpy()
    if twice := int((counts - distinct).sum()):
        yield line(
            f"{twice} passages are there twice in codes", cause="a file was committed twice by hand", fix=_REPORT
        )
    lowest, highest = passages["passage_min"].to_numpy(), passages["passage_max"].to_numpy()
    if partial := int(((lowest != 0) | (highest + 1 != distinct)).sum()):
        yield line(
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


def document_faults(bank: Bank) -> Iterator[str]:
    """Each revision in codes has a row in documents, whose key is that of its id."""
    codes = bank.read("codes", ["key", "added_at"])
    documents = bank.read("documents", ["key", "added_at", "doc_id", "content_hash"])
    if missing := int((revision_places(codes, documents) < 0).sum()):
        yield line(
            f"{missing} rows of codes have no row in documents",
            cause=f"files of {bank.storage.locate('documents')} or rows of its log were removed",
            fix=RESTORE_TABLE.replace("the table", "the table documents"),
        )
    salt = bank.manifest.salt
    pairs = zip(documents["key"].to_pylist(), documents["doc_id"].to_pylist(), strict=True)
    if wrong := sum(document_key(doc_id, salt) != key for key, doc_id in pairs):
        yield line(
            f"{wrong} rows of {bank.storage.locate('documents')} have another key than their id gives",
            cause="manifest.json was replaced: the salt in it keys the documents",
            fix="restore manifest.json from a copy of the bank",
        )
    sizes = pc.not_equal(pc.binary_length(documents["content_hash"]), HASH_BYTES)
    if count := pc.sum(sizes).as_py():
        yield line(
            f"{count} content hashes of {bank.storage.locate('documents')} do not have {HASH_BYTES} bytes",
            cause="a foreign writer",
            fix=RESTORE,
        )


def ledger_faults(bank: Bank) -> Iterator[str]:
    """Each row of the ledger adds up, and the tables hold what the commits say."""
    ledger = bank.read("ledger")
    rows = ledger.to_pylist()
    yield from _sums(rows)
    codes = bank.read("codes", ["key", "added_at"])
    stored, stamps = codes["added_at"].cast(pa.int64()).to_numpy(), ledger["added_at"].cast(pa.int64()).to_numpy()
    if unknown := len(np.setdiff1d(stored, stamps)):
        yield line(
            f"{unknown} slices are in codes but not in the ledger",
            cause="the run that added them was interrupted between its last two commits",
            fix="run it again with the same ingest id",
        )
    yield from _commits(bank, rows, stamps, codes, stored)
    yield from _letters(bank, rows)


def _sums(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Documents in = ingested + duplicates + replaced + dead letters, in each row."""
    for row in rows:
        letters = sum(json.loads(row["dead_letters"] or "{}").values())
        out = row["documents"] + row["duplicates"] + row["replaced"] + letters
        if out != row["documents_in"]:
            yield line(
                f"ledger row {row['ingest_id']}/{row['slice']} window {row['window']}: {row['documents_in']} documents"
                f" in, but {out} accounted for",
                cause="the row was written by another program, or by a defect of this one",
                fix="compare with the sources of that run; restore the table ledger from a copy of the bank",
            )


def _commits(
    bank: Bank,
    rows: list[dict[str, Any]],
    stamps: npt.NDArray[np.int64],
    codes: pa.Table,
    stored: npt.NDArray[np.int64],
) -> Iterator[str]:
    """Documents and passages of every commit; what was compacted or forgotten since may be fewer."""
    removed = removed_rows(bank)
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
                yield line(
                    f"the ledger says that slice {mine[0]['slice']} added {told} {what}; codes hold {count}"
                    f" (ingest {mine[0]['ingest_id']})",
                    cause="files or rows of the logs of codes or ledger were removed or added by hand",
                    fix="restore the tables codes and ledger from one copy of the bank",
                )


def _letters(bank: Bank, rows: list[dict[str, Any]]) -> Iterator[str]:
    told: dict[str, int] = {}
    for row in rows:
        letters = sum(json.loads(row["dead_letters"] or "{}").values())
        told[row["ingest_id"]] = told.get(row["ingest_id"], 0) + letters
    stored = committed_dead_letters(bank)["ingest_id"].to_pylist()
    for ingest_id, count in told.items():
        if (found := stored.count(ingest_id)) != count:
            yield line(
                f"the ledger says that ingest {ingest_id} has {count} dead letters; the table dead_letter holds"
                f" {found}",
                cause="files or rows of the log of dead_letter were removed or added by hand",
                fix="restore the tables dead_letter and ledger from one copy of the bank",
            )
