"""Event-time windows by name: ``2024-07-01T00:00:00Z`` is the window that starts then; ``undated`` comes before all."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from mbc_core.errors import UsageError
from schemas.tables import UNDATED

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_LENGTH = re.compile(r"\s*([1-9][0-9]{0,8})\s*([smhdw])\s*")


def window_of(event_time: int | None, window_seconds: int) -> str:
    """Name of the window that holds ``event_time`` (microseconds since the epoch, UTC).

    >>> window_of(1_719_900_000_000_000, 86_400)
    '2024-07-02T00:00:00Z'
    """
    return UNDATED if event_time is None else _name(event_time // (window_seconds * 1_000_000), window_seconds)


@lru_cache(maxsize=4096)
def _name(number: int, window_seconds: int) -> str:
    try:
        start = _EPOCH + timedelta(seconds=number * window_seconds)
    except OverflowError:  # the window would start before year 1: its name is the first moment there is
        start = datetime.min.replace(tzinfo=UTC)
    return start.isoformat().replace("+00:00", "Z")


def parse_length(text: str) -> int:
    """``1d``, ``6h``, ``30m``, ``2w`` or ``90s`` → seconds.

    Raises:
        UsageError: anything else.
    """
    found = _LENGTH.fullmatch(text)
    if not found:
        raise UsageError(
            "the window length cannot be read",
            value=text,
            cause="it is not a whole number followed by s, m, h, d or w",
            fix="write it like 1d, 6h or 30m",
        )
    return int(found[1]) * _UNITS[found[2]]
