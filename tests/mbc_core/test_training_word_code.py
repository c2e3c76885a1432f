"""The word code is counted from kept words: a plain loop, fewer bits than 16, and the command with its card."""

import json
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from prepared_data import write_prepared

from mbc_core import weights
from mbc_core.class_code import ClassCode
from mbc_core.cli.train import train
from mbc_core.errors import UsageError
from mbc_core.follow_code import FollowCode
from mbc_core.lexicon import Lexicon
from mbc_core.training import word_code
from mbc_core.training.prepared import load_prepared
from mbc_core.training.word_classes import set_apart, word_classes
from mbc_core.training.word_code import chosen, kept_at, stored_bits, train_word_code
from mbc_core.training.word_followers import follow_code
from mbc_core.words import choose_words

PLAIN = Lexicon([("Ġ", "T"), ("ĠT", "h"), ("o", "u"), ("ou", "n"), ("oun", "d")])


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared")


def scored(data):
    return data.table["words"].to_pylist(), [data.words_of(row)[1] for row in range(len(data))]


def test_kept_words_are_those_of_a_plain_loop(prepared):
    data = load_prepared(prepared)
    rows = range(len(data))
    expected = [choose_words(*data.words_of(row), budget, PLAIN).tolist() for row in rows for budget in (3, 12)]
    words, scores = scored(data)
    assert [one.tolist() for one in chosen(words, scores, PLAIN, (3, 12))] == expected
    bits, codes = kept_at(words, scores, PLAIN, 12)
    assert bits == 16 and codes == sum(len(one) for one in expected[1::2]) / len(data)


def test_kept_words_cost_less_than_16_bits_and_frequent_ones_least(prepared):
    data = load_prepared(prepared)
    coded = train_word_code(data, PLAIN, classes=0)
    assert coded.merges == PLAIN.merges and coded.digest != PLAIN.digest
    kept = chosen(*scored(data), coded, (12, 24, 41))
    counts = np.bincount(np.concatenate(kept), minlength=len(coded))
    bits = [stored_bits(coded, one) for one in kept]
    assert [-(-one // 8) for one in bits] == [len(coded.pack(one.tolist())) for one in kept]
    assert sum(bits) / counts.sum() < 8, "261 entries, of which a few make up most"
    assert coded.bits[int(np.argmax(counts))] == min(coded.bits)
    assert max(coded.bits) == coded.bits[int(np.argmin(counts))]


def test_classes_of_entries_save_bits(prepared):
    data = load_prepared(prepared)
    said: list[str] = []
    alone = train_word_code(data, PLAIN, classes=0)
    classed = train_word_code(data, PLAIN, classes=130, followers=False, say=said.append)
    assert isinstance(classed.code, ClassCode) and int(classed.code.classes.max()) >= 129
    words, scores = scored(data)
    assert kept_at(words, scores, classed, 24)[0] < kept_at(words, scores, alone, 24)[0] - 1
    assert len(chosen(words, scores, classed, [12])[0]) > len(chosen(words, scores, alone, [12])[0])
    kept = chosen(words, scores, classed, (0, 12, 24))
    assert [-(-stored_bits(classed, one) // 8) for one in kept] == [len(classed.pack(one.tolist())) for one in kept]
    assert [line.split(":")[0] for line in said if line.startswith("turn")] == ["turn 1", "turn 2"]
    assert train_word_code(data, PLAIN, classes=130, followers=False).digest == classed.digest
    assert not isinstance(classed.code, FollowCode)


def test_followers_are_found_in_every_turn(prepared):
    """That they save bits is checked where words are many: here they are spelled out of a few letters."""
    data = load_prepared(prepared)
    followed = train_word_code(data, PLAIN, classes=130)
    assert isinstance(followed.code, FollowCode)
    words, scores = scored(data)
    kept = chosen(words, scores, followed, (0, 12, 24))
    assert [-(-stored_bits(followed, one) // 8) for one in kept] == [len(followed.pack(one.tolist())) for one in kept]
    assert [followed.unpack(followed.pack(one.tolist())) for one in kept] == [one.tolist() for one in kept]
    once = train_word_code(data, PLAIN, classes=130, turns=1)
    assert isinstance(once.code, FollowCode) and once.digest != followed.digest
    assert train_word_code(data, PLAIN, classes=130).digest == followed.digest


def test_every_turn_counts_kept_words_beside_whole_texts_in_the_same_classes(prepared, monkeypatch):
    data, given, made = load_prepared(prepared), [], []

    def classes_of(*args, **options):
        made.append(word_classes(*args, **options))
        return made[-1]

    def spied(kept, whole, classes, *, weight):
        given.append((kept, whole, classes, weight))
        return follow_code(kept, whole, classes, weight=weight)

    monkeypatch.setattr(word_code, "word_classes", classes_of)
    monkeypatch.setattr(word_code, "follow_code", spied)
    monkeypatch.setattr(word_code, "set_apart", partial(set_apart, least=1.0))
    train_word_code(data, PLAIN, budgets=(12, 24), classes=130)
    words, scores = scored(data)
    first = chosen(words, scores, PLAIN, (12, 24))
    count = np.bincount(np.concatenate(first), minlength=len(PLAIN)).astype(float)
    assert len(made) == 1 and len(given) == 2, "classes are found once"
    assert [one.tolist() for one in given[0][0]] == [one.tolist() for one in first]
    assert [one.tolist() for one in given[1][0]] != [one.tolist() for one in first], "the first turn's code keeps more"
    for _, whole, classes, weight in given:
        texts = [[code for own in PLAIN.encode_words(one) for code in own] for one in words]
        assert [one.tolist() for one in whole] == texts and weight == 1 / 2
        assert classes.tolist() == set_apart(made[0], count, least=1.0).tolist() != made[0].tolist()


@pytest.mark.parametrize("classes", [1, 128, 262])
def test_numbers_of_classes_that_cannot_be(prepared, classes):
    with pytest.raises(
        UsageError, match=f"cannot be made: {classes}.*a code needs 129 classes at least.*of 261.*give --classes 256"
    ):
        train_word_code(load_prepared(prepared), PLAIN, classes=classes)


def test_without_scored_words_there_is_nothing_to_count(prepared):
    data = load_prepared(prepared)
    words = data.table.schema.field("words")
    place = data.table.schema.get_field_index("words")
    empty = data.table.set_column(place, words, pa.array([[]] * len(data), words.type))
    with pytest.raises(
        UsageError, match=r"there are no words to count: '24 passages'.*prepared without a salience head"
    ):
        train_word_code(type(data)(empty, data.embeddings, [], [], data.rows[:0], data.question_embeddings[:0]), PLAIN)


def test_the_command_writes_the_lexicon_and_its_card(prepared, tmp_path):
    PLAIN.save(tmp_path / "plain.json.gz")
    arguments = ["word-code", str(prepared), "--lexicon", str(tmp_path / "plain.json.gz"), "--limit", "10"]
    done = CliRunner().invoke(train, [*arguments, "--out", str(tmp_path / "coded.json.gz")])
    assert done.exit_code == 0, done.output
    coded = Lexicon.load(tmp_path / "coded.json.gz")
    card = json.loads((tmp_path / "coded.card.json").read_text())
    assert card["digest"] == coded.digest and card["entries_of"] == PLAIN.digest
    assert card["counted_on"]["passages"] == 10
    for kept in card["kept_by_budget"].values():
        assert kept["codes"] >= kept["codes_at_16_bits"] and kept["bits_per_code"] < 16
    assert isinstance(coded.code, FollowCode)
    assert card["classes"] == int(coded.code.classes.max()) + 1 >= 256
    lists = coded.code.followers
    assert card["followers"] == {"leaders": len(lists.leaders), "pairs": len(lists.symbols)} and len(lists.leaders) > 1
    done = CliRunner().invoke(train, [*arguments, "--out", str(tmp_path / "classed.json.gz"), "--no-followers"])
    assert done.exit_code == 0, done.output
    without = json.loads((tmp_path / "classed.card.json").read_text())
    assert without["followers"] == {"leaders": 0, "pairs": 0}
    shipped = json.loads(weights.path("lexicon.card.json").read_text())["what"]
    assert card["what"] == shipped and without["what"] == shipped.replace(", with followers", "")
    classed = Lexicon.load(tmp_path / "classed.json.gz").code
    assert isinstance(classed, ClassCode) and not isinstance(classed, FollowCode)
    done = CliRunner().invoke(train, [*arguments, "--out", str(tmp_path / "alone.json.gz"), "--classes", "0"])
    assert done.exit_code == 0, done.output
    alone = json.loads((tmp_path / "alone.card.json").read_text())
    assert alone["classes"] == 0 and alone["what"] == "byte-level BPE lexicon with a Huffman code: word codes"
    assert not isinstance(Lexicon.load(tmp_path / "alone.json.gz").code, ClassCode)
