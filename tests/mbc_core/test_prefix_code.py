"""Canonical Huffman codes: typed-out bits, optimality against the entropy, and round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.errors import DamagedFile
from mbc_core.prefix_code import PrefixCode

# Lengths 1 … 8, 8: symbol n is n ones and a zero, the last one eight ones.
UNARY = PrefixCode([1, 2, 3, 4, 5, 6, 7, 8, 8])


def test_bits_typed_out():
    assert UNARY.pack([0, 2, 1]) == bytes([0b0_110_10_11]), "two ones fill the byte"
    assert UNARY.pack([8]) == bytes([0b11111111])
    assert UNARY.pack([7, 0]) == bytes([0b11111110, 0b01111111])
    assert UNARY.pack([]) == b""
    assert UNARY.unpack(bytes([0b01101011])) == [0, 2, 1]


def test_equal_lengths_are_numbers_in_order():
    code = PrefixCode([9] * 508 + [8, 9, 9])
    assert code.pack([508]) == bytes([0]), "shorter codes come first"
    assert code.pack([0]) == bytes([0b00000001, 0b01111111]), "000000010, then ones"
    assert code.pack([510]) == bytes([255, 255])


@given(st.lists(st.integers(0, 8), max_size=40))
def test_round_trip(symbols):
    stored = UNARY.pack(symbols)
    assert UNARY.unpack(stored) == symbols
    assert len(stored) == -(-sum(UNARY.lengths[symbols]) // 8)


@given(st.lists(st.floats(1e-3, 1e6), min_size=200, max_size=300), st.data())
def test_huffman_is_within_a_bit_of_the_entropy_and_round_trips(counts, data):
    try:
        code = PrefixCode.from_counts(counts)
    except ValueError:  # a code of more than 32 bits
        return
    share = np.array(counts) / sum(counts)
    entropy = float(-(share * np.log2(share)).sum())
    assert entropy - 1e-9 <= float((share * code.lengths).sum()) < entropy + 1
    symbols = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=10))
    assert code.unpack(code.pack(symbols)) == symbols


def test_huffman_lengths_typed_out():
    counts = [2.0**-n for n in range(1, 9)] + [2.0**-8]
    assert PrefixCode.from_counts(counts).lengths.tolist() == UNARY.lengths.tolist()


def test_a_lost_byte_is_damage():
    code = PrefixCode([9] * 512)
    with pytest.raises(DamagedFile, match="the word codes of a passage are not whole: '1 bytes, of which the last 8"):
        code.unpack(code.pack([3])[:1])
    with pytest.raises(DamagedFile, match="not whole: '2 bytes, of which the last 7"):
        code.unpack(bytes([0, 0]))


@pytest.mark.parametrize(
    ("lengths", "why"),
    [
        ([], "1 to 32 bits"),
        ([0] * 256, "1 to 32 bits"),
        ([33] * 4, "1 to 32 bits"),
        ([8] * 255, "complete prefix code"),
        ([8] * 257, "complete prefix code"),
        ([1, 1], "at least 8 bits"),
    ],
)
def test_lengths_that_make_no_code(lengths, why):
    with pytest.raises(ValueError, match=why):
        PrefixCode(lengths)


def test_counts_must_be_positive():
    with pytest.raises(ValueError, match="positive count"):
        PrefixCode.from_counts([1.0] * 300 + [0.0])
