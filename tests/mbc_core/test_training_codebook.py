"""Training of codebook version 0, and neighbour search by codes on tensors."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from codebook_data import codebook_of, topical_embeddings
from safetensors.numpy import save_file

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, quantize, to_slots
from mbc_core.errors import DamagedFile, UsageError
from mbc_core.recall import exhaustive_scores
from mbc_core.training import codebook as training
from mbc_core.training import neighbours
from mbc_core.training.codebook import HeldOutQuestions, kmeans, read_prepared, train_codebook
from mbc_core.training.neighbours import code_scores, nearest_by_code

EMBEDDINGS = topical_embeddings(400, 48)


def near(rows: np.ndarray, noise: float = 0.02) -> np.ndarray:
    """Questions close to their passages."""
    return (EMBEDDINGS[rows] + noise * topical_embeddings(len(rows), 48, seed=9)).astype(np.float32)


def test_kmeans_finds_clusters_that_are_there():
    centres = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32) * 10
    points = np.repeat(centres, 30, axis=0) + np.random.default_rng(1).standard_normal((300, 4)).astype(np.float32) / 99
    found, passes = kmeans(torch.from_numpy(points), 10, seed=0, iterations=50)
    distances = np.linalg.norm(found.numpy()[:, None] - centres[None], axis=2)
    assert sorted(distances.argmin(axis=1)) == list(range(10))
    assert distances.min(axis=1).max() < 0.01
    assert passes < 50, "it stops when nothing improves"


def test_kmeans_equals_the_mean_of_what_it_serves():
    """Run to its end: every codeword is the mean of the vectors nearest to it, none is empty."""
    points = topical_embeddings(500, 6)
    found, _ = kmeans(torch.from_numpy(points), 20, seed=3, iterations=1000)
    codes, _ = training._assign(torch.from_numpy(points), found)
    for code in range(20):
        assert found[code].numpy() == pytest.approx(points[codes.numpy() == code].mean(axis=0), abs=2e-2)


def test_a_codeword_without_vectors_shares_those_of_the_fullest_code():
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [7.0, 7.0]])
    codes, errors = training._assign(points, torch.tensor([[0.0, 1.0], [50.0, 50.0], [7.0, 7.0]]))
    assert codes.tolist() == [0, 0, 0, 2]
    centres, moved = training._means(points, codes, errors, 3)
    assert moved == 1
    assert centres.tolist() == [[0.0, pytest.approx(4 / 3)], [0.0, 0.0], [7.0, 7.0]]  # the middle one by error


def test_outliers_get_no_codeword_of_their_own():
    """Three outliers attract a k-means++ start; their codewords would be dead at the first update."""
    points = np.concatenate([topical_embeddings(3000, 4), np.full((3, 4), 1.5) * np.array([[1], [-1], [2]])])
    found, _ = kmeans(torch.from_numpy(points.astype(np.float32)), 20, seed=0, iterations=100)
    codes, _ = training._assign(torch.from_numpy(points.astype(np.float32)), found)
    counts = torch.bincount(codes, minlength=20)
    assert int(counts.min()) >= 0.02 * 3003 / 20


def test_chunks_change_nothing(monkeypatch):
    points = torch.from_numpy(topical_embeddings(500, 6))
    whole, _ = kmeans(points, 20, seed=3, iterations=5)
    monkeypatch.setattr(training, "_CHUNK_VECTORS", 33)
    cut, _ = kmeans(points, 20, seed=3, iterations=5)
    assert cut.numpy() == pytest.approx(whole.numpy(), abs=1e-6)


def test_train_writes_weights_that_load_and_fit(tmp_path):
    rows = np.arange(0, 400, 4)
    lines: list[str] = []
    cards = train_codebook(
        EMBEDDINGS.astype(np.float16),
        tmp_path,
        slots=(6, 12),
        codewords=64,
        seed=1,
        held_out=HeldOutQuestions(near(rows), rows),
        sources={"squad": 400},
        progress=lines.append,
    )
    rotation = Rotation.load(tmp_path / "rotation.safetensors")
    for slots, card in zip((6, 12), cards, strict=True):
        book = Codebook.from_bytes((tmp_path / f"codebook_t{slots}.safetensors").read_bytes(), "here")
        assert card == json.loads((tmp_path / f"codebook_t{slots}.json").read_text())
        assert (book.version, book.size, book.width, card["digest"]) == (0, 64, 48 // slots, book.digest)
        assert card["rotation"] == rotation.digest
        assert book.count.sum() == pytest.approx(2_000_000)
        assert book.sum / book.count[:, None] == pytest.approx(book.codewords, rel=1e-6)
        vectors = to_slots(EMBEDDINGS, rotation, slots)
        error = float(((vectors - book.codewords[quantize(vectors, book.codewords)]) ** 2).sum()) / 400
        assert card["error"] == pytest.approx(error, rel=0.01)
        assert 32 < card["perplexity"] <= 64
        assert card["sources"] == {"squad": 400}
    assert cards[1]["error"] < cards[0]["error"], "more slots, smaller error"
    assert cards[1]["held_out_recall"]["questions"] == 100
    assert cards[1]["held_out_recall"]["float_at_1"] == 1.0
    assert cards[1]["held_out_recall"]["codes_at_1"] > 0.8
    assert cards[1]["held_out_recall"]["codes_at_5"] >= cards[1]["held_out_recall"]["codes_at_1"]
    assert any("k-means pass 1" in line for line in lines)


def test_a_seed_gives_the_same_codebook_again(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_codebook(EMBEDDINGS, tmp_path / name, slots=(12,), codewords=32, seed=seed)
    files = [(tmp_path / name / "codebook_t12.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def prepared_folder(folder):
    """What `mbc train prepare` writes, as far as the codebook needs it: every tenth passage is held out."""
    folder.mkdir()
    save_file({"embeddings": EMBEDDINGS.astype(np.float16)}, folder / "embeddings.safetensors")
    split = ["dev" if row % 10 == 0 else "train" for row in range(400)]
    source = ["squad" if row < 300 else "nq" for row in range(400)]
    pq.write_table(pa.table({"source": source, "split": split}), folder / "passages.parquet")
    rows = np.arange(0, 400, 5, dtype=np.int32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(near(rows).astype(np.float16).ravel()), 48)
    pq.write_table(pa.table({"row": rows, "question_embedding": vectors}), folder / "questions.parquet")
    return folder


def test_read_prepared_keeps_questions_on_held_out_passages(tmp_path):
    embeddings, held_out, sources = read_prepared(prepared_folder(tmp_path / "prepared"))
    assert embeddings.shape == (400, 48)
    assert held_out.rows.tolist() == list(range(0, 400, 10))
    assert held_out.embeddings == pytest.approx(near(np.arange(0, 400, 5))[::2], abs=1e-3)
    assert sources == {"nq": 100, "squad": 300}
    few = read_prepared(tmp_path / "prepared", most_questions=7)[1]
    assert len(few.rows) <= 7


def test_the_command_trains_from_a_prepared_folder(tmp_path):
    from mbc_core.cli.train import train

    folder = prepared_folder(tmp_path / "prepared")
    arguments = ["codebook", str(folder), "--out", str(tmp_path / "out"), "--slots", "6", "--codewords", "32"]
    result = CliRunner().invoke(train, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "T=6: error" in result.stderr
    card = json.loads((tmp_path / "out" / "codebook_t6.json").read_text())
    assert card["held_out_recall"]["questions"] == 40
    assert (card["device"], card["seed"]) == ("cpu", 0)


def test_wrong_training_data_is_named(tmp_path):
    with pytest.raises(DamagedFile, match=r"prepared training data cannot be read: .*run `mbc train prepare`"):
        read_prepared(tmp_path)
    with pytest.raises(UsageError, match="too few vectors to train a codebook: 24"):
        train_codebook(EMBEDDINGS[:2], tmp_path, slots=(12,), codewords=32)
    with pytest.raises(UsageError, match="cannot be brought to unit length: '2 rows'"):
        train_codebook(np.zeros((2, 48)), tmp_path)
    with pytest.raises(UsageError, match="T = 7, width = 48"):
        train_codebook(EMBEDDINGS, tmp_path, slots=(7,))


def tensors(slots: int = 12):
    """(questions, codes, codewords) as tensors, and the float64 scores."""
    rotation = Rotation.random(48, seed=4)
    vectors = to_slots(EMBEDDINGS, rotation, slots)
    book = codebook_of(vectors, 64)
    codes = quantize(vectors, book.codewords)
    questions = near(np.arange(30))
    asked = torch.from_numpy(to_slots(questions, rotation, slots))
    oracle = exhaustive_scores(questions, rotation, codes, book.codewords)
    return asked, torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(book.codewords), oracle


@pytest.mark.parametrize("chunk", [1 << 26, 1000])
def test_scores_on_tensors_equal_the_float64_oracle(chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "_CHUNK_SCORES", chunk)
    asked, codes, words, oracle = tensors()
    assert code_scores(asked, codes, words).numpy() == pytest.approx(oracle, abs=1e-6)
    scores, rows = nearest_by_code(asked, codes, words, 7)
    assert (scores.shape, rows.shape, rows.dtype) == ((30, 7), (30, 7), torch.int64)
    assert scores.numpy() == pytest.approx(-np.sort(-oracle, axis=1)[:, :7], abs=1e-6)
    assert np.take_along_axis(oracle, rows.numpy(), axis=1) == pytest.approx(scores.numpy(), abs=1e-6)


def test_the_true_passage_can_be_left_out():
    asked, codes, words, _ = tensors()
    plain = nearest_by_code(asked, codes, words, 5)[1]
    exclude = plain[:, 0].clone()
    exclude[3] = -1
    left = nearest_by_code(asked, codes, words, 4, exclude=exclude)[1]
    assert torch.equal(left[:3], plain[:3, 1:])
    assert torch.equal(left[3], plain[3, :4])


def test_tensors_that_do_not_fit_are_named():
    asked, codes, words, _ = tensors()
    with pytest.raises(UsageError, match=r"do not fit together: '\[30, 12, 4\], \[400, 11\] torch.int32, \[64, 4\]'"):
        code_scores(asked, codes[:, 1:], words)
    with pytest.raises(UsageError, match="do not fit together"):
        code_scores(asked, codes.float(), words)
    with pytest.raises(UsageError, match="k is not between 1 and the number of passages: 401"):
        nearest_by_code(asked, codes, words, 401)
    with pytest.raises(UsageError, match="k is not between 1 and the number of passages: 400"):
        nearest_by_code(asked, codes, words, 400, exclude=torch.zeros(30, dtype=torch.long))
