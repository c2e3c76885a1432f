"""Where a bank lives: a local folder, ``s3://`` or ``gs://``, behind one small set of whole-file operations.

Every file of a bank is written once and never changed, so a store needs no more than: read, write a new file,
ask for a size, list, and delete one named file. Locally a new file appears whole or not at all (a temporary
file, flushed to the disk, then linked under its name); object stores make an upload visible only when it is
complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from mbc_core.errors import StorageError, UsageError

_SCHEMES = ("s3", "gs")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GONE = {errno.ENOENT, errno.ENOTDIR}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_THERE = "it is not there, or was removed meanwhile"
_TEMPORARY = ".tmp-"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as the store lists it: ``path`` relative to the bank's root, ``size`` in bytes.

    ``modified`` is the store's time of writing, seconds since the epoch; it plays no part in comparisons.
    """

    path: str
    size: int
    modified: float = field(default=0.0, compare=False)

    @property
    def is_temporary(self) -> bool:
        """Whether it was being written and has no name yet; only :meth:`Storage.list` with ``temporary`` shows it."""
        return self.path.rsplit("/", 1)[-1].startswith(_TEMPORARY)


@dataclass(frozen=True)
class Storage:
    """One root on a store.

    Args:
        uri: a local path, ``file://…``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``. Credentials, region and
            endpoint of S3 come from the usual ``AWS_*`` environment variables, those of GCS from
            ``GOOGLE_APPLICATION_CREDENTIALS`` or the machine.

    Raises:
        UsageError: another scheme, or no bucket.
    """

    uri: str
    _filesystem: pafs.FileSystem | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", _normal_uri(self.uri))

    def __getstate__(self) -> str:
        return self.uri

    def __setstate__(self, uri: str) -> None:
        object.__setattr__(self, "uri", uri)
        object.__setattr__(self, "_filesystem", None)

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return "://" not in self.uri

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system that holds the root; made on first use, never pickled."""
        if self._filesystem is None:
            object.__setattr__(self, "_filesystem", _make_filesystem(self.uri))
        return self._filesystem

    def delta_options(self) -> dict[str, str]:
        """Options that deltalake needs beyond the environment variables which it reads itself."""
        endpoint = _s3_endpoint() if self.uri.startswith("s3://") else None
        if endpoint is None:
            return {}
        options = {"AWS_ENDPOINT_URL": endpoint}
        if endpoint.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
        return options

    def locate(self, path: str = "") -> str:
        """Full URI (or local path) of ``path``, which is relative to the root."""
        return f"{self.uri}/{path}" if path else self.uri

    def exists(self, path: str) -> bool:
        """Whether a file of that name is there."""
        return self.size(path) is not None

    def size(self, path: str) -> int | None:
        """Bytes of the file, or None when there is none."""
        with storage_errors("look at", self.locate(path)):
            info = self.filesystem.get_file_info(self._inner(path))
        return int(info.size) if info.type == pafs.FileType.File else None

    def list(self, path: str = "", *, temporary: bool = False) -> list[StoredFile]:
        """Every file below the folder ``path``, sorted by path; unfinished temporary files only with ``temporary``."""
        selector = pafs.FileSelector(self._inner(path), recursive=True, allow_not_found=True)
        with storage_errors("list", self.locate(path)):
            found = self.filesystem.get_file_info(selector)
        cut = len(self._inner("")) + 1
        files = [
            StoredFile(info.path[cut:], int(info.size), (info.mtime_ns or 0) / 1e9)
            for info in found
            if info.type == pafs.FileType.File and (temporary or not info.base_name.startswith(_TEMPORARY))
        ]
        return sorted(files, key=lambda one: one.path)

    def read_bytes(self, path: str) -> bytes:
        """The whole file.

        Raises:
            StorageError: it is missing, or may not be read.
        """
        with storage_errors("read", self.locate(path)), self.filesystem.open_input_file(self._inner(path)) as stream:
            return bytes(stream.read())

    def write_new(self, path: str, data: bytes) -> bool:
        """Write a file that must not change later.

        Returns:
            True when it was written now, False when the same bytes were there already.

        Raises:
            StorageError: other bytes stand under that name, the store is full, or may not be written.
        """
        with storage_errors("write", self.locate(path)):
            written = self._write_local(path, data) if self.is_local else self._write_object(path, data)
        if not written and self.read_bytes(path) != data:
            raise StorageError(
                f"the bank's file {self.locate(path)} would be overwritten with other contents",
                cause="two runs made the same thing differently, or the file was changed by hand",
                fix="compare the two runs; move the file away only if nothing refers to it",
            )
        return written

    def replace(self, path: str, data: bytes) -> None:
        """Give a file new contents in one step. Only for Delta logs that are cut short: nothing else changes.

        Raises:
            StorageError: the store is full or may not be written.
        """
        with storage_errors("write", self.locate(path)):
            if not self.is_local:
                with self.filesystem.open_output_stream(self._inner(path)) as stream:
                    stream.write(data)
                return
            final = Path(self._inner(path))
            with _flushed(final, data) as temporary:
                temporary.replace(final)

    def delete(self, path: str) -> None:
        """Delete one named file; nothing happens when it is not there."""
        if self.exists(path):
            with storage_errors("delete", self.locate(path)):
                self.filesystem.delete_file(self._inner(path))

    def _inner(self, path: str) -> str:
        root = self.uri.split("://", 1)[-1]
        return f"{root}/{path}" if path else root

    def _write_local(self, path: str, data: bytes) -> bool:
        final = Path(self._inner(path))
        with _flushed(final, data) as temporary:
            return _link_new(temporary, final)

    def _write_object(self, path: str, data: bytes) -> bool:
        if self.exists(path):
            return False
        with self.filesystem.open_output_stream(self._inner(path)) as stream:
            stream.write(data)
        return True


@contextlib.contextmanager
def _flushed(final: Path, data: bytes) -> Iterator[Path]:
    """``data`` on the disk under a temporary name beside ``final``; the name is gone afterwards."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(doing: str, where: str) -> Iterator[None]:
    """Turn what a store, pyarrow or deltalake raises into a :class:`StorageError` that says what to do.

    Args:
        doing: a verb ("read").
        where: the file or table, for the message.
    """
    try:
        yield
    except OSError as error:
        raise as_storage_error(error, doing, where) from error


def as_storage_error(error: Exception, doing: str, where: str) -> StorageError:
    """The :class:`StorageError` that fits ``error``."""
    scheme, remote, _ = where.partition("://")
    cause, fix = (
        (_remote_refusal(error, scheme) if remote else None)
        or _refusal(error)
        or (
            plain_cause(error),
            "check the path, the network and the credentials, then run again",
        )
    )
    return StorageError(f"the bank's storage refused to {doing} {where}", cause=cause, fix=fix)


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
_NO_CREDENTIALS = ("no credentials", "invalidaccesskeyid", "signaturedoesnotmatch", "invalid token", "expiredtoken")
_NO_RIGHT = ("access_denied", "accessdenied", "access denied", "permission denied", "forbidden", "lacked the necessary")
_NO_BUCKET = ("nosuchbucket", "no such bucket", "no_such_bucket", "the specified bucket does not exist")
_NO_ANSWER = ("network_connection", "could not connect", "connection refused", "error sending request", "dns error")


def _remote_refusal(error: Exception, scheme: str) -> tuple[str, str] | None:
    """Cause and fix of what an object store, or the way to it, answers with."""
    low, names = str(error).lower(), _CREDENTIALS.get(scheme, "the store's credentials")
    if any(word in low for word in _NO_CREDENTIALS):
        return "no credentials were found, or the store does not know them", f"set {names}"
    if any(word in low for word in _NO_BUCKET):
        return "there is no such bucket", "check the bucket's name and the region, or make the bucket"
    if any(word in low for word in _NO_RIGHT):
        return "these credentials may not touch it", f"change the bucket's policy, or set other ones: {names}"
    if any(word in low for word in _NO_ANSWER):
        return "the store does not answer", "check the network and, where it is set, AWS_ENDPOINT_URL, then run again"
    return None


def is_refusal(error: Exception) -> bool:
    """Whether the store itself refused (full, forbidden, gone), whatever library reports it."""
    return _refusal(error) is not None


def may_pass(error: Exception) -> bool:
    """Whether a second look may succeed: something was not there, or not as expected, but nothing was refused."""
    found = _refusal(error)
    return found is None or found[0] == _NOT_THERE


def _refusal(error: Exception) -> tuple[str, str] | None:
    """Cause and fix, by the error's number or, for libraries that hide it, its text."""
    number = getattr(error, "errno", None)
    text = str(error)
    if number is None and (found := _OS_ERROR.search(text)):
        number = int(found.group(1))
    low = text.lower()
    if number in _FULL or "no space left" in low or "file too large" in low:
        return "the disk or quota is full", "free some space and run the same command again: it goes on from here"
    if number in _FORBIDDEN or any(word in low for word in ("permission denied", "access denied", "forbidden")):
        return "this user may not touch it", "change its owner or mode, or the bucket's policy"
    if number in _GONE or isinstance(error, FileNotFoundError):
        return _NOT_THERE, "check the path; restore the file from a copy"
    return None


def plain_cause(error: Exception) -> str:
    """What a library says went wrong, on one line: without colours and stack frames."""
    text = _COLOURS.sub("", str(error)).split("\n   0: ", 1)[0]
    return " ".join(text.replace("↳", ":").split())[:300]


def _link_new(temporary: Path, final: Path) -> bool:
    """Give ``temporary`` its name, unless the name is taken; hard links make this one step of the file system."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
        # File systems without hard links (FAT, some network mounts): rename is atomic too, only not create-only.
        if final.exists():
            return False
        temporary.replace(final)
    return True


def _normal_uri(uri: str) -> str:
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return str(Path(text).expanduser().absolute())
    if scheme == "file":
        return str(Path(rest).absolute())
    if scheme not in _SCHEMES or not rest.strip("/"):
        raise UsageError(
            "the bank's place is not understood",
            value=text,
            cause="it is neither a path nor s3://bucket/… nor gs://bucket/…",
            fix="name a local folder, s3://bucket/prefix or gs://bucket/prefix",
        )
    return f"{scheme}://{rest.strip('/')}"


def _make_filesystem(uri: str) -> pafs.FileSystem:
    if uri.startswith("s3://"):
        endpoint, region = _s3_endpoint(), os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options = {} if endpoint is None else {"endpoint_override": endpoint}
        if region:
            options["region"] = region
        return pafs.S3FileSystem(**options)
    if uri.startswith("gs://"):
        return pafs.GcsFileSystem()
    return pafs.LocalFileSystem()


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
