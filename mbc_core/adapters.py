"""The adapters of a bank: immutable folders, and a table that says which one is live for which base model.

A version's folder holds ``adapter_model.safetensors``, ``adapter_config.json`` and, written last, ``card.json``,
which carries the digests of the other two; the version's name carries the card's digest. So from the name down
everything is checked when it is loaded. The table ``adapters/live`` only grows: a promotion or rollback is a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mbc_core.errors import DamagedFile, LostRace, MbcError, UsageError
from mbc_core.lineage import Lineage, check_lineage
from schemas.tables import LIVE_ADAPTER

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank

FILES = ("adapter_model.safetensors", "adapter_config.json")
CARD = "card.json"
LIVE = "adapters/live"
_FOLDER = "adapters"
_VERSION = re.compile(r"\d{4,}-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter version.

    Attributes:
        version: its name, ``0001-<16 hex digits>``.
        base_digest: digest of the language model it belongs to.
        card: how it was made, with before and after figures; JSON values.
        live: whether it is the live one of its base model.
        state: ``live``; ``earlier``, which a rollback may come back to; ``rolled back``; or ``candidate``.
    """

    version: str
    base_digest: str
    card: dict[str, Any]
    live: bool
    state: str = "candidate"

    @property
    def lineage(self) -> Lineage:
        """Where it comes from, and what the gate said of it."""
        return Lineage.of(self.card)


class AdapterRegistry:
    """Candidates, promotions and rollbacks in ``<bank>/adapters``."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._storage = bank.storage

    def save_candidate(self, files: Mapping[str, bytes], card: Mapping[str, Any], base_digest: str) -> str:
        """Write an adapter that is not live yet.

        Args:
            files: exactly the names in :data:`FILES` → their bytes, as peft saves them.
            card: how it was made (JSON values).
            base_digest: digest of the language model it was trained on.

        Returns:
            The version's name.

        Raises:
            UsageError: a file is missing or unknown, or a judged adapter's card lacks its lineage.
            StorageError: the store is full or may not be written.
        """
        if set(files) != set(FILES) or not base_digest:
            raise UsageError(
                "this is not an adapter's folder",
                value=sorted(files),
                cause="a file is missing or unknown, or the base model's digest is empty",
                fix=f"give exactly {' and '.join(FILES)}, as peft saves them, and the base model's digest",
            )
        full = {
            **card,
            "base_digest": base_digest,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        }
        check_lineage(full)
        text = (json.dumps(full, indent=2, sort_keys=True) + "\n").encode()
        number = 1 + max((int(version.split("-")[0]) for version in self.versions()), default=0)
        version = f"{number:04d}-{_card_digest(text)}"
        for name, data in files.items():
            self._storage.write_new(f"{_FOLDER}/{version}/{name}", data)
        self._storage.write_new(f"{_FOLDER}/{version}/{CARD}", text)
        return version

    def save_candidate_folder(self, folder: Path, card: Mapping[str, Any], base_digest: str) -> str:
        """:meth:`save_candidate` from a folder that peft wrote; other files in it are left out."""
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UsageError(
                "the adapter's folder lacks a file",
                value=missing,
                cause=f"{folder} was not written by save_pretrained, or writing it was interrupted",
                fix="train the adapter again",
            )
        return self.save_candidate({name: (folder / name).read_bytes() for name in FILES}, card, base_digest)

    def versions(self) -> list[str]:
        """Names of all whole versions, oldest first."""
        suffix = f"/{CARD}"
        paths = [one.path.removeprefix(f"{_FOLDER}/") for one in self._storage.list(_FOLDER)]
        names = [path.removesuffix(suffix) for path in paths if path.endswith(suffix)]
        return sorted((name for name in names if _VERSION.fullmatch(name)), key=lambda name: (int(name[:-17]), name))

    def info(self, version: str) -> AdapterInfo:
        """One version's card.

        Raises:
            UsageError: no such version.
            DamagedFile: the card does not match its digest.
        """
        return self._info(version, self._all_rows())

    def files(self, version: str) -> dict[str, bytes]:
        """The contents of a version's files by name, digests checked.

        Raises:
            UsageError: no such version.
            DamagedFile: a file is missing or does not match its digest.
        """
        recorded = self._card(version)["files"]
        found = {}
        for name in FILES:
            path = f"{_FOLDER}/{version}/{name}"
            data = self._storage.read_bytes(path) if self._storage.exists(path) else b""
            if hashlib.sha256(data).hexdigest() != recorded.get(name):
                raise DamagedFile(
                    f"the adapter's file {self._storage.locate(path)} does not match its digest",
                    cause="it is missing, was cut short or was edited",
                    fix="restore it from a copy, or roll back: mbc adapters rollback",
                )
            found[name] = data
        return found

    def load(self, version: str, into: Path) -> Path:
        """Copy a version into the local folder ``into/<version>``, checked, for peft to load; returns that folder."""
        folder = into / version
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files(version).items():
            (folder / name).write_bytes(data)
        return folder

    def live(self, base_digest: str, as_of: int | None = None) -> str | None:
        """The live version for a base model, or None when the release's own adapter is to be used.

        Args:
            as_of: microseconds since the epoch: the one that was live then. None: now.
        """
        stack = _stack(self._rows(base_digest, as_of))
        return stack[-1] if stack else None

    def newest_live(self) -> str | None:
        """The live version of the base model that was promoted or rolled back last; None when none is live."""
        rows = self._bank.read(LIVE).sort_by("added_at").to_pylist()
        return self.live(rows[-1]["base_digest"]) if rows else None

    def promoted_bases(self) -> list[str]:
        """Digests of the base models for which an adapter was ever promoted, or else of all adapters' base models."""
        promoted = {str(row["base_digest"]) for row in self._all_rows()}
        return sorted(promoted or {info.base_digest for info in self.list()})

    def promote(self, version: str, reason: str, *, expected: str | EllipsisType | None = ...) -> None:
        """Make a version live for its base model, after checking its files.

        Args:
            expected: the version that must be live until then, None for the release's own adapter: the one that the
                version was compared with. Left out, whatever is live is replaced.

        Raises:
            UsageError: no such version.
            DamagedFile: its files are damaged.
            LostRace: another promotion or rollback came between.
        """
        base = str(self._card(version)["base_digest"])
        self.files(version)
        rows = self._rows(base, None)
        live = next(reversed(_stack(rows)), None)
        if expected is not ... and live != expected:
            raise LostRace(
                f"adapter {version} was not compared with the adapter that is live",
                value=live,
                cause=f"it was compared with {expected or 'the one that comes with the release'}; another promotion"
                " or rollback came between",
                fix="adapt again: it stays a candidate, and `mbc adapters promote` makes it live by hand",
            )
        self._append(base, version, "promote", reason, rows)

    def rollback(self, base_digest: str, reason: str) -> str | None:
        """Make live again what was live before the newest promotion that still stands.

        Returns:
            The version that is live now; None for the release's own adapter.

        Raises:
            UsageError: no adapter was promoted for this base model.
            DamagedFile: the files of the earlier one are damaged.
            LostRace: another promotion or rollback came between.
        """
        rows = self._rows(base_digest, None)
        stack = _stack(rows)
        if not stack:
            raise UsageError(
                "there is no adapter to roll back",
                value=base_digest[:12],
                cause="none was promoted for this base model, or all were rolled back",
                fix="see `mbc adapters list`",
            )
        target = stack[-2] if len(stack) > 1 else None
        if target is not None:
            self.files(target)
        self._append(base_digest, target, "rollback", reason, rows)
        return target

    def ancestors(self, version: str) -> list[str]:
        """The versions that this one descends from, its parent first; ends with ``shipped``, a folder or nothing.

        Raises:
            UsageError: no such version. DamagedFile: a card does not match its digest.
        """
        found: list[str] = []
        known = set(self.versions())
        parent = self.info(version).lineage.parent
        while parent is not None and parent not in found:
            found.append(parent)
            parent = Lineage.of(self._card(parent)).parent if parent in known else None
        return found

    def problems(self) -> list[str]:
        """Faults of all versions, a line each; for ``mbc inspect --verify``."""
        found = []
        whole = self.versions()
        for version in whole:
            try:
                self.files(version)
                parent = Lineage.of(self._card(version)).parent
                if parent is not None and _VERSION.fullmatch(parent) and parent not in whole:
                    found.append(f"adapter {version} descends from {parent}, whose folder is gone.")
            except MbcError as error:
                found.append(str(error))
        live = {row["version"] for row in self._bank.read(LIVE).to_pylist() if row["version"]}
        return [*found, *(f"adapter {version} was made live, but its folder is gone." for version in live - set(whole))]

    def _card(self, version: str) -> dict[str, Any]:
        path = f"{_FOLDER}/{version}/{CARD}"
        if not _VERSION.fullmatch(version) or not self._storage.exists(path):
            raise UsageError(
                "the bank has no such adapter",
                value=version,
                cause="the name is wrong, or writing the adapter was interrupted",
                fix="see `mbc adapters list`",
            )
        text = self._storage.read_bytes(path)
        if _card_digest(text) != version.split("-")[1]:
            raise DamagedFile(
                f"the adapter's card {self._storage.locate(path)} does not match its digest",
                cause="it was cut short or edited",
                fix="restore it from a copy, or roll back: mbc adapters rollback",
            )
        card: dict[str, Any] = json.loads(text)
        return card

    def _info(self, version: str, rows: list[dict[str, Any]]) -> AdapterInfo:
        card = self._card(version)
        mine = [row for row in rows if row["base_digest"] == card["base_digest"]]
        stack = _stack(mine)
        promoted = any(row["version"] == version and row["action"] == "promote" for row in mine)
        state = "earlier" if version in stack else "rolled back" if promoted else "candidate"
        live = bool(stack) and stack[-1] == version
        return AdapterInfo(version, str(card["base_digest"]), card, live, "live" if live else state)

    def _all_rows(self, as_of: int | None = None) -> list[dict[str, Any]]:
        """Promotions and rollbacks of all base models, oldest first."""
        rows = self._bank.read(LIVE)
        moments = rows["added_at"].cast(pa.int64()).to_pylist()
        pairs = sorted(zip(moments, rows.to_pylist(), strict=True), key=lambda pair: pair[0])
        return [row for moment, row in pairs if as_of is None or moment <= as_of]

    def _rows(self, base_digest: str, as_of: int | None) -> list[dict[str, Any]]:
        return [row for row in self._all_rows(as_of) if row["base_digest"] == base_digest]

    def _append(
        self, base_digest: str, version: str | None, action: str, reason: str, before: list[dict[str, Any]]
    ) -> None:
        """Add a row behind ``before``, the rows that were looked at, or fail when another one came between."""
        from mbc_core.bank.commit import commit_files
        from mbc_core.bank.slices import write_rows

        last = int(before[-1]["added_at"].timestamp() * 1e6) if before else 0
        row = {
            "base_digest": base_digest,
            "version": version,
            "action": action,
            "reason": reason,
            "added_at": max(time.time_ns() // 1000, last + 1),
        }
        file = write_rows(self._bank, LIVE, pa.Table.from_pylist([row], LIVE_ADAPTER), f"{len(before):05d}")
        # The number of earlier changes is the commit's version: of two changes at once the second is refused.
        if commit_files(self._bank, LIVE, [file], f"live/{base_digest}", len(before)):
            return
        if file.path not in dict(self._bank.files(LIVE)):  # else it was this one, and only the answer was lost
            self._storage.delete(f"{LIVE}/{file.path}")
            raise LostRace(
                "the live adapter was changed by someone else at the same moment",
                value=self.live(base_digest),
                cause="two promotions or rollbacks ran at once",
                fix="look at `mbc adapters list` and decide again",
            )

    def list(self) -> list[AdapterInfo]:
        """All versions, oldest first, their cards checked."""
        rows = self._all_rows()
        return [self._info(version, rows) for version in self.versions()]


def _stack(rows: list[dict[str, Any]]) -> list[str]:
    """Promotions that still stand, oldest first: a rollback takes the newest one away."""
    stack: list[str] = []
    for row in rows:
        if row["action"] == "promote":
            stack.append(row["version"])
        elif stack:
            stack.pop()
    return stack


def _card_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
