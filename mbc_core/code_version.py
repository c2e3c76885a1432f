"""Which code made a file: the package's version and a digest of its sources, so that cards name it without git."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


@lru_cache(1)
def code_version() -> str:
    """``<version>+<12 hex digits>``: of the installed package (``0`` when it is not), and of all Python files of
    ``mbc_core``, by name and contents.
    """
    try:
        release = version("mbc")
    except PackageNotFoundError:  # the sources were copied to a machine, not installed
        release = "0"
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\x00" + path.read_bytes() + b"\x00")
    return f"{release}+{digest.hexdigest()[:12]}"
