from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbc_core import weights
from mbc_core.class_code import ClassCode
from mbc_core.errors import DamagedFile, ModelError
from mbc_core.lexicon import FORMATS, VOCABULARY, Lexicon
from mbc_core.prefix_code import PrefixCode
from tests.mbc_core.class_lexicon import MERGES, class_code, class_lexicon, follow_code, follow_lexicon

SHIPPED = Lexicon.load(weights.path("lexicon.json.gz"))
WORDS = st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=12), max_size=12)


def codes_of(lexicon: Lexicon, words: list[str]) -> list[int]:
    return [code for codes in lexicon.encode_words(words) for code in codes]


def test_codes_of_a_typed_out_lexicon():
    """Bytes come first in the order of their symbols: "!" is 0, "a" is 64, the space ("Ġ") 220."""
    lexicon = Lexicon([("Ġ", "a"), ("Ġa", "b"), ("b", "c")])
    assert lexicon.encode_words(["ab", "abc", "bc", ""]) == [[257], [257, 66], [220, 258], []]
    assert lexicon.decode([257, 66, 256]) == "abc a"
    assert len(lexicon) == 259


def test_two_merges_that_spell_the_same_share_an_entry():
    lexicon = Lexicon([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    assert len(lexicon) == 259


@given(WORDS)
def test_the_shipped_lexicon_gives_back_any_words(words):
    assert SHIPPED.decode(codes_of(SHIPPED, words)) == " ".join(words)


@given(WORDS)
def test_a_word_has_the_same_codes_in_any_company(words):
    together = Lexicon.load(weights.path("lexicon.json.gz")) if not words else SHIPPED
    assert together.encode_words(words) == [SHIPPED.encode_words([word])[0] for word in words]


def test_the_shipped_lexicon_is_the_one_its_card_describes():
    card = json.loads(weights.path("lexicon.card.json").read_text())
    assert (card["digest"], card["entries"]) == (SHIPPED.digest, len(SHIPPED))
    assert len(SHIPPED) == VOCABULARY == 61_440
    assert max(codes_of(SHIPPED, ["Saturday", "zqxj", "漢字", "24–10"])) < VOCABULARY


def test_common_words_are_one_code_each():
    words = ["president", "2019", "London", "million", "U.S", "government"]
    assert [len(codes) for codes in SHIPPED.encode_words(words)] == [1] * 6


@pytest.mark.parametrize("name", ["lexicon.json", "lexicon.json.gz"])
def test_a_saved_lexicon_is_equal(tmp_path, name):
    lexicon = Lexicon([("Ġ", "a"), ("é".encode().decode("latin-1")[0], "a")])
    lexicon.save(tmp_path / name)
    again = Lexicon.load(tmp_path / name)
    assert again.digest == lexicon.digest
    again.save(tmp_path / f"2{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"2{name}").read_bytes()


def test_other_merges_give_another_digest():
    assert Lexicon([("a", "b")]).digest != Lexicon([("b", "a")]).digest


def test_memory_of_known_words_is_bounded(monkeypatch):
    monkeypatch.setattr("mbc_core.lexicon._REMEMBERED", 3)
    lexicon = Lexicon([])
    for number in range(20):
        assert len(lexicon.encode_words([f"w{number}", "w0"])[1]) == 3
        assert len(lexicon._known) <= 5


def test_another_thread_may_fill_the_memory_meanwhile(monkeypatch):
    """It is full while this call looks words up: the words that were known already must still be."""
    lexicon = Lexicon([])
    lexicon.encode_words(["known"])
    tokenizer = lexicon._tokenizer

    class Interrupted:
        def encode_batch(self, texts):
            lexicon._tokenizer = tokenizer
            monkeypatch.setattr("mbc_core.lexicon._REMEMBERED", 0)
            lexicon.encode_words(["other"])
            return tokenizer.encode_batch(texts)

    lexicon._tokenizer = Interrupted()
    assert [lexicon.decode(codes) for codes in lexicon.encode_words(["known", "new"])] == ["known", "new"]


@pytest.mark.parametrize("code", [-1, 256])
def test_an_unknown_code_is_named(code):
    with pytest.raises(DamagedFile, match=rf"a word code is not in the lexicon: {code}.*codes 0 to 255"):
        Lexicon([]).decode([5, code])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"the lexicon cannot be read.*none\.json.*No such file"):
        Lexicon.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "decode"),
        (b"[]", "list indices"),
        (json.dumps({"format": "other-2", "merges": []}).encode(), "format 'other-2', this release reads"),
        (json.dumps({"format": FORMATS[0], "merges": ["a b", "x yz"]}).encode(), "merge 'x' [+] 'yz' does not follow"),
        (json.dumps({"format": FORMATS[0], "merges": ["ab"]}).encode(), "unpack"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, cause):
    (tmp_path / "lexicon.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=f"the lexicon file is damaged.*{cause}"):
        Lexicon.load(tmp_path / "lexicon.json")


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_gzip_is_named(tmp_path, cut):
    stored = weights.path("lexicon.json.gz").read_bytes()
    (tmp_path / "lexicon.json.gz").write_bytes(stored[:cut] if cut else b"no gzip at all")
    with pytest.raises(DamagedFile, match="the lexicon file is damaged"):
        Lexicon.load(tmp_path / "lexicon.json.gz")


def test_a_flipped_byte_is_noticed(tmp_path):
    stored = bytearray(weights.path("lexicon.json.gz").read_bytes())
    stored[len(stored) // 2] ^= 0x10
    (tmp_path / "lexicon.json.gz").write_bytes(bytes(stored))
    with pytest.raises(DamagedFile, match="the lexicon file is damaged"):
        Lexicon.load(tmp_path / "lexicon.json.gz")


def test_more_entries_than_codes_are_refused(tmp_path):
    merges = [f"{left} {right}" for left in "abcdefghijklmnopqrstuvwxyz" for right in "abcdefghijklmnopqrstuvwxyz"]
    pairs = ["".join(merge.split()) for merge in merges]
    more = [f"{left} {right}" for left in pairs for right in pairs[:100]]
    (tmp_path / "big.json").write_text(json.dumps({"format": FORMATS[0], "merges": merges + more}))
    with pytest.raises(DamagedFile, match="word codes stop at 61439"):
        Lexicon.load(tmp_path / "big.json")


def test_gzip_holds_plain_json():
    fields = json.loads(gzip.decompress(weights.path("lexicon.json.gz").read_bytes()))
    card = json.loads(weights.path("lexicon.card.json").read_text())
    assert fields["format"] == FORMATS[3]
    assert max(fields["code"]["classes"]) + 1 == card["classes"]
    pairs = {"leaders": len(fields["code"]["leaders"]), "pairs": len(fields["code"]["followers"])}
    assert card["followers"] == pairs and pairs["pairs"] == sum(fields["code"]["sizes"])


def test_bits_of_a_lexicon_are_part_of_it(tmp_path):
    merges = [("Ġ", "a"), ("Ġa", "b")]
    bits = PrefixCode.from_counts([1.0] * 256 + [200.0, 500.0]).lengths.tolist()
    lexicon, plain = Lexicon(merges, bits), Lexicon(merges)
    assert lexicon.digest != plain.digest
    assert plain.costs(["ab", "abc", ""]) == [16, 32, 0], "without bits every id takes 16"
    assert lexicon.costs(["ab", "a"]) == [bits[257], bits[256]] and bits[257] < bits[256] < 8
    lexicon.save(tmp_path / "lexicon.json.gz")
    again = Lexicon.load(tmp_path / "lexicon.json.gz")
    assert again.digest == lexicon.digest
    stored = lexicon.pack([257, 256, 257])
    assert len(stored) == -(-(2 * bits[257] + bits[256]) // 8)
    assert again.read(stored) == "ab a ab" and again.unpack(stored) == [257, 256, 257]


def test_bits_for_another_number_of_entries_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"format": FORMATS[1], "merges": ["Ġ a"], "bits": [8] * 256}))
    with pytest.raises(DamagedFile, match="256 code lengths for 257 entries"):
        Lexicon.load(tmp_path / "bad.json")


@given(WORDS)
def test_stored_words_of_the_shipped_lexicon_come_back(words):
    stored = SHIPPED.pack(codes_of(SHIPPED, words))
    assert SHIPPED.read(stored) == " ".join(words)


def test_words_in_their_order_take_fewer_bits_than_turned_round():
    assert isinstance(SHIPPED.code, ClassCode)
    words = [
        "The",
        "President",
        "of",
        "the",
        "United",
        "States",
        "will",
        "be",
        "in",
        "New",
        "York",
        "on",
        "30",
        "June",
        "2019",
        "for",
        "a",
        "meeting",
    ]
    assert len(SHIPPED.pack(codes_of(SHIPPED, words))) < len(SHIPPED.pack(codes_of(SHIPPED, words[::-1])))


@pytest.mark.parametrize("kind", [class_lexicon, follow_lexicon])
def test_a_lexicon_with_classes_is_saved_whole(tmp_path, kind):
    lexicon, other = kind(0), kind(1)
    assert len({lexicon.digest, other.digest, Lexicon(MERGES).digest}) == 3
    assert lexicon.costs(["ab", "b", ""]) == [lexicon.bits[257], lexicon.bits[258], 0]
    lexicon.save(tmp_path / "lexicon.json.gz")
    again = Lexicon.load(tmp_path / "lexicon.json.gz")
    assert again.digest == lexicon.digest and again.bits == lexicon.bits
    codes = codes_of(lexicon, ["ab", "ba", "1", "ab"])
    assert again.pack(codes) == lexicon.pack(codes) and again.read(lexicon.pack(codes)) == "ab ba 1 ab"


@given(
    st.lists(st.text("ab1", min_size=1, max_size=4), min_size=1, max_size=10),
    st.randoms(),
    st.sampled_from(
        [class_lexicon(0), class_lexicon(1), follow_lexicon(0), follow_lexicon(1), Lexicon(MERGES), SHIPPED]
    ),
)
def test_prices_add_up_to_the_packed_bits_in_whatever_order_words_come(words, draw, lexicon):
    codes = lexicon.encode_words(words)
    price = lexicon.price(codes)
    kept, bits = [], 0
    for place in draw.sample(range(len(words)), len(words)):
        before = max((one for one in kept if one < place), default=None)
        after = min((one for one in kept if one > place), default=None)
        bits += price(before, place, after)
        kept = sorted([*kept, place])
        stored = lexicon.pack([code for one in kept for code in codes[one]])
        assert len(stored) == -(-bits // 8)
        assert bits == sum(one.after(*pair) for one, pair in links(lexicon, [c for at in kept for c in codes[at]]))


def links(lexicon, codes):
    """The lexicon's code and each pair of neighbours; for a plain lexicon something that says 16 bits."""

    class Plain:
        def after(self, before, code):
            return 16

    code = lexicon.code if isinstance(lexicon.code, ClassCode) else Plain()
    return [(code, pair) for pair in zip([None, *codes], codes, strict=False)]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"code": [8] * 261}, "list indices"),
        ({"code": {}}, "classes"),
        ({"code": class_code(260).fields()}, "260 code lengths for 261 entries"),
        ({"code": {**class_code(261).fields(), "usual": [0] * 9}}, "at least one bit"),
        ({"code": {**class_code(261).fields(), "usual": [2**70] * 9}}, "too large"),
        ({"code": {**class_code(261).fields(), "members": "none"}}, "invalid literal"),
    ],
)
def test_a_damaged_code_is_named(tmp_path, change, cause):
    class_lexicon().save(tmp_path / "good.json")
    require_damaged(tmp_path, change, cause)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"code": [8] * 261}, "list indices"),
        ({"code": class_code(261).fields()}, "letters in a text, not list"),
        ({"code": follow_code(260).fields()}, "260 code lengths for 261 entries"),
        ({"code": {**follow_code(261).fields(), "usual": [2**70] * 9}}, "a list of whole numbers"),
        ({"code": {**follow_code(261).fields(), "members": "none"}}, "every symbol needs a class and a length"),
        ({"code": {**follow_code(261).fields(), "members": "—"}}, "letters 0 to 9 and a to w"),
        ({"code": {**follow_code(261).fields(), "leaders": [0, 261]}}, "every leader needs"),
        ({"format": FORMATS[2]}, "could not convert|invalid literal|inhomogeneous"),
    ],
)
def test_a_damaged_code_with_followers_is_named(tmp_path, change, cause):
    follow_lexicon().save(tmp_path / "good.json")
    require_damaged(tmp_path, change, cause)


def test_a_file_of_brackets_is_damaged(tmp_path):
    (tmp_path / "bad.json").write_text("[" * 200_000)
    with pytest.raises(DamagedFile, match="the lexicon file is damaged"):
        Lexicon.load(tmp_path / "bad.json")


def require_damaged(folder, change, cause):
    """Check that ``good.json`` with the ``change`` is refused and says why."""
    fields = json.loads((folder / "good.json").read_text())
    (folder / "bad.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(DamagedFile, match=f"the lexicon file is damaged.*({cause})"):
        Lexicon.load(folder / "bad.json")


def test_formats_of_before_are_read_as_they_were(tmp_path):
    """Digests and bytes are those that the release before format 4 gave."""
    plain = {"format": "mbc-lexicon-1", "merges": ["Ġ a"]}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    bits = {"format": "mbc-lexicon-2", "merges": ["Ġ a"], "bits": [8] * 255 + [9, 9]}
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    class_lexicon(0).save(tmp_path / "classes.json")
    assert json.loads((tmp_path / "classes.json").read_text())["format"] == "mbc-lexicon-3"
    for name, digest, stored in (
        ("plain", "25f2fbff061ad6bca19e084e4dc5e86faebbe265a3af41e188660abb7d02ee11", "0100"),
        ("bits", "eddd4a267f12d35518c98809ebc753ce67f8786122e30df9202d9e036e62fcdb", "ffff"),
        ("classes", "e17b4a29ac81350b78becfc2794c54a43a4b6907002e3213412974e6481d7995", "f7df"),
    ):
        lexicon = Lexicon.load(tmp_path / f"{name}.json")
        assert (lexicon.digest, lexicon.pack([256]).hex()) == (digest, stored), name


def test_format_4_is_read_as_it_was_first_written(tmp_path):
    """Banks hold this digest and these bytes; they were told by a plain loop over texts of 0 and 1."""
    code = {
        "classes": [one % 9 for one in range(261)],
        "transitions": ["123456788"] * 10,
        "members": "4" * 27 + "5" * 234,
        "usual": [4] * 9,
        "listed": ["2345678991"] * 9 + ["1234567899"] * 9,
        "leaders": [0, 256],
        "levels": "10",
        "sizes": [3, 1],
        "followers": [0, 9, 260, 257],
        "follower_bits": "2210",
    }
    fields = {"format": "mbc-lexicon-4", "merges": ["Ġ a", "Ġa b", "Ġ b", "a b", "Ġ 1"], "code": code}
    (tmp_path / "followers.json").write_text(json.dumps(fields))
    lexicon = Lexicon.load(tmp_path / "followers.json")
    assert lexicon.digest == "0a89821b55a01a58f0d1c61bc715f367b654787dff70c9bfaffe7c06a104c1b6"
    symbols = [256, 257, 0, 260, 0, 0, 9, 256, 257, 258]
    assert lexicon.pack(symbols).hex() == "f7c0ff81ffbfffbefdff"
    assert lexicon.unpack(lexicon.pack(symbols)) == symbols
