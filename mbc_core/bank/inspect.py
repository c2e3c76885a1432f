"""What a bank holds and weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from mbc_core.bank.codebooks import version_rows
from mbc_core.bank.visible import newest_revisions
from schemas.results import BankBytes, BytesPerPassage, CodebookFigures, InspectResult

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

_FOLDERS = {
    "codes": "codes",
    "documents": "documents",
    "replay": "replay",
    "codebooks": "codebooks",
    "codebook_versions": "codebooks",
    "adapters": "adapters",
    "canary": "adapters",
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


def nothing(bank: Bank) -> InspectResult:
    """The figures of a bank too damaged to count."""
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
