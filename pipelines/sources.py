"""Where documents come from: files, folders, globs, object stores, standard input → a list of sources to read."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from mbc_core.bank.storage import Storage
from mbc_core.errors import StorageError, UsageError

STDIN = "-"
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst")
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or standard input.

    Attributes:
        path: local path, ``s3://…`` or ``gs://…`` address, or ``-``; as the user wrote it, so that the ids of text
            files (their path) stay the same from night to night.
        kind: ``jsonl``, ``parquet``, ``csv`` or ``text``.
    """

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as one listing saw it; another size or time of change is another content, to be read again.

    Attributes:
        path, kind: as in :class:`Source`. size: bytes, -1 for a link that leads nowhere.
        mtime_ns: time of the last change, nanoseconds since the epoch.
    """

    path: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Found:
    """What the given sources expand to: the files to read, and the files passed over for their ending."""

    sources: tuple[Source, ...]
    passed_over: tuple[str, ...]


def find_sources(given: Sequence[str]) -> Found:
    """Expand files, folders, globs and object-store addresses into files, sorted within each argument.

    A folder gives every file below it with a known ending; names that start with ``.`` or ``_`` are left out.

    Raises:
        UsageError: nothing given, nothing found, an unknown ending, standard input twice.
        StorageError: a named file cannot be opened, or a store cannot be listed.
    """
    if not given:
        raise UsageError("no source was given", fix="name files, folders or globs, or - for standard input")
    if list(given).count(STDIN) > 1:
        raise UsageError("standard input is named twice", value=list(given), fix="give - once")
    sources: dict[str, Source] = {}
    passed_over: list[str] = []
    for one in given:
        for path, named in _paths(one):
            kind = "jsonl" if path == STDIN else kind_of(path)
            if kind:
                sources.setdefault(path, Source(path, kind))
            elif named:
                raise UsageError(
                    "the kind of this source is unknown",
                    value=path,
                    cause=f"it ends in none of {', '.join(KINDS)} (each may be followed by .gz or .zst)",
                    fix="rename it, or pipe JSON Lines into standard input and name -",
                )
            else:
                passed_over.append(path)
    if not sources:
        raise UsageError(
            "no document file was found",
            value=list(given),
            cause=f"no file there ends in one of {', '.join(KINDS)}",
            fix="check the path, or quote the glob so that the shell leaves it alone",
        )
    return Found(tuple(sources.values()), tuple(passed_over))


def kind_of(path: str) -> str:
    """``jsonl``, ``parquet``, ``csv``, ``text``, or ``""`` when the ending is not known."""
    name = PurePosixPath(path).name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get(PurePosixPath(name).suffix, "")


def _paths(given: str) -> Iterator[tuple[str, bool]]:
    """(path, was it named itself?) of one argument."""
    if given == STDIN:
        yield given, True
    elif "://" in given:
        yield from _remote_paths(given)
    elif any(char in given for char in _GLOB_CHARACTERS) and not os.path.exists(given):  # noqa: PTH110 - see below
        for path in sorted(glob.glob(given, recursive=True)):  # noqa: PTH207 - Path.glob cannot take absolute patterns
            if Path(path).is_file() and not _hidden(path, given):
                yield Path(path).as_posix(), False
    elif os.path.isdir(given):  # noqa: PTH112 - Path.is_dir raises where the folder above may not be searched
        for file in sorted(_files_below(Path(given))):
            if not _hidden(file.relative_to(given).as_posix()):
                yield file.as_posix(), False
    else:
        _check_named(given)
        yield Path(given).as_posix(), True


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file, and every name that leads nowhere (a broken link): reading it gives the dead letter that says so."""

    def refuse(error: OSError) -> None:
        raise _cannot_open(str(error.filename), error.strerror or str(error)) from error

    for below, _, names in os.walk(folder, onerror=refuse):
        for path in (Path(below, name) for name in names):
            if os.path.isfile(path) or not os.path.exists(path):  # noqa: PTH110, PTH113 - these never raise
                yield path


def _check_named(given: str) -> None:
    """A file that the user named must open now; only files found by listing become dead letters later."""
    try:
        os.stat(given)  # noqa: PTH116 - as above
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            "the source does not exist", value=given, cause="a misspelt path", fix="check the path"
        ) from error
    except OSError as error:
        raise _cannot_open(given, error.strerror or str(error)) from error
    if not os.access(given, os.R_OK):
        raise _cannot_open(given, "no permission to read it")


def _hidden(path: str, below: str = "") -> bool:
    parts = PurePosixPath(path).parts[len(PurePosixPath(below).parent.parts) :]
    return any(part.startswith((".", "_")) for part in parts if part not in (".", ".."))


def _remote_paths(given: str) -> Iterator[tuple[str, bool]]:
    for address, _, named in _remote_files(given):
        yield address, named


def _remote_files(given: str, may_be_empty: bool = False) -> Iterator[tuple[str, pafs.FileInfo, bool]]:
    """(address, what the store says of it, was it named itself?) of one argument."""
    scheme, _, rest = given.partition("://")
    if scheme not in ("s3", "gs", "file"):
        raise UsageError("the store is unknown", value=given, fix="use a local path, s3://… or gs://…")
    pattern = any(char in rest for char in _GLOB_CHARACTERS)
    base = rest[: min(rest.index(char) for char in _GLOB_CHARACTERS if char in rest)] if pattern else rest
    base = base.rpartition("/")[0] if pattern else base
    try:
        filesystem, root = open_store(f"{scheme}://{base}")
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            yield given, info, True
            return
        listed = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise _cannot_open(given, str(error)) from error
    if not pattern and not listed and not may_be_empty:
        raise UsageError(
            "the source does not exist",
            value=given,
            cause="no file and no folder has that address: the path is misspelt, or there is no such bucket",
            fix="check the address",
        )
    prefix = f"{scheme}://{base.rstrip('/')}"
    for info in sorted(listed, key=lambda one: str(one.path)):
        inner = str(info.path)[len(root.rstrip("/")) + 1 :]
        address = f"{prefix}/{inner}"
        if info.type != pafs.FileType.File or _hidden(inner):
            continue
        if not pattern or fnmatch.fnmatchcase(address, given):
            yield address, info, False


def list_files(given: str) -> Iterator[FileState]:
    """Every document file that one argument stands for right now, with its size and time of change.

    Nothing there yet is no error here; files of no known ending are left out, as are files that vanish meanwhile.

    Raises:
        UsageError: an unknown store. StorageError: it cannot be listed.
    """
    if "://" in given:
        for address, info, _ in _remote_files(given, may_be_empty=True):
            if kind := kind_of(address):
                yield FileState(address, kind, int(info.size), int(info.mtime_ns or 0))
        return
    if not (any(char in given for char in _GLOB_CHARACTERS) or os.path.lexists(given)):
        return
    for path, _ in _paths(given):
        if kind := kind_of(path):
            state = state_of(path, kind)
            if state is not None:
                yield state


def require_bucket(given: str) -> None:
    """Refuse an address whose bucket is not there.

    Raises:
        UsageError: an unknown store, or no such bucket. StorageError: the store cannot be asked.
    """
    next(_remote_files(given, may_be_empty=True), None)
    scheme, _, rest = given.partition("://")
    filesystem, inner = open_store(f"{scheme}://{rest.partition('/')[0]}")
    if filesystem.get_file_info(inner).type == pafs.FileType.NotFound:
        raise UsageError(
            "the bucket does not exist",
            value=given,
            cause="a misspelt address",
            fix="make it first, or check the address",
        )


def state_of(path: str, kind: str) -> FileState | None:
    """What a listing would say of this one file now; None when it is gone."""
    if "://" in path:
        try:
            filesystem, inner = open_store(path)
            info = filesystem.get_file_info(inner)
        except (OSError, pa.ArrowException) as error:
            raise _cannot_open(path, str(error)) from error
        return FileState(path, kind, int(info.size), int(info.mtime_ns or 0)) if info.is_file else None
    try:
        found = os.stat(path)  # noqa: PTH116 - as everywhere here
    except FileNotFoundError:
        return FileState(path, kind, -1, 0) if os.path.islink(path) else None  # noqa: PTH114
    except OSError as error:
        raise _cannot_open(path, error.strerror or str(error)) from error
    return FileState(path, kind, found.st_size, found.st_mtime_ns)


def open_store(address: str) -> tuple[pafs.FileSystem, str]:
    """File system and inner path of ``s3://…``, ``gs://…`` or ``file://…``, with the credentials the bank uses."""
    scheme, _, inner = address.partition("://")
    return (pafs.LocalFileSystem(), inner) if scheme == "file" else (Storage(address).filesystem, inner)


def _cannot_open(path: str, cause: str) -> StorageError:
    return StorageError(
        "the source cannot be opened", value=path, cause=cause, fix="check its permissions and your credentials"
    )
