"""Class bigram codes: typed-out bits, a plain-loop oracle, round trips, damage, and the entropy of the model."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.errors import DamagedFile
from mbc_core.prefix_code import LONGEST
from tests.mbc_core.class_lexicon import (
    UNARY,
    canonical,
    class_code,
    every_cut_reads,
    every_filling_is_passed_over,
    follow_code,
    reads_as,
)

# Nine classes: 0 to 7 of one symbol each, 8 of three (lengths 1, 2, 2). After class c the nearest code is c's own.
ROWS = [[UNARY[(place - row) % 9] for place in range(9)] for row in range(9)] + [list(UNARY)]
SMALL = ClassCode([0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8], ROWS, [0] * 8 + [1, 2, 2], [4] * 9)
LARGE = class_code(60)


def test_bits_typed_out():
    assert SMALL.pack([]) == b"" and SMALL.unpack(b"") == []
    # At the beginning class n is n ones and a zero, the last one eight ones.
    assert SMALL.pack([2]) == bytes([0b110_11111])
    assert SMALL.pack([2, 2, 3]) == bytes([0b110_0_10_11]), "after class 2, class 2 is 0 and class 3 is 10"
    assert SMALL.pack([8]) == bytes([0b11111111, 0b0_1111111]), "class 8, then its first member"
    assert SMALL.pack([10, 9, 0]) == bytes([0b11111111, 0b11_0_10_10_1]), "after class 8, class 8 is 0, class 0 is 10"
    for symbols in ([2], [2, 2, 3], [8], [10, 9, 0]):
        assert SMALL.unpack(SMALL.pack(symbols)) == symbols


def test_bits_of_a_symbol_depend_on_the_class_before():
    assert [SMALL.after(before, 3) for before in (None, 3, 2, 0)] == [4, 1, 2, 4]
    assert SMALL.after(9, 10) == 1 + 2 and SMALL.after(None, 8) == 8 + 1
    assert SMALL.lengths.tolist() == [4] * 8 + [5, 6, 6]
    assert sequence_bits(SMALL, [10, 9, 0]) == 10 + 3 + 2 and sequence_bits(SMALL, []) == 0


def plain_codes(code: ClassCode, before: int | None) -> list[str]:
    """Code of every symbol behind ``before``, as text."""
    classes = code.classes.tolist()
    steps = canonical(code.transitions[-1 if before is None else classes[before]].tolist())
    made = []
    for symbol, own in enumerate(classes):
        members = [other for other, of in enumerate(classes) if of == own]
        inner = canonical([int(code.members[one]) for one in members]) if len(members) > 1 else [""]
        made.append(steps[own] + inner[members.index(symbol)])
    return made


TABLE = {before: plain_codes(LARGE, before) for before in (None, *range(60))}


def plain_pack(symbols: list[int]) -> bytes:
    bits = "".join(TABLE[before][one] for before, one in zip([None, *symbols], symbols, strict=False))
    bits += "1" * (-len(bits) % 8)
    return bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))


def plain_unpack(stored: bytes) -> list[int] | None:
    """Symbols, or None when what is left is no filling."""
    bits, symbols = "".join(format(byte, "08b") for byte in stored), []
    while True:
        codes = TABLE[symbols[-1] if symbols else None]
        found = [one for one, code in enumerate(codes) if bits.startswith(code)]
        if not found:
            return symbols if len(bits) < 8 and "0" not in bits else None
        assert len(found) == 1, "no code begins another"
        symbols.append(found[0])
        bits = bits[len(codes[found[0]]) :]


SYMBOLS = st.lists(st.integers(0, 59), max_size=40)


@given(SYMBOLS)
def test_pack_is_the_plain_loops_and_comes_back(symbols):
    stored = LARGE.pack(symbols)
    assert stored == plain_pack(symbols)
    assert LARGE.unpack(stored) == symbols
    assert len(stored) == math.ceil(sequence_bits(LARGE, symbols) / 8)


@given(SYMBOLS, st.integers(0, 3))
def test_numbers_of_numpy_are_symbols_too(symbols, seed):
    code = class_code(60, seed)
    assert code.unpack(code.pack(np.array(symbols, dtype=np.uint16))) == symbols


@given(st.binary(max_size=12))
def test_any_bytes_are_symbols_of_the_plain_loop_or_damage(stored):
    reads_as(LARGE, stored, plain_unpack(stored))


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12))
def test_every_cut_gives_the_first_symbols_or_damage(symbols):
    every_cut_reads(LARGE, plain_unpack, symbols)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=12))
def test_a_zero_in_the_filling_never_goes_unseen(symbols):
    stored = LARGE.pack(symbols)
    for place in range(8 * len(stored) - sequence_bits(LARGE, symbols)):
        changed = stored[:-1] + bytes([stored[-1] ^ 1 << place])
        try:
            assert len(LARGE.unpack(changed)) > len(symbols)
        except DamagedFile:
            continue


def test_filling_of_every_length_reads_as_no_symbol():
    every_filling_is_passed_over(LARGE, 60)


def test_a_code_that_ends_after_its_class_is_damage():
    assert SMALL.after(None, 8) == 9
    with pytest.raises(DamagedFile, match="1 bytes, of which the last 8 bits are no code"):
        SMALL.unpack(bytes([0b11111111]))


def test_fields_come_back_through_json():
    again = ClassCode.of_fields(json.loads(json.dumps(LARGE.fields())))
    assert again.fields() == LARGE.fields()
    assert again.pack([5, 8, 59, 0]) == LARGE.pack([5, 8, 59, 0])


def walk(count: int, classes: int, size: int, seed: int) -> list[list[int]]:
    """Texts in which class c is mostly followed by class c+1."""
    draw = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        own = np.cumsum(draw.choice([1, 2, 5], p=[0.8, 0.15, 0.05], size=30)) % classes
        texts.append((own + classes * np.minimum(draw.geometric(0.5, size=30) - 1, size - 1)).tolist())
    return texts


def test_bits_are_near_the_entropy_of_the_class_bigram_model():
    classes, size = 130, 6
    texts = walk(2000, classes, size, 0)
    code = ClassCode.from_sequences(texts, np.arange(classes * size) % classes, unseen=0.01, sharing=1.0)
    pairs, rows, words, own = Counter(), Counter(), Counter(), Counter()
    for text in texts:
        for before, one in zip([None, *text], text, strict=False):
            row = None if before is None else before % classes
            pairs[row, one % classes] += 1
            rows[row] += 1
            words[one] += 1
            own[one % classes] += 1
    total = sum(words.values())
    entropy = -sum(count * math.log2(count / rows[pair[0]]) for pair, count in pairs.items())
    entropy -= sum(count * math.log2(count / own[word % classes]) for word, count in words.items())
    mean = sum(sequence_bits(code, text) for text in texts) / total
    assert entropy / total <= mean < entropy / total + 2, "a Huffman code loses less than a bit; here are two"
    alone = -sum(count * math.log2(count / total) for count in words.values()) / total
    assert mean < alone - 3, "after one class come three: a code of the words alone takes far more"
    fresh = walk(200, classes, size, 1)
    assert sum(sequence_bits(code, text) for text in fresh) / 6000 < mean + 0.5


def test_what_begins_a_text_is_counted_for_the_beginning_alone():
    code = ClassCode.from_sequences([[7, 0, 1]] * 50, np.arange(150), unseen=0.3, sharing=1.0)
    assert code.after(None, 7) == 1, "every text begins with it"
    assert min(code.after(None, 0), code.after(None, 1), code.after(0, 7), code.after(1, 7)) > 1
    assert (code.after(7, 0), code.after(0, 1)) == (1, 1)


def test_what_was_never_seen_has_a_code_all_the_same():
    code = ClassCode.from_sequences([[0, 1], [], [1]], np.arange(300) % 150, unseen=0.3)
    assert code.unpack(code.pack([299, 0, 151, 151])) == [299, 0, 151, 151]
    assert code.after(0, 1) < code.after(0, 2), "seen together"
    assert code.members.tolist() == [1] * 300
    for nothing in ([], [[], []]):
        code = ClassCode.from_sequences(nothing, np.arange(300) % 150, unseen=0.3)
        assert code.unpack(code.pack([299, 0])) == [299, 0] and {code.after(0, one) for one in range(300)} == {8, 9}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"classes": []}, "every symbol needs a class"),
        ({"classes": [0, 1, 2, 3, 4, 5, 6, 7, 9, 9, 9]}, "every class a symbol"),
        ({"classes": [-1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 0]}, "every symbol needs a class"),
        ({"members": [0] * 8}, "every symbol needs a class and a length"),
        ({"members": [1] + [0] * 7 + [1, 2, 2]}, "alone in its class takes no bits"),
        ({"members": [0] * 8 + [1, 2, 3]}, "complete prefix code"),
        ({"members": [0] * 11}, "1 to 32 bits"),
        ({"transitions": ROWS[:-1]}, "9 classes need 10 rows of 9 lengths"),
        ({"transitions": [*ROWS[:-1], ROWS[0][:-1]]}, "9 classes need 10 rows of 9 lengths"),
        ({"transitions": [*ROWS[:-1], [8] * 9]}, "complete prefix code"),
        ({"transitions": [*ROWS[:-1], [3] * 7 + [4] * 2]}, "at least 8 bits"),
        ({"transitions": [*ROWS[:-1], [LONGEST + 1] * 9]}, "1 to 32 bits"),
        ({"usual": [4] * 8}, "and 9 usual lengths"),
        ({"usual": [4] * 8 + [0]}, "at least one bit"),
        ({"usual": [4] * 8 + [33]}, "at most 32"),
        ({"usual": [4] * 8 + [2**63 - 1]}, "at most 32"),
        ({"usual": [[4]] * 9}, "lengths of classes are numbers, one each"),
        ({"usual": "444444444"}, "lengths of classes are numbers, one each"),
        ({"transitions": [[[one] for one in row] for row in ROWS]}, "lengths of classes are numbers, one each"),
        ({"classes": [[one] for one in range(9)], "members": [[0]] * 9}, "every symbol needs a class and a length"),
    ],
)
def test_fields_that_make_no_code_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        ClassCode.of_fields({**SMALL.fields(), **change})


@pytest.mark.parametrize("unknown", [-1, 60, 2**16, -(2**40)])
@pytest.mark.parametrize("code", [LARGE, follow_code(60)])
def test_a_number_that_is_no_symbol_is_never_written(code, unknown):
    for symbols in ([unknown], [0, unknown], [unknown, 0], [0, 1, 2, 60 * 3 + unknown % 60]):
        with pytest.raises(ValueError, match=r"is no symbol, 0 to 59$"):
            code.pack(symbols)


def test_a_missing_field_is_refused():
    with pytest.raises(KeyError, match="usual"):
        ClassCode.of_fields({name: value for name, value in SMALL.fields().items() if name != "usual"})


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match="at least 8 bits"):
        ClassCode.from_sequences([[0, 1, 2, 3]], [0, 1, 2, 3] * 3, unseen=0.3)
