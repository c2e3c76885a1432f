"""Names, order and lengths of windows."""

from __future__ import annotations

import pytest

from mbc_core.errors import UsageError
from mbc_core.windows import parse_length, window_order, window_start


def test_window_lengths():
    assert [parse_length(one) for one in ("90s", "5m", "6h", "1d", " 2w ", "90")] == [
        90, 300, 21_600, 86_400, 1_209_600, 90,
    ]  # fmt: skip
    for wrong in ("", "0d", "d", "1.5d", "1y", "-1d", "²d", "1 week", "9999999999d"):
        with pytest.raises(UsageError, match=r"the window length cannot be read.*write it like 1d, 6h or 30m"):
            parse_length(wrong)


def test_windows_before_1970_come_before_later_ones_and_undated_before_all():
    names = ["undated", "0001-01-01T00:00:00Z", "1969-12-31T00:00:00Z", "1970-01-01T00:00:00Z", "2024-07-01T00:00:00Z"]
    assert [window_start(one) for one in names] == [None, -62_135_596_800, -86_400, 0, 1_719_792_000]
    assert sorted([names[2], names[4], names[0], names[3], names[1]], key=window_order) == names


def test_what_names_no_window_is_told():
    for wrong in ("", "2024-07-01", "2024-07-01T00:00:00+00:00", "Undated"):
        with pytest.raises(UsageError, match="this is not the name of a window"):
            window_start(wrong)
