"""Event-time windows by name: ``2024-07-01T00:00:00Z`` is the window that starts then; ``undated`` has no time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from mbc_core.errors import UsageError
from schemas.tables import UNDATED

DAY = 86_400
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": DAY, "w": 7 * DAY}
_LENGTH = re.compile(r"\s*([1-9][0-9]{0,8})\s*([smhdw]?)\s*", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def window_start(window: str) -> int | None:
    """Seconds since the epoch at which a named window starts; None for ``undated``.

    >>> window_start("1970-01-02T00:00:00Z")
    86400

    Raises:
        UsageError: not such a name.
    """
    if window == UNDATED:
        return None
    try:
        moment = datetime.strptime(window, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "this is not the name of a window",
            value=window,
            cause=str(error),
            fix=f"name it by its start, like 2024-07-01T00:00:00Z, or {UNDATED}",
        ) from error
    return (moment - _EPOCH) // timedelta(seconds=1)


def window_order(window: str) -> tuple[bool, int]:
    """Sort key: ``undated`` before every dated window, then by start.

    Raises:
        UsageError: not such a name.
    """
    start = window_start(window)
    return start is not None, start or 0


def parse_length(text: str, what: str = "the window length") -> int:
    """``1d``, ``6h``, ``30m``, ``2w``, ``90s`` or ``90`` → seconds.

    Args:
        what: names the thing, for the message.

    Raises:
        UsageError: anything else.
    """
    found = _LENGTH.fullmatch(text)
    if not found:
        raise UsageError(
            f"{what} cannot be read",
            value=text,
            cause="it is not a whole number followed by s, m, h, d or w",
            fix="write it like 1d, 6h or 30m",
        )
    return int(found[1]) * _UNITS[found[2].lower()]
