"""Event-time windows by name: ``2024-07-01T00:00:00Z`` is the window that starts then; ``undated`` has no time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from mbc_core.errors import UsageError
from schemas.tables import UNDATED

DAY = 86_400
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
