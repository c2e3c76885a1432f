"""Class codes with followers: typed-out bits, a plain-loop oracle, round trips, damage, and planted mistakes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.errors import DamagedFile
from mbc_core.follow_code import FollowCode, Followers, lengths_text, read_lengths
from tests.mbc_core.class_lexicon import (
    UNARY,
    canonical,
    every_cut_reads,
    every_filling_is_passed_over,
    follow_code,
    reads_as,
)

ROWS = [[UNARY[(place - row) % 9] for place in range(9)] for row in range(9)] + [list(UNARY)]
# Behind leaders of level 0 "a follower" is 0 and class c is c+1 ones and a zero; of level 1 the sign comes last.
LISTED = [[2, 3, 4, 5, 6, 7, 8, 9, 9, 1]] * 9 + [[1, 2, 3, 4, 5, 6, 7, 8, 9, 9]] * 9
LISTS = {
    "leaders": [2, 9],
    "levels": "01",
    "sizes": [3, 1],
    "followers": [1, 3, 10, 9],
    "follower_bits": "2120",
}
FIELDS = {
    "classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8],
    "transitions": ["".join(map(str, row)) for row in ROWS],
    "members": "00000000122",
    "usual": [4] * 9,
    "listed": ["".join(map(str, row)) for row in LISTED],
    **LISTS,
}
LETTERS = FIELDS["listed"]
SMALL = FollowCode.of_fields(FIELDS)
LARGE = follow_code(60)


def test_bits_typed_out():
    cases = {
        (2,): bytes([0b110_11111]),  # the beginning is as without followers
        (2, 3): bytes([0b110_0_0_111]),  # behind 2: a follower is 0, and 3 is the first on its list
        (2, 1): bytes([0b110_0_10_11]),
        (2, 10): bytes([0b110_0_11_11]),
        (2, 0): bytes([0b110_10_111]),  # no follower of 2: class 0 is 10 there
        (2, 3, 3, 4): bytes([0b110_0_0_0_10]),  # 3 has no list: its row is the one without the sign
        (9, 9): bytes([0b11111111, 0b10_111111, 0b111_11111]),  # class 8 and its second; the sign, nothing more
        (9, 0): bytes([0b11111111, 0b10_0_11111]),
    }
    for symbols, stored in cases.items():
        assert SMALL.pack(symbols) == stored, symbols
        assert SMALL.unpack(stored) == list(symbols)


def test_bits_of_a_symbol_depend_on_the_one_before():
    assert [SMALL.after(2, one) for one in (3, 1, 10, 0, 8)] == [2, 3, 3, 2, 9 + 1]
    assert [SMALL.after(9, one) for one in (9, 0, 10)] == [9, 1, 9 + 2]
    assert [SMALL.after(before, 3) for before in (None, 3, 0)] == [4, 1, 4], "as without followers"
    assert sequence_bits(SMALL, [2, 10, 10, 2, 3]) == 3 + 3 + 3 + 4 + 2


def plain_codes(code: FollowCode, before: int | None) -> tuple[list[str], dict[int, str]]:
    """Code of every symbol behind ``before`` by its class, and of the followers, as text."""
    classes, lists = code.classes.tolist(), code.followers
    count = max(classes) + 1
    leader = None if before is None else next((at for at, one in enumerate(lists.leaders) if one == before), None)
    if leader is None:
        steps = canonical(code.transitions[-1 if before is None else classes[before]].tolist())
    else:
        steps = canonical(code.listed[int(lists.levels[leader]) * count + classes[before]].tolist())
    made = []
    for symbol, own in enumerate(classes):
        members = [other for other, of in enumerate(classes) if of == own]
        inner = canonical([int(code.members[one]) for one in members]) if len(members) > 1 else [""]
        made.append(steps[own] + inner[members.index(symbol)])
    if leader is None:
        return made, {}
    start = sum(lists.sizes[:leader].tolist())
    own = slice(start, start + int(lists.sizes[leader]))
    inner = canonical(lists.bits[own].tolist()) if lists.sizes[leader] > 1 else [""]
    return made, {int(one): steps[count] + code for one, code in zip(lists.symbols[own], inner, strict=True)}


TABLE = {before: plain_codes(LARGE, before) for before in (None, *range(60))}


def plain_pack(symbols: list[int]) -> bytes:
    bits = ""
    for before, one in zip([None, *symbols], symbols, strict=False):
        by_class, followers = TABLE[before]
        bits += followers.get(one, by_class[one])
    bits += "1" * (-len(bits) % 8)
    return bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))


def plain_unpack(stored: bytes) -> list[int] | None:
    """Symbols, or None when what is left is no filling."""
    bits, symbols = "".join(format(byte, "08b") for byte in stored), []
    while True:
        by_class, followers = TABLE[symbols[-1] if symbols else None]
        codes = [*enumerate(by_class), *followers.items()]
        found = [(one, code) for one, code in codes if bits.startswith(code)]
        if not found:
            return symbols if len(bits) < 8 and "0" not in bits else None
        assert len(found) == 1, "no code begins another"
        symbols.append(found[0][0])
        bits = bits[len(found[0][1]) :]


SYMBOLS = st.lists(st.integers(0, 59), max_size=40)


@given(SYMBOLS)
def test_pack_is_the_plain_loops_and_comes_back(symbols):
    stored = LARGE.pack(symbols)
    assert stored == plain_pack(symbols)
    assert LARGE.unpack(stored) == symbols
    assert len(stored) == math.ceil(sequence_bits(LARGE, symbols) / 8)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int64])
def test_numbers_of_numpy_are_priced_alike(kind):
    code = follow_code(261)
    symbols = np.array([250, 255, 3, 250, 0, 249], dtype=kind)
    assert sequence_bits(code, symbols) == sequence_bits(code, symbols.tolist())
    leader = np.repeat(code.followers.leaders, code.followers.sizes)
    pairs = [(one, of) for one, of in zip(leader.tolist(), code.followers.symbols.tolist(), strict=True) if of < 256]
    assert [code.after(kind(one), kind(of)) for one, of in pairs if one < 256] == [
        code.after(one, of) for one, of in pairs if one < 256
    ]


@given(SYMBOLS, st.integers(0, 3), st.integers(1, 3))
def test_codes_of_every_kind_come_back(symbols, seed, levels):
    code = follow_code(60, seed, levels=levels)
    assert code.unpack(code.pack(np.array(symbols, dtype=np.uint16))) == symbols


@given(st.lists(st.integers(0, len(LARGE.followers.symbols) - 1), min_size=1, max_size=10))
def test_pairs_on_lists_come_back(places):
    lists = LARGE.followers
    leader = np.repeat(lists.leaders, lists.sizes)
    symbols = [int(one) for at in places for one in (leader[at], lists.symbols[at])]
    stored = LARGE.pack(symbols)
    assert stored == plain_pack(symbols) and LARGE.unpack(stored) == symbols


@given(st.binary(max_size=12))
def test_any_bytes_are_symbols_of_the_plain_loop_or_damage(stored):
    reads_as(LARGE, stored, plain_unpack(stored))


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12))
def test_every_cut_gives_the_first_symbols_or_damage(symbols):
    every_cut_reads(LARGE, plain_unpack, symbols)


def test_a_code_that_ends_after_the_sign_is_damage():
    stored = SMALL.pack([2, 2, 2, 3])
    assert SMALL.after(2, 2) == 4 and len(stored) == 2
    sign = bytes([0b110_1110_1, 0b110_0_1111])  # as before, but behind the sign a second one that no list has whole
    assert SMALL.unpack(sign[:1] + bytes([0b110_0_10_11])) == [2, 2, 2, 1]
    assert SMALL.unpack(sign) == [2, 2, 2, 10]
    ends = SMALL.pack([2, 2, 2])[:1] + bytes([0b110_1110_0])
    with pytest.raises(DamagedFile, match="2 bytes, of which the last 1 bits are no code"):
        SMALL.unpack(ends)


def test_filling_of_every_length_reads_as_no_symbol():
    every_filling_is_passed_over(LARGE, 60)


def test_fields_come_back_through_json():
    again = FollowCode.of_fields(json.loads(json.dumps(LARGE.fields())))
    assert again.fields() == LARGE.fields()
    assert again.pack([5, 8, 59, 0]) == LARGE.pack([5, 8, 59, 0])


def test_a_planted_mistake_is_seen_by_the_plain_loop():
    """The oracle tells lists apart: exchange two followers' lengths, a level, or leave one follower out."""
    changes = (
        {"follower_bits": "1220"},
        {"levels": "11"},
        {"sizes": [2, 1], "followers": [1, 3, 9], "follower_bits": "110"},
    )
    texts = [[2, one] for one in range(11)]
    for change in changes:
        other = FollowCode.of_fields({**FIELDS, **change})
        assert [other.pack(text) for text in texts] != [SMALL.pack(text) for text in texts]
        assert all(other.unpack(other.pack(text)) == text for text in texts)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"listed": []}, "9 classes need 9 rows of 10 lengths a level"),
        ({"listed": LETTERS[:-1]}, "9 classes need 9 rows of 10 lengths a level"),
        ({"listed": [*LETTERS[:-1], LETTERS[0][:-1]]}, "9 classes need 9 rows of 10 lengths a level"),
        ({"listed": [*LETTERS[:-1], "8" * 10]}, "complete prefix code"),
        ({"listed": [*LETTERS[:-1], "3333334444"]}, "at least 8 bits"),
        ({"listed": [*LETTERS[:-1], "1334445677"]}, "at least 8 bits"),  # seven ones of filling would be a symbol
        ({"listed": [*LETTERS[:-1], "0123456788"]}, "1 to 32 bits"),
        ({"listed": [*LETTERS[:-1], "123456789é"]}, "letters 0 to 9 and a to w"),
        ({"listed": LETTERS[:9]}, "levels of leaders must be 0 to 0"),
        ({"levels": "02"}, "levels of leaders must be 0 to 1"),
        ({"levels": "0"}, "every leader needs a level and a size"),
        ({"leaders": [], "levels": "", "sizes": [], "followers": [], "follower_bits": ""}, "there must be a leader"),
        ({"leaders": [9, 2]}, "leaders must be symbols, 0 to 10, ascending"),
        ({"leaders": [2, 11]}, "leaders must be symbols, 0 to 10, ascending"),
        ({"leaders": [-1, 9]}, "leaders must be symbols, 0 to 10, ascending"),
        ({"leaders": [2.0, 9.5]}, "a list of whole numbers"),
        ({"followers": [1, 1, 10, 9]}, "followers must be symbols, 0 to 10, ascending"),
        ({"followers": [1, 3, 11, 9]}, "followers must be symbols, 0 to 10, ascending"),
        ({"followers": [-1, 3, 10, 9]}, "followers must be symbols, 0 to 10, ascending"),
        ({"sizes": [4, 0]}, "every leader needs a follower"),
        ({"sizes": [3, 2]}, "every follower a length"),
        ({"sizes": [3 + 2**63 - 1, 1]}, "whole numbers|every leader needs a follower"),
        (
            {"leaders": [2, 3, 4, 9], "levels": "0000", "sizes": [2**62, 2**62, 2**62, 2**62 + 4]},
            "every leader needs a follower",
        ),
        ({"follower_bits": "212"}, "every follower a length"),
        ({"follower_bits": "2121"}, "alone takes no bits in its list"),
        ({"follower_bits": "2220"}, "a leader's followers do not make a complete prefix code"),
        ({"follower_bits": "2020"}, "lengths of followers must be 1 to 32 bits"),
        ({"follower_bits": "2x20"}, "letters 0 to 9 and a to w"),
        ({"members": "00000000123"}, "complete prefix code"),
    ],
)
def test_fields_that_make_no_code_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        FollowCode.of_fields({**FIELDS, **change})


def test_lengths_that_are_no_text_are_refused():
    with pytest.raises(TypeError, match="letters in a text, not list"):
        FollowCode.of_fields({**FIELDS, "members": [0] * 11})


@given(st.lists(st.integers(0, 32)))
def test_lengths_come_back_from_their_letters(lengths):
    text = lengths_text(np.array(lengths, dtype=np.int64))
    assert text == "".join("0123456789abcdefghijklmnopqrstuvw"[one] for one in lengths)
    assert read_lengths(text).tolist() == lengths


@pytest.mark.parametrize("name", ["listed", *LISTS])
def test_a_missing_field_is_refused(name):
    with pytest.raises(KeyError, match=name):
        FollowCode.of_fields({other: value for other, value in FIELDS.items() if other != name})


def test_lists_come_back():
    assert Followers.of_fields(LISTS).fields() == LISTS


@given(SYMBOLS)
def test_without_pairs_on_lists_only_the_rows_differ(symbols):
    """Symbols without a list are written bit for bit as by the class code alone."""
    free = [one for one in symbols if one % 3 == 2]
    alone = ClassCode(*(getattr(LARGE, name).tolist() for name in ("classes", "transitions", "members", "usual")))
    assert LARGE.pack(free) == alone.pack(free)
