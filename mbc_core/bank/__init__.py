"""The memory bank on storage: Parquet under Delta logs, immutable codebooks, exactly-once commits."""

from mbc_core.bank.bank import Bank
from mbc_core.bank.codebooks import drop_folded_statistics, load_pending, register_codebook, save_statistics
from mbc_core.bank.commit import commit_files, commit_slice, finished_slices
from mbc_core.bank.slices import PreparedFile, SliceId, SliceRows, begin_slice, write_rows, write_slice_rows
from mbc_core.bank.storage import Storage
from mbc_core.bank.visible import Status, VisibleKeys

__all__ = [
    "Bank",
    "PreparedFile",
    "SliceId",
    "SliceRows",
    "Status",
    "Storage",
    "VisibleKeys",
    "begin_slice",
    "commit_files",
    "commit_slice",
    "drop_folded_statistics",
    "finished_slices",
    "load_pending",
    "register_codebook",
    "save_statistics",
    "write_rows",
    "write_slice_rows",
]
