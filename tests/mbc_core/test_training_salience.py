from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from tiny_encoder import SHAPE, write_tiny_encoder

from mbc_core.encoder import PassageEncoder, SalienceHead
from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training.data import TrainingPassage
from mbc_core.training.frozen_states import FrozenStates, epoch_batches, word_logits
from mbc_core.training.salience import SalienceRecipe, train_salience
from mbc_core.training.word_targets import word_targets
from mbc_core.words import split_words

LEXICON = Lexicon([])
RECIPE = SalienceRecipe(
    steps=6, batch=8, learning_rate=3e-3, warm_up=2, evaluate_every=2, checkpoint_every=3, shape=SHAPE
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-model")


def made_up(count: int, *, seed: int = 0) -> list[TrainingPassage]:
    """Passages whose answer is always their one number; every sixth is held out."""
    pick = random.Random(seed)
    found = []
    for number in range(count):
        words = pick.choices(["cat", "dog", "mat", "sun", "oak"], k=pick.randint(6, 14))
        answer = str(pick.randint(10, 99))
        words.insert(pick.randint(0, len(words)), answer)
        question = (("How many?", (answer,)),)
        found.append(
            TrainingPassage(f"p:{number}", "made", " ".join(words), question, "dev" if number % 6 == 0 else "train")
        )
    return found


def test_flat_states_are_the_encoders_states_and_targets(folder):
    encoder = PassageEncoder.load(folder, None, precision="float32")
    passages = made_up(11)
    flat = FrozenStates(encoder, passages, SHAPE.layers, "cpu")
    places = np.array([7, 2, 9])
    batch = flat.batch(places)
    most = max(len(flat.words[place]) for place in places)
    for row, place in enumerate(places):
        ids = encoder.tokenize([passages[place].text])[0].ids
        (alone,) = encoder.hidden_states([ids], SHAPE.layers)
        assert batch.mask[row].sum() == len(ids)
        for state, expected in zip(batch.states, alone.states, strict=True):
            assert torch.equal(state[row, : len(ids)], expected[0, : len(ids)].bfloat16())
        words = split_words(passages[place].text)
        expected_targets = word_targets(passages[place], words).targets
        assert np.array_equal(batch.targets[row * most : row * most + len(words)], expected_targets)
        assert batch.is_word[row * most : (row + 1) * most].sum() == len(words)
    assert batch.is_word[-1] == 0


def test_word_logits_are_means_over_the_words_pieces(folder):
    encoder = PassageEncoder.load(folder, None, precision="float32")
    passages = [TrainingPassage("p", "s", text, (), "train") for text in ("cat 7", "a dog, mat")]
    batch = FrozenStates(encoder, passages, SHAPE.layers, "cpu").batch(np.array([0, 1]))
    pieces = torch.arange(batch.mask.numel() * 2, dtype=torch.float32).view(*batch.mask.shape, 2)
    found = word_logits(pieces, batch)
    # pieces: [CLS] c a t 7 [SEP]; and [CLS] a d o g , m a t [SEP]; three words a row at most
    assert torch.equal(found[0], pieces[0, 1:4].mean(dim=0))
    assert torch.equal(found[1], pieces[0, 4])
    assert torch.equal(found[3], pieces[1, 1])
    assert torch.equal(found[5], pieces[1, 6:9].mean(dim=0))
    assert batch.is_word.tolist() == [True, True, False, True, True, True, False]


def test_batches_depend_on_seed_and_epoch_alone_and_hold_like_lengths():
    lengths = np.random.default_rng(0).integers(5, 200, size=1000)
    batches = epoch_batches(lengths, 10, seed=1, epoch=2, together=20)
    again = epoch_batches(lengths, 10, seed=1, epoch=2, together=20)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(lengths, 10, 1, 3, together=20)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    spread = np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])
    assert spread < 40


def test_an_incomplete_batch_waits_unless_it_is_the_only_one():
    lengths = np.full(25, 9)
    assert [len(batch) for batch in epoch_batches(lengths, 10, 0, 0)] == [10, 10]
    assert [len(batch) for batch in epoch_batches(lengths, 40, 0, 0)] == [25]


def test_training_learns_which_words_are_asked_about(folder, tmp_path):
    recipe = SalienceRecipe(
        steps=40, batch=32, learning_rate=6e-3, warm_up=2, evaluate_every=40, checkpoint_every=40, shape=SHAPE
    )
    card = train_salience(folder, made_up(120), tmp_path, lexicon=LEXICON, recipe=recipe)
    curve = [json.loads(line) for line in (tmp_path / "salience.curve.jsonl").read_text().splitlines()]
    assert curve[-1]["kept"]["held_out"]["12"] >= 0.9  # 0.3 by chance
    assert card["answers_measured"] == {"held_out": 20}
    encoder = PassageEncoder.load(folder, tmp_path / "salience.safetensors", precision="float32")
    found = encoder.encode(["dog mat oak 57 sun cat dog"])[0]
    assert found.words[int(np.argmax(found.scores))] == "57"
    assert encoder.salience_digest == card["file_sha256"]
    assert json.loads((tmp_path / "salience.json").read_text())["trained_on"] == {"made": 100}


def test_a_stopped_run_goes_on_to_the_same_weights(folder, tmp_path):
    passages = made_up(60)
    straight = train_salience(folder, passages, tmp_path / "straight", lexicon=LEXICON, recipe=RECIPE)

    def stop(step: int, steps: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_salience(folder, passages, tmp_path / "two", lexicon=LEXICON, recipe=RECIPE, progress=stop)
    lines: list[str] = []
    resumed = train_salience(folder, passages, tmp_path / "two", lexicon=LEXICON, recipe=RECIPE, log=lines.append)
    assert "resuming at step 3 of 6" in lines
    assert resumed["file_sha256"] == straight["file_sha256"]
    again = train_salience(folder, passages, tmp_path / "two", lexicon=LEXICON, recipe=RECIPE, log=lines.append)
    assert "resuming at step 6 of 6" in lines
    assert again["file_sha256"] == straight["file_sha256"]


def test_the_head_of_the_best_evaluation_is_written(folder, tmp_path, monkeypatch):
    def with_shares(name: str, *shares: float) -> dict:
        given = iter(shares)
        monkeypatch.setattr(
            "mbc_core.training.salience.share_kept_whole",
            lambda texts, scores, answers, lexicon, budgets: dict.fromkeys(budgets, next(given)),
        )
        return train_salience(folder, made_up(60), tmp_path / name, lexicon=LEXICON, recipe=RECIPE)

    first, last = with_shares("first", 0.9, 0.5, 0.1), with_shares("last", 0.1, 0.5, 0.9)
    assert (first["chosen_step"], last["chosen_step"]) == (2, 6)
    assert first["share_of_answers_kept_whole_at_codes"] == {"held_out": dict.fromkeys((12, 24, 41, 64), 0.9)}
    assert first["file_sha256"] != last["file_sha256"]


@pytest.mark.parametrize("spoil", ["recipe", "passages", "file"])
def test_a_checkpoint_of_another_run_is_not_continued(folder, tmp_path, spoil):
    train_salience(folder, made_up(60), tmp_path, lexicon=LEXICON, recipe=RECIPE)
    recipe = SalienceRecipe(steps=2, batch=8, seed=9, shape=SHAPE) if spoil == "recipe" else RECIPE
    passages = made_up(60, seed=4) if spoil == "passages" else made_up(60)
    if spoil == "file":
        (tmp_path / "salience.checkpoint.safetensors").write_bytes(b"cut short")
    lines: list[str] = []
    train_salience(folder, passages, tmp_path, lexicon=LEXICON, recipe=recipe, log=lines.append)
    assert any("starting anew" in line for line in lines)
    assert not any("resuming" in line for line in lines)


def test_dev_passages_are_measured_by_source(folder, tmp_path):
    dev = [
        TrainingPassage("d:1", "news", "cat 11 dog", (("How many?", ("11",)),), "dev"),
        TrainingPassage("d:2", "wiki", "cat 11 dog", (("How many?", ("cat dog",)),), "dev"),
    ]
    recipe = SalienceRecipe(steps=1, batch=8, shape=SHAPE)
    card = train_salience(folder, made_up(30), tmp_path, lexicon=LEXICON, recipe=recipe, dev=dev)
    assert card["answers_measured"] == {"held_out": 5, "news": 1, "wiki": 0}
    assert set(card["share_of_answers_kept_whole_at_codes"]) == {"held_out", "news", "wiki"}
    assert card["share_of_answers_kept_whole_at_codes"]["news"][64] == 1.0


def test_minutes_end_the_run(folder, tmp_path):
    recipe = SalienceRecipe(steps=10_000, batch=8, minutes=1e-9, shape=SHAPE)
    card = train_salience(folder, made_up(30), tmp_path, lexicon=LEXICON, recipe=recipe)
    assert card["chosen_step"] == 1


def test_nothing_held_out_is_refused(folder, tmp_path):
    train_only = [one for one in made_up(12) if one.split == "train"]
    with pytest.raises(UsageError, match="nothing held out: '10 passages to train on, 0 held out'"):
        train_salience(folder, train_only, tmp_path, lexicon=LEXICON, recipe=RECIPE)


def test_the_head_is_the_recipes_size():
    parameters = sum(parameter.numel() for parameter in SalienceHead(SalienceRecipe().shape).parameters())
    assert parameters * 2 < 6.6e6  # bytes in half precision
