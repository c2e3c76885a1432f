"""The bank's manifest: what a reader must know before it may touch a code. Written once, compared on open."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import asdict, dataclass, field, fields

from mbc_core.errors import DamagedFile, IncompatibleBank, UsageError
from schemas.tables import FORMAT_VERSION

_SALT = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Profile:
    """How many codes a passage gets: ``slots`` (paper symbol T) address codes and at most ``words`` word codes."""

    name: str
    slots: int
    words: int


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("paper", 12, 0),
        Profile("compact", 24, 12),
        Profile("default", 24, 24),
        Profile("rich", 24, 41),
    )
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that gives a stored code its meaning.

    Attributes:
        encoder: id of the encoder, e.g. ``all-MiniLM-L6-v2@1a2b3c4d5e6f/bfloat16/sentences-256``
            (model digest, precision, passage rule).
        salience: digest of the head that chooses word codes; empty when the profile has none.
        slots, codewords, width: T, K and d_c of the paper; slots · width is the embedding's width.
        words: most word codes a passage.
        rotation, lexicon: sha256 digests (hex); lexicon is empty when words == 0.
        window_seconds: length of an event-time window.
        key_salt: 16 random bytes (hex) that key the document hashes.
    """

    profile: str
    encoder: str
    slots: int
    codewords: int
    width: int
    words: int
    rotation: str
    salience: str = ""
    lexicon: str = ""
    window_seconds: int = 86_400
    key_salt: str = field(default_factory=lambda: secrets.token_hex(16))
    format_version: int = FORMAT_VERSION

    @property
    def salt(self) -> bytes:
        """The 16 bytes that key document hashes."""
        return bytes.fromhex(self.key_salt)

    def to_json(self) -> str:
        """Stable, indented JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read a manifest.

        Raises:
            DamagedFile: not the JSON of a manifest.
            IncompatibleBank: written by another format version.
        """
        try:
            found = json.loads(text)
            version = found["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedFile(
                f"the bank's manifest {where} cannot be read",
                cause=f"not a manifest's JSON ({error})",
                fix="restore manifest.json from a copy; without it the codes have no meaning",
            ) from error
        if version != FORMAT_VERSION:
            raise IncompatibleBank(
                "the bank has another format version",
                value=version,
                cause=f"this release reads version {FORMAT_VERSION}",
                fix="use the release that wrote it, or ingest again into a new bank",
            )
        names = {one.name for one in fields(cls)}
        if set(found) != names:
            raise DamagedFile(
                f"the bank's manifest {where} has missing or unknown fields",
                value=sorted(set(found) ^ names),
                cause="it was edited by hand or cut short",
                fix="restore manifest.json from a copy",
            )
        wrong = [one.name for one in fields(cls) if type(found[one.name]).__name__ != one.type]
        if wrong or not _SALT.fullmatch(found["key_salt"]):
            raise DamagedFile(
                f"the bank's manifest {where} holds a value of the wrong kind",
                value=wrong or "key_salt",
                cause="it was edited by hand",
                fix="restore manifest.json from a copy",
            )
        return cls(**found)

    def require_same(self, wanted: Manifest, where: str) -> None:
        """Refuse, by name, to use this bank with what ``wanted`` describes (the salt is the bank's own).

        Raises:
            UsageError: the first field that differs, with both values.
        """
        for one in fields(self):
            ours, theirs = getattr(self, one.name), getattr(wanted, one.name)
            if one.name != "key_salt" and ours != theirs:
                raise UsageError(
                    f"the bank {where} was made with another {one.name}",
                    value=ours,
                    cause=f"this run would use {theirs!r}",
                    fix=f"use the {one.name} the bank was made with, or name a new bank",
                )
