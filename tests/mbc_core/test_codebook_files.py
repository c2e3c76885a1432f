"""A codebook version's file: equal contents give equal bytes, and nothing damaged is read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from codebook_data import four_by_five

from mbc_core.codebook.files import Codebook
from mbc_core.errors import DamagedFile, UsageError


def third_version() -> Codebook:
    return replace(
        four_by_five((1.0, 2.5, 3.0, 4.0)),
        version=3,
        parent=2,
        reset_at=np.array([0, 3, 0, 1], np.int32),
        built_from=("2024-07-01T00:00:00Z", "2024-07-09T00:00:00Z"),
        last_window="2024-07-09T00:00:00Z",
        vectors_seen=123_456,
    )


def test_round_trip():
    book = third_version()
    again = Codebook.from_bytes(book.to_bytes(), "here", digest=book.digest)
    for name in ("version", "parent", "built_from", "last_window", "vectors_seen", "digest"):
        assert getattr(again, name) == getattr(book, name)
    for name in ("codewords", "count", "sum", "reset_at"):
        found, wanted = getattr(again, name), getattr(book, name)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


def test_first_version_has_no_parent_and_no_windows():
    book = four_by_five((1.0, 2.0, 3.0, 4.0))
    again = Codebook.from_bytes(book.to_bytes(), "here")
    assert (again.version, again.parent, again.built_from, again.last_window) == (0, None, (), None)
    assert again.sum.tolist() == [[1, 0, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 4, 0]]
    assert (again.size, again.width) == (4, 5)


def test_equal_codebooks_give_equal_bytes():
    """safetensors alone would write several metadata entries in random order."""
    assert len({third_version().to_bytes() for _ in range(30)}) == 1
    assert third_version().digest == hashlib.sha256(third_version().to_bytes()).hexdigest()
    assert replace(third_version(), vectors_seen=1).digest != third_version().digest


def test_another_digest_is_refused():
    book = third_version()
    data = bytearray(book.to_bytes())
    data[-1] ^= 1
    with pytest.raises(DamagedFile, match=re.escape("codebooks/00003 does not match its digest")):
        Codebook.from_bytes(bytes(data), "codebooks/00003", digest=book.digest)


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_a_cut_file_is_refused(cut):
    with pytest.raises(DamagedFile, match="the file here cannot be read"):
        Codebook.from_bytes(third_version().to_bytes()[:cut], "here")


def test_impossible_numbers_are_refused():
    with pytest.raises(DamagedFile, match="version 0 holds an impossible number: 'code 2, count 0"):
        four_by_five((1.0, 1.0, 0.0, 1.0))
    with pytest.raises(DamagedFile, match="impossible number"):
        replace(four_by_five(), codewords=np.full((4, 5), np.nan, np.float32))
    with pytest.raises(UsageError, match="unusable number of codewords: 513"):
        Codebook.first(np.zeros((513, 2), np.float32), np.ones(513))
    with pytest.raises(UsageError, match="wrong shape or dtype of the codebook's counts"):
        Codebook.first(np.zeros((4, 2), np.float32), np.ones(3))
