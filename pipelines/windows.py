"""Event-time windows by name: ``2024-07-01T00:00:00Z`` is the window that starts then; ``undated`` comes before all."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache

from schemas.tables import UNDATED

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
