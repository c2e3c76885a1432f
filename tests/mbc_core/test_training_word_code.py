"""The word code is counted from kept words: a plain loop, fewer bits than 16, and the command with its card."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from prepared_data import write_prepared

from mbc_core.cli.train import train
from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training.prepared import load_prepared
from mbc_core.training.word_code import chosen_counts, mean_bits, train_word_code
from mbc_core.words import choose_words

PLAIN = Lexicon([("Ġ", "T"), ("ĠT", "h"), ("o", "u"), ("ou", "n"), ("oun", "d")])


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared")


def test_counts_are_those_of_a_plain_loop(prepared):
    data = load_prepared(prepared)
    expected = Counter()
    for row in range(len(data)):
        for budget in (3, 12):
            expected.update(choose_words(*data.words_of(row), budget, PLAIN).tolist())
    words = data.table["words"].to_pylist()
    scores = [data.words_of(row)[1] for row in range(len(data))]
    found = chosen_counts(words, scores, PLAIN, (3, 12))
    assert {place: count for place, count in enumerate(found.tolist()) if count} == expected


def test_kept_words_cost_less_than_16_bits_and_frequent_ones_least(prepared):
    data = load_prepared(prepared)
    coded = train_word_code(data, PLAIN)
    assert coded.merges == PLAIN.merges and coded.digest != PLAIN.digest
    words = data.table["words"].to_pylist()
    scores = [data.words_of(row)[1] for row in range(len(data))]
    counts = chosen_counts(words, scores, coded, (12, 24, 41))
    assert mean_bits(counts, coded) < 8, "261 entries, of which a few make up most"
    assert coded.bits[int(np.argmax(counts))] == min(coded.bits)
    assert max(coded.bits) == coded.bits[int(np.argmin(counts))]


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
        assert kept["words"] >= kept["words_at_16_bits_a_code"] and kept["bits_per_code"] < 16
