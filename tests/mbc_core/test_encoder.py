"""The passage encoder: fixed shapes (bit for bit), pooling, words and scores, and what is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from tiny_encoder import WIDTH, write_tiny_encoder, write_tiny_head
from transformers import BertModel

from mbc_core import weights
from mbc_core.encoder import PassageEncoder
from mbc_core.encoder.batches import LENGTHS, MAX_TOKENS, bucket_length, plan_batches, rows_of
from mbc_core.encoder.passage_encoder import model_digest, piece_words, resolve_precision
from mbc_core.errors import DamagedFile, ModelError, UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training.data import SHIP_EXCLUDED_SOURCES
from mbc_core.words import budget_bits, choose_places, split_words, word_worth

WORDS = ["the", "cat", "sat", "on", "a", "mat", "in", "1997", "and", "saw", "42", "birds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-model")
    write_tiny_head(made / "head.safetensors", model_digest(made))
    return made


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def encoder(request, folder):
    return PassageEncoder.load(folder, folder / "head.safetensors", precision=request.param)


def texts_of_many_lengths(count: int, seed: int = 0) -> list[str]:
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=pick.randint(1, 70))) + "." for _ in range(count)]


def same(one, other) -> bool:
    return (
        one.embedding.tobytes() == other.embedding.tobytes()
        and one.words == other.words
        and one.scores.tobytes() == other.scores.tobytes()
    )


def test_a_passage_does_not_depend_on_its_neighbours(encoder):
    texts = texts_of_many_lengths(80)
    together = encoder.encode(texts)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    shuffled = encoder.encode([texts[place] for place in order])
    chunks = [one for start in range(0, len(texts), 16) for one in encoder.encode(texts[start : start + 16])]
    assert all(same(shuffled[at], together[place]) for at, place in enumerate(order))
    assert all(map(same, chunks, together))
    assert all(same(encoder.encode([text])[0], one) for text, one in zip(texts[::8], together[::8], strict=True))


def test_full_rows_and_short_rows_share_a_batch_without_effect(encoder):
    """A batch of nothing but full rows must not take a path without a mask."""
    full = "a " * (LENGTHS[0] - 3)  # with [CLS] and [SEP] the longest of the first bucket
    rows = rows_of(LENGTHS[0], "cpu")
    assert bucket_length(len(encoder.tokenize([full])[0].ids)) == LENGTHS[0]
    all_full = encoder.encode([full] * rows)
    mixed = encoder.encode([full] + ["cat"] * (rows - 1))
    assert all(same(one, mixed[0]) for one in all_full)


def test_questions_are_encoded_as_passages_are(encoder):
    texts = texts_of_many_lengths(40, seed=3)
    questions = encoder.encode_questions(texts)
    assert questions.dtype == np.float32
    assert questions.shape == (40, WIDTH)
    assert questions.tobytes() == np.stack([one.embedding for one in encoder.encode(texts)]).tobytes()
    assert encoder.encode_questions(texts[5:6]).tobytes() == questions[5:6].tobytes()
    assert encoder.encode_questions([]).shape == (0, WIDTH)


def test_a_long_question_is_read_as_far_as_it_can_be(encoder):
    start = "ab " * 127  # 254 pieces
    assert encoder.encode_questions([start + "cd " * 50]).tobytes() == encoder.encode_questions([start]).tobytes()


def test_embedding_is_the_normalised_mean_of_the_last_states(folder):
    encoder = PassageEncoder.load(folder, None, precision="float32")
    model = BertModel.from_pretrained(folder).eval()
    text = "the cat sat on a mat"
    with torch.inference_mode():
        states = model(torch.tensor([encoder.tokenize([text])[0].ids])).last_hidden_state[0]
    mean = states.mean(dim=0).numpy()
    np.testing.assert_allclose(encoder.encode([text])[0].embedding, mean / np.linalg.norm(mean), atol=2e-6)


def test_the_head_changes_no_bit_of_the_embedding(folder, encoder):
    without = PassageEncoder.load(folder, None, precision=encoder.precision)
    texts = texts_of_many_lengths(30, seed=4)
    for one, other in zip(encoder.encode(texts), without.encode(texts), strict=True):
        assert one.embedding.tobytes() == other.embedding.tobytes()
        assert (other.words, other.scores.shape) == ((), (0,))


def test_words_have_scores_in_text_order(encoder):
    found = encoder.encode(['The cat, "Tom" (aged 7), sat -- on 1,000 mats.'])[0]
    assert found.words == ("The", "cat", "Tom", "aged", "7", "sat", "on", "1,000", "mats")
    assert found.scores.dtype == np.float32
    assert np.all((found.scores > 0) & (found.scores < 1.5))
    assert len(set(found.scores.tolist())) > 1


def test_a_word_too_long_to_be_worth_codes_is_embedded_but_not_offered(encoder):
    assert encoder.encode(["see " + "x" * 101 + " now"])[0].words == ("see", "now")


def test_a_word_without_pieces_scores_nothing(encoder):
    found = encoder.encode(["a \N{COMBINING ACUTE ACCENT} b"])[0]
    assert found.words[0] == "a"
    assert found.words[-1] == "b"
    assert [score for word, score in zip(found.words, found.scores, strict=True) if word not in "ab"] in ([], [0.0])


def test_pieces_belong_to_the_word_they_start_in(encoder):
    text = "Hi, (a-b) c!"
    words = split_words(text)
    pieces = piece_words(encoder.tokenize([text])[0], words)
    assert [word.text for word in words] == ["Hi", "a-b", "c"]
    assert pieces.tolist() == [-1, 0, 0, -1, -1, 1, 1, 1, -1, 2, -1, -1]  # [CLS] h ##i , ( a - b ) c ! [SEP]


def test_progress_counts_every_passage(encoder):
    seen: list[int] = []
    encoder.encode(texts_of_many_lengths(33), seen.append)
    assert sum(seen) == 33
    assert encoder.encode([]) == []


def test_many_texts_are_read_in_bounded_chunks(encoder, monkeypatch):
    texts = texts_of_many_lengths(40, seed=5)
    together = encoder.encode(texts)
    monkeypatch.setattr("mbc_core.encoder.passage_encoder._TEXTS_AT_ONCE", 11)
    assert all(map(same, encoder.encode(texts), together))


def test_the_id_names_model_precision_and_rule(folder):
    encoder = PassageEncoder.load(folder, folder / "head.safetensors", precision="bfloat16")
    assert encoder.encoder_id == f"tiny-model@{model_digest(folder)}/bfloat16/sentences-256"
    assert len(encoder.salience_digest) == 64
    assert PassageEncoder.load(folder, None).salience_digest == ""
    assert encoder.width == WIDTH


def test_another_model_has_another_digest(folder, tmp_path):
    assert model_digest(write_tiny_encoder(tmp_path / "other", seed=5)) != model_digest(folder)


def test_counted_pieces_are_those_that_are_read(encoder):
    assert encoder.count_pieces("the cat") == 6
    assert encoder.count_pieces("ab " * 300) == 600  # the file's own truncation to 16 is lifted


def test_a_passage_that_was_not_cut_is_refused(encoder):
    with pytest.raises(ModelError, match=r"a passage has 255 word pieces, more than the 254 that are read.*split_pas"):
        encoder.encode(["fine", "a " * 255])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_tiny_encoder(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"the encoder's folder lacks a file.*{name}.*No such file"):
        PassageEncoder.load(folder, None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_tiny_encoder(tmp_path)
    stored = (folder / name).read_bytes()
    (folder / name).write_bytes(stored[: len(stored) // 2])
    with pytest.raises(DamagedFile, match="the encoder's files cannot be read"):
        PassageEncoder.load(folder, None)


def test_weights_without_a_tensor_are_not_filled_in(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_encoder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DamagedFile, match=r"the encoder's weights are incomplete.*encoder\.layer\.1\.attention\.self\.query\.weight"
    ):
        PassageEncoder.load(folder, None)


def test_precision_is_resolved_by_name():
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert resolve_precision("auto", "cpu") in ("bfloat16", "float32")
    with pytest.raises(UsageError, match="unknown precision: 'half'"):
        resolve_precision("half", "cpu")


def test_every_passage_is_planned_once_in_shapes_of_its_bucket():
    counts = [2, 31, 32, 33, 255, 256, 47, 48] * 20
    batches = list(plan_batches(counts, "cpu"))
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(counts)))
    for batch in batches:
        assert batch.rows == rows_of(batch.length, "cpu")
        assert len(batch.places) <= batch.rows
        shorter = max((length for length in LENGTHS if length < batch.length), default=0)
        assert all(shorter <= counts[place] < batch.length for place in batch.places)
    assert bucket_length(MAX_TOKENS) == LENGTHS[-1]


@pytest.fixture(scope="module")
def real(assets):
    return PassageEncoder.load(assets.minilm, weights.path("salience.safetensors"))


def test_the_real_encoder_is_known_by_name(real):
    assert real.encoder_id.startswith("all-MiniLM-L6-v2@d101471598ac/")


def test_the_shipped_head_is_the_one_its_card_describes(real):
    card = json.loads(weights.path("salience.json").read_text())
    assert real.salience_digest == card["file_sha256"]
    assert not SHIP_EXCLUDED_SOURCES & set(card["trained_on"])


def test_the_shipped_head_keeps_what_questions_are_asked_about(real):
    text = (
        "The bridge was opened to traffic in 1937 after four years of work. It was designed by Joseph Strauss, and at "
        "the time it was the longest suspension bridge in the world, with a main span of 4,200 feet."
    )
    found = real.encode([text])[0]
    lexicon = Lexicon.load(weights.path("lexicon.json.gz"))
    costs = np.array(lexicon.costs(found.words), dtype=np.int64)
    worth = word_worth(found.scores, costs)
    places = choose_places(found.words, worth, costs.tolist(), budget_bits(12), opening=0, bridged=0)
    kept = [found.words[place] for place in places]
    assert {"1937", "Joseph", "Strauss", "4,200"} <= set(kept)
    assert not {"the", "was", "to", "it"} & set(kept)


def test_related_texts_are_nearer(real):
    cat, kitten, bank = real.encode_questions(["A cat sleeps.", "The kitten is asleep.", "Interest rates rose."])
    assert cat @ kitten > 0.5 > 0.2 > cat @ bank


def test_company_changes_no_bit_of_the_real_encoder(real):
    texts = ["Paris is the capital of France. " * count for count in (1, 5, 14, 28)]
    together = real.encode(texts * 2)
    for place, text in enumerate(texts):
        assert same(real.encode([text])[0], together[place])
        assert same(together[place], together[place + len(texts)])


def test_bfloat16_stays_near_float32(assets):
    text = ["Marie Curie won the Nobel Prize in Physics in 1903 and in Chemistry in 1911."]
    exact = PassageEncoder.load(assets.minilm, None, precision="float32").encode(text)[0].embedding
    half = PassageEncoder.load(assets.minilm, None, precision="bfloat16").encode(text)[0].embedding
    assert 0.9995 < float(exact @ half) < 1.00001
    assert abs(float(half @ half) - 1.0) < 1e-5
