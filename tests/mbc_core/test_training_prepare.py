from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_encoder import WIDTH, write_tiny_encoder, write_tiny_head

from mbc_core import weights
from mbc_core.cli.train import train
from mbc_core.encoder import PassageEncoder
from mbc_core.encoder.passage_encoder import model_digest
from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training.data import TrainingPassage
from mbc_core.training.lexicon import card_path, codes_per_word, count_words, train_lexicon
from mbc_core.training.prepare import prepare
from mbc_core.training.prepared import load_prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-model")
    write_tiny_head(made / "head.safetensors", model_digest(made))
    return made


PASSAGES = [
    TrainingPassage("a:1", "s", "Ann has 3 cats.", (("How many cats?", ("3", "three")),), "train"),
    TrainingPassage("a:2", "s", "No one asks.", (), "dev"),
    TrainingPassage("a:3", "t", "Rain fell. " * 60, (("What fell?", ("Rain",)), ("Why?", ("no",))), "train"),
]


def test_three_files_that_fit_together(folder, tmp_path):
    counts = prepare(folder, folder / "head.safetensors", PASSAGES, tmp_path, progress=[].append)
    assert counts == {"passages": 5, "questions": 3, "cut": 2}  # 540 pieces: three parts
    found = load_prepared(tmp_path)
    encoder = PassageEncoder.load(folder, folder / "head.safetensors")
    texts = found.table["text"].to_pylist()
    assert "".join(texts[2:]) == PASSAGES[2].text
    assert found.table["passage_id"].to_pylist() == ["a:1", "a:2", "a:3", "a:3#1", "a:3#2"]
    assert found.table["split"].to_pylist() == ["train", "dev", "train", "train", "train"]
    for row, expected in enumerate(encoder.encode(texts)):
        words, scores = found.words_of(row)
        assert tuple(words) == expected.words
        assert scores.tobytes() == expected.scores.tobytes()
        np.testing.assert_allclose(found.embeddings[row], expected.embedding, atol=1e-3)
    assert (found.questions, found.answers) == (
        ["How many cats?", "What fell?", "Why?"],
        [["3", "three"], ["Rain"], ["no"]],
    )
    assert found.rows.tolist() == [0, 2, 2]
    np.testing.assert_allclose(found.question_embeddings, encoder.encode_questions(found.questions), atol=1e-3)
    assert pq.read_schema(tmp_path / "questions.parquet").field("question_embedding").type.list_size == WIDTH


def test_without_a_head_there_are_no_words(folder, tmp_path):
    prepare(folder, None, PASSAGES[:1], tmp_path)
    assert load_prepared(tmp_path).words_of(0)[0] == []


def test_lexicon_learns_frequent_words_whole(tmp_path):
    texts = ["The U.S. army, and the navy!"] * 9 + ["A rare zebra."]
    card = train_lexicon(texts, tmp_path / "lexicon.json.gz", 276, sources=["mine"])
    lexicon = Lexicon.load(tmp_path / "lexicon.json.gz")
    assert [len(codes) for codes in lexicon.encode_words(["U.S", "army", "the", "navy"])] == [1, 1, 1, 1]
    assert len(lexicon.encode_words(["zebra"])[0]) > 1
    assert json.loads((tmp_path / "lexicon.card.json").read_text()) == card
    assert card["entries"] == len(lexicon) <= 276
    assert card["codes_per_word_on_training_text"] == round(codes_per_word(lexicon, count_words(texts)), 4)
    assert card_path(tmp_path / "lexicon.json.gz").name == "lexicon.card.json"


def test_the_order_of_texts_does_not_change_the_lexicon(tmp_path):
    texts = ["one two three", "three four five", "five six one", "seven two two"]
    train_lexicon(texts, tmp_path / "a.json", 300)
    train_lexicon(texts[::-1], tmp_path / "b.json", 300)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_wrong_sizes_and_empty_corpora_are_refused(tmp_path):
    with pytest.raises(UsageError, match="the lexicon's size is out of range: 70000"):
        train_lexicon(["a"], tmp_path / "a.json", 70_000)
    with pytest.raises(UsageError, match="the lexicon's corpus has no words"):
        train_lexicon(["..."], tmp_path / "a.json", 300)


def test_from_the_command_line_lexicon_salience_prepare(folder, tmp_path):
    """The three commands in the order in which they are used, on a file of made-up passages."""
    lines = [
        {"doc_id": f"squad:{number}", "text": f"cat dog {number} mat", "qas": [["How many?", str(number)]]}
        for number in range(150)
    ]
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"T": {"extract": "xylophone " * 50}}))

    def run(*arguments: str) -> dict:
        result = CliRunner().invoke(train, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    lexicon = tmp_path / "lexicon.json.gz"
    card = run("lexicon", str(data), "--extra-text", str(extra), "--out", str(lexicon), "--entries", "400")
    assert card["trained_on"] == ["squad", "extra.json"]
    assert len(Lexicon.load(lexicon).encode_words(["xylophone"])[0]) == 1
    prepared = run("prepare", str(data), "--encoder", str(folder), "--salience", str(folder / "head.safetensors"),
                   "--out", str(tmp_path / "prepared"), "--device", "cpu")  # fmt: skip
    assert prepared == {"passages": 150, "questions": 150, "cut": 0}
    splits = load_prepared(tmp_path / "prepared").table["split"].to_pylist()
    assert 0 < splits.count("dev") < 10
    dev = run("prepare", str(data), "--encoder", str(folder), "--dev", "--source", "squad",
              "--out", str(tmp_path / "dev"), "--device", "cpu")  # fmt: skip
    assert dev["passages"] == 150
    assert set(load_prepared(tmp_path / "dev").table["split"].to_pylist()) == {"dev"}


def test_a_source_without_dev_is_wrong_use(folder, tmp_path):
    data = tmp_path / "qa.jsonl"
    data.write_text("{}")
    command = ["prepare", str(data), "--encoder", str(folder), "--out", str(tmp_path / "o"), "--source", "s"]
    result = CliRunner().invoke(train, command)
    assert result.exit_code == 2
    assert "--source goes with --dev" in result.output


def test_shipped_head_and_lexicon_are_described_by_their_cards():
    card = json.loads(weights.path("lexicon.card.json").read_text())
    assert not {"race", "dream", "sciq", "mctest", "multirc", "bioasq", "archivalqa"} & set(card["trained_on"])
