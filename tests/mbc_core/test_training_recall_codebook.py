"""The rotation made for recall, and the score that credits length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codebook_data import codebook_of, topical_embeddings

from mbc_core.codes import LENGTH_WEIGHT, Rotation, decode, length_credits, pack, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.recall import RecallIndex, exhaustive_scores
from mbc_core.training.codebook import HeldOutQuestions, address_recall, train_codebook
from mbc_core.training.neighbours import code_scores
from mbc_core.training.recall_codebook import measure_recall, principal_components, spread_rotation

WIDTH, SLOTS = 48, 8


def planted(count: int, seed: int = 0) -> np.ndarray:
    """Unit rows whose variance falls from axis to axis of a hidden basis, as that of text embeddings does."""
    basis = Rotation.random(WIDTH, seed=99).matrix
    spread = 1.0 / np.arange(1, WIDTH + 1)
    rows = (np.random.default_rng(seed).standard_normal((count, WIDTH)) * spread) @ basis
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


PASSAGES = planted(2000)


def questions(count: int) -> HeldOutQuestions:
    near = PASSAGES[:count] + 0.1 * planted(count, seed=5)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    return HeldOutQuestions(near.astype(np.float32), np.arange(count))


def test_the_rotation_is_orthogonal_and_keeps_inner_products():
    rotation = spread_rotation(PASSAGES, SLOTS, seed=3)
    matrix = rotation.matrix.astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(WIDTH)).max() < 1e-5
    turned = rotation.apply(PASSAGES[:50])
    assert turned @ turned.T == pytest.approx(PASSAGES[:50] @ PASSAGES[:50].T, abs=1e-5)


def test_every_slot_gets_one_axis_of_every_band():
    axes = spread_rotation(PASSAGES, SLOTS, seed=3).matrix.reshape(SLOTS, WIDTH // SLOTS, WIDTH).astype(np.float64)
    bands = principal_components(PASSAGES).reshape(WIDTH // SLOTS, SLOTS, WIDTH)
    inside = np.einsum("tbd,bcd->tbc", axes, bands)
    assert (inside**2).sum(axis=2) == pytest.approx(np.ones((SLOTS, WIDTH // SLOTS)), abs=1e-5)
    assert (inside**2).max() < 0.99, "within a band the axes are mixed"


@pytest.mark.parametrize("slots", [SLOTS, SLOTS // 2])
def test_variance_falls_from_band_to_band_within_the_slots_of_either_profile(slots):
    vectors = to_slots(PASSAGES, spread_rotation(PASSAGES, SLOTS, seed=3), slots).astype(np.float64)
    falling = (vectors**2).mean(axis=(0, 1)).reshape(SLOTS // slots, WIDTH // SLOTS)
    assert (np.diff(falling, axis=1) < 0).all()


def test_the_first_components_are_those_of_a_plain_decomposition():
    found = principal_components(PASSAGES)
    _, _, plain = np.linalg.svd(PASSAGES.astype(np.float64), full_matrices=False)
    for ours, theirs in zip(found[:5], plain[:5], strict=True):
        assert abs(ours @ theirs) == pytest.approx(1.0, abs=1e-6)
        assert ours[np.abs(ours).argmax()] > 0


def test_codes_recall_better_than_in_a_random_rotation(tmp_path):
    """The planted set is what a random rotation wastes bits on; both codebooks are by k-means."""
    asked, shares = questions(300), {}
    for name, rotation in (("random", None), ("spread", spread_rotation(PASSAGES, SLOTS, seed=0))):
        (card,) = train_codebook(
            PASSAGES, tmp_path / name, slots=(SLOTS,), codewords=64, held_out=asked, rotation=rotation, device="cpu"
        )
        shares[name] = card["held_out_recall"]
        assert Rotation.load(tmp_path / name / "rotation.safetensors").digest == card["rotation"]
    assert shares["spread"]["codes_at_1"] > shares["random"]["codes_at_1"] + 0.1
    assert shares["spread"]["codes_at_5"] > shares["random"]["codes_at_5"]
    assert shares["spread"]["float_at_1"] == pytest.approx(shares["random"]["float_at_1"], abs=0.01)


def test_a_seed_gives_the_same_rotation_again():
    one, same, other = (spread_rotation(PASSAGES, SLOTS, seed=seed) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(UsageError, match="no rotation can be fitted: 'T = 7, 2000 embeddings of width 48'"):
        spread_rotation(PASSAGES, 7, seed=0)
    with pytest.raises(UsageError, match="no rotation can be fitted: 'T = 8, 47 embeddings"):
        spread_rotation(PASSAGES[:47], SLOTS, seed=0)


def test_the_card_holds_what_was_measured(tmp_path):
    seen = []

    def measured(rotation, book, slots):
        seen.append((rotation.digest, book.digest, slots))
        return {"set": {"codes_at_1": 0.5}}

    (card,) = train_codebook(PASSAGES, tmp_path, slots=(SLOTS,), codewords=16, measured=measured, device="cpu")
    assert card["recall"] == {"set": {"codes_at_1": 0.5}}
    assert seen == [(card["rotation"], card["digest"], SLOTS)]


def test_recall_is_measured_on_prepared_sets(monkeypatch, tmp_path):
    from mbc_core.training import recall_codebook

    class Data:
        embeddings = PASSAGES
        question_embeddings = questions(100).embeddings
        rows = np.arange(100)

    monkeypatch.setattr(recall_codebook, "load_prepared", {tmp_path: Data}.__getitem__)
    rotation = Rotation.random(WIDTH, seed=0)
    book = codebook_of(to_slots(PASSAGES, rotation, SLOTS), 256)
    found = measure_recall({"planted": tmp_path}, rotation, book, SLOTS)
    expected = address_recall(PASSAGES, questions(100), rotation, book, SLOTS, torch.device("cpu"))
    assert found == {"planted": expected}
    assert found["planted"]["questions"] == 100


def test_the_credit_by_hand():
    """x̂ of length 0.5 and 0: β·(1 - 0.25) and β."""
    decoded = np.array([[0.3, 0.4], [0.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    assert length_credits(decoded) == pytest.approx([0.75 * LENGTH_WEIGHT, LENGTH_WEIGHT, 0.0], abs=1e-7)


@pytest.mark.parametrize("engine", ["faiss", "exact"])
def test_every_search_scores_the_same(engine):
    """Plain loops over slots = oracle = FAISS = NumPy look-ups = torch."""
    rotation = Rotation.random(WIDTH, seed=0)
    vectors = to_slots(PASSAGES[:60], rotation, SLOTS)
    book = codebook_of(vectors, 32)
    codes = quantize(vectors, book.codewords)
    asked = topical_embeddings(4, WIDTH, seed=7)
    loops = np.zeros((4, 60))
    for place, slots in enumerate(to_slots(asked, rotation, SLOTS).astype(np.float64)):
        for row, line in enumerate(codes.tolist()):
            words = [book.codewords[code].astype(np.float64) for code in line]
            loops[place, row] = sum(slot @ word for slot, word in zip(slots, words, strict=True))
            loops[place, row] += LENGTH_WEIGHT * (1 - sum(word @ word for word in words))
    assert exhaustive_scores(asked, rotation, codes, book.codewords) == pytest.approx(loops, abs=1e-6)
    assert decode(codes, book.codewords).shape == (60, WIDTH)
    index = RecallIndex.build([(book, pack(codes), np.arange(60))], rotation, SLOTS, engine=engine)
    scores, rows = index.search(asked, 60)
    assert np.take_along_axis(loops, rows, axis=1) == pytest.approx(scores, abs=1e-6)
    by_torch = code_scores(
        torch.from_numpy(to_slots(asked, rotation, SLOTS)),
        torch.from_numpy(codes.astype(np.int64)),
        torch.from_numpy(book.codewords),
    )
    assert by_torch.numpy() == pytest.approx(loops, abs=1e-6)
