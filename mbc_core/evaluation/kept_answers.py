"""Answers of a long evaluation, kept read by read, so that a run that was cut off goes on where it stopped.

One JSON object a line. Each names what it was made of (sheet, read, base model, adapter), so a file that was made with
anything else is not used: its lines are passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mbc_core.errors import StorageError
from mbc_core.evaluation.sheet import READS, Sheet, Shown


class KeptAnswers:
    """A file of answers; reads what is there, appends what is new.

    Args:
        path: made when missing; its folder must exist. A last line that was cut short is passed over.

    Raises:
        StorageError: it can be neither read nor made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, object]] = {}
        try:
            with path.open("a+", encoding="utf-8") as stream:
                stream.seek(0)
                text = stream.read()
                if text and not text.endswith("\n"):
                    stream.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(
                "the file of kept answers cannot be used",
                value=str(path),
                cause=str(error),
                fix="name a file in a folder that may be written, or another one if this holds something else",
            ) from error
        for line in text.split("\n"):  # not splitlines: an answer may hold U+2028
            try:
                told = json.loads(line)
                self._found[told["made_of"]] = told
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, made_of: str) -> dict[str, object] | None:
        """What :meth:`add` was given for ``made_of``."""
        return self._found.get(made_of)

    def add(self, made_of: str, label: str, fields: dict[str, object]) -> None:
        """Append one read's answers."""
        told: dict[str, object] = {"made_of": made_of, "read": label, **fields}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(told, ensure_ascii=False) + "\n")
        self._found[made_of] = told


def made_of(sheet: Sheet, shown: Shown, base_digest: str, adapter: Path | None, asking: Sequence[object]) -> str:
    """sha256 (hex) of everything that the answers of one read depend on; devices and batches are left out.

    Args:
        asking: how it is asked: limits, and the ids of a prompt, which change with its form.
    """
    digest = hashlib.sha256()
    parts = (shown.fields(), [sheet.questions[place] for place in shown.questions], sheet.memory(shown))
    digest.update(json.dumps([*parts, base_digest, list(asking)], default=str).encode())
    if READS[shown.read].store in ("address", "histogram"):
        digest.update(json.dumps(sheet.codes, sort_keys=True).encode())
    files = (
        []
        if adapter is None
        else [one for kind in ("adapter_*", "projector.*", "paper.*") for one in adapter.glob(kind)]
    )
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
