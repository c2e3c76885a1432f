"""Bounded local storage for one run: documents are spilled as they are read, then dealt out into slice files.

A file is a row of Arrow IPC streams (zstd), so that it can be appended to with no other state than its name. The
folder is locked while its run lives; the next run removes folders whose run was killed.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from mbc_core.errors import StorageError

_PREFIX = "mbc-staging-"
_LOCK = "lock"
_MAKING = 60.0  # seconds within which a new folder is locked
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


@contextmanager
def staging_folder(parent: Path | None) -> Iterator[Path]:
    """A fresh folder below ``parent`` (the system's temporary folder by default), removed at the end.

    Raises:
        StorageError: it cannot be made, or the disk fills up while it is used.
    """
    root = Path(tempfile.gettempdir()) if parent is None else parent
    with staging_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = (folder / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if not (folder / _LOCK).exists() and time.time() - folder.stat().st_mtime > _MAKING:
                folder.rmdir()  # its run was killed before it could lock it; nothing is in it
        with suppress(OSError), (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the run that owns it lives
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staging_errors(where: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says what to do.

    Raises:
        StorageError: on any OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StorageError(
            "the documents cannot be staged on the local disk",
            value=str(where),
            cause="the disk is full" if full else str(error),
            fix="free some space, or name another folder with --staging; finished slices are kept and skipped",
        ) from error


def append_rows(path: Path, rows: pa.RecordBatch) -> None:
    """Append one IPC stream to ``path``."""
    with staging_errors(path), path.open("ab") as sink, pa.ipc.new_stream(sink, rows.schema, options=_OPTIONS) as out:
        out.write_batch(rows)


def read_rows(path: Path | str) -> pa.RecordBatch:
    """All rows of a file of :func:`append_rows`, in the order written."""
    batches = []
    with staging_errors(Path(path)), pa.OSFile(str(path), "rb") as stream:
        size = stream.size()
        while stream.tell() < size:
            with pa.ipc.open_stream(stream) as reader:
                batches += list(reader)
    return pa.concat_batches(batches)
