"""The one small family of errors that this project raises on purpose.

Every message names the thing, shows its value, gives the likely cause and the fix, so that a person can act
on it without reading code. Programs catch :class:`MbcError`, or one of its children.
"""

from __future__ import annotations

_UNSET = object()
_SHOWN = 120


class MbcError(Exception):
    """Base of the family: ``thing: value. Likely cause: cause. Fix: fix.``

    Args:
        thing: what is wrong, as a short clause ("the timestamp cannot be read").
        value: the offending value, shown shortened; left out when not given.
        cause: the likely cause, one clause.
        fix: what the reader can do about it, one clause.
    """

    exit_code = 1

    def __init__(self, thing: str, *, value: object = _UNSET, cause: str = "", fix: str = "") -> None:
        self.thing, self.cause, self.fix = thing, cause, fix
        self.value = None if value is _UNSET else value
        parts = [thing if value is _UNSET else f"{thing}: {_short(value)}"]
        if cause:
            parts.append(f"Likely cause: {cause}")
        if fix:
            parts.append(f"Fix: {fix}")
        super().__init__(". ".join(part.rstrip(". ") for part in parts) + ".")


class UsageError(MbcError):
    """A wrong option or argument: stops before any work is done (exit code 2)."""

    exit_code = 2


class BadDocument(MbcError):
    """One document cannot be ingested; it goes to the dead letter under ``reason``.

    Args:
        reason: one of ``schemas.tables.DEAD_LETTER_REASONS``.
    """

    def __init__(self, reason: str, thing: str, *, value: object = _UNSET, cause: str = "", fix: str = "") -> None:
        super().__init__(thing, value=value, cause=cause, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_bad_document, (self.reason, str(self))


class IncompatibleBank(MbcError):
    """The bank was made by something this reader or writer cannot use (another encoder, T, lexicon, format)."""


class DamagedFile(MbcError):
    """A stored file does not match its digest, size or format."""


class AssetError(MbcError):
    """A model or corpus could not be fetched, checked or unpacked."""


class StorageError(MbcError):
    """Storage refused: full, no permission, vanished, or lost a race too often."""


class LostRace(StorageError):
    """Another run made the same thing differently at the same moment: trying again goes on from what it made."""


class ModelError(MbcError):
    """A model cannot be used as asked (missing projections, wrong width, missing weights)."""


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}… ({len(shown)} characters)"


def _rebuild_bad_document(reason: str, message: str) -> BadDocument:
    return BadDocument(reason, message)
