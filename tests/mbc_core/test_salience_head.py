from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoder import SHAPE, WIDTH, write_tiny_head

from mbc_core.codebook.files import read_tensors, write_tensors
from mbc_core.encoder.salience_head import FORMAT, SalienceHead, word_scores
from mbc_core.encoder.word_features import SIZES
from mbc_core.errors import DamagedFile, ModelError


def states(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, length, WIDTH, generator=generator) for _ in SHAPE.layers)


def features(rows: int, length: int) -> torch.Tensor:
    """One category of each feature a piece, going round."""
    steps = torch.arange(rows * length).view(rows, length, 1)
    return (steps % torch.tensor(SIZES)).to(torch.uint8)


def test_every_feature_is_read():
    head = SalienceHead(SHAPE).eval()
    found, mask, marks = states(1, 6), torch.ones(1, 6), features(1, 6)
    reference = head(found, mask, marks)
    for number in range(len(SIZES)):
        changed = marks.clone()
        changed[0, 0, number] = (changed[0, 0, number] + 1) % SIZES[number]
        assert not torch.allclose(head(found, mask, changed)[0, 0], reference[0, 0])


def test_a_head_of_before_the_features_reads_states_alone(tmp_path):
    torch.manual_seed(3)
    head = SalienceHead(replace(SHAPE, features=())).eval()
    head.save(tmp_path / "new.safetensors", "abc")
    tensors, metadata = read_tensors((tmp_path / "new.safetensors").read_bytes(), "new", FORMAT)
    old = {**metadata, "shape": {name: size for name, size in metadata["shape"].items() if name != "features"}}
    (tmp_path / "old.safetensors").write_bytes(write_tensors(tensors, old))
    again = SalienceHead.load(tmp_path / "old.safetensors", "abc")
    found, mask = states(1, 6), torch.ones(1, 6)
    torch.testing.assert_close(again(found, mask, features(1, 6)), head(found, mask, features(1, 6)), atol=5e-3, rtol=0)


def test_padding_is_not_read():
    head = SalienceHead(SHAPE).eval()
    found = states(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    changed = tuple(state.clone() for state in found)
    for state in changed:
        state[0, 5:] = 100.0
    before, after = head(found, mask, features(2, 9)), head(changed, mask, features(2, 9))
    torch.testing.assert_close(before[0, :5], after[0, :5])
    torch.testing.assert_close(before[1], after[1])
    assert before.shape == (2, 9, 2)
    assert before.dtype == torch.float32


def test_every_layer_and_every_other_piece_is_read():
    head = SalienceHead(SHAPE).eval()
    found, mask = states(1, 6), torch.ones(1, 6)
    reference = head(found, mask, features(1, 6))
    for layer in range(len(SHAPE.layers)):
        changed = tuple(state.clone() for state in found)
        changed[layer][0, 5] += torch.randn(WIDTH)
        assert not torch.allclose(head(changed, mask, features(1, 6))[0, 0], reference[0, 0])


def test_a_saved_head_gives_the_same_logits_in_half_precision(tmp_path):
    torch.manual_seed(3)
    head = SalienceHead(SHAPE).eval()
    digest = head.save(tmp_path / "head.safetensors", "abc")
    again = SalienceHead.load(tmp_path / "head.safetensors", "abc")
    found, mask = states(2, 7), torch.ones(2, 7)
    marks = features(2, 7)
    torch.testing.assert_close(again(found, mask, marks), head(found, mask, marks), atol=5e-3, rtol=0)
    assert again.save(tmp_path / "again.safetensors", "abc") == digest
    assert not again.training


def test_word_scores_are_of_mean_logits():
    logits = np.array([[9, 9], [0, 0], [2, -2], [-60, 1], [1, -100]], dtype=np.float32)
    found = word_scores(logits, np.array([-1, 0, 0, 2, 3], dtype=np.int32), 5)

    def chance(logit: float) -> float:
        return 1 / (1 + np.exp(-logit))

    expected = [chance(1) + 0.5 * chance(-1), 0.0, 0.5 * chance(1), chance(1), 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert found.dtype == np.float32


def test_no_words_no_scores():
    assert word_scores(np.zeros((2, 2), np.float32), np.array([-1, -1], dtype=np.int32), 0).shape == (0,)


def test_another_encoders_head_is_refused_by_name(tmp_path):
    write_tiny_head(tmp_path / "head.safetensors", "111111111111")
    with pytest.raises(
        ModelError, match=r"trained for another encoder.*encoder 111111111111, this one is 222222222222"
    ):
        SalienceHead.load(tmp_path / "head.safetensors", "222222222222")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"the salience head cannot be read.*none\.safetensors"):
        SalienceHead.load(tmp_path / "none.safetensors", "abc")


@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_a_damaged_file_is_named(tmp_path, keep):
    path = write_tiny_head(tmp_path / "head.safetensors", "abc")
    stored = path.read_bytes()
    path.write_bytes(stored[: int(len(stored) * keep) if keep == 0.5 else keep])
    with pytest.raises(DamagedFile, match=r"the file .*head\.safetensors cannot be read"):
        SalienceHead.load(path, "abc")


@pytest.mark.parametrize(("lose", "gain", "cause"), [("out.bias", "", "Missing.*out.bias"), ("", "x", "Unexpected.*x")])
def test_missing_and_unexpected_tensors_are_named(tmp_path, lose, gain, cause):
    path = write_tiny_head(tmp_path / "head.safetensors", "abc")
    tensors, metadata = read_tensors(path.read_bytes(), "head", FORMAT)
    tensors = {name: tensor for name, tensor in tensors.items() if name != lose}
    path.write_bytes(write_tensors(tensors | ({gain: np.zeros(1)} if gain else {}), metadata))
    with pytest.raises(DamagedFile, match=cause):
        SalienceHead.load(path, "abc")


def test_a_shape_that_the_tensors_do_not_have_is_named(tmp_path):
    path = write_tiny_head(tmp_path / "head.safetensors", "abc")
    tensors, metadata = read_tensors(path.read_bytes(), "head", FORMAT)
    metadata["shape"]["width"] = 26
    path.write_bytes(write_tensors(tensors, metadata))
    with pytest.raises(DamagedFile, match="size mismatch"):
        SalienceHead.load(path, "abc")


def test_another_format_is_named(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(write_tensors({"x": np.zeros(1)}, {"format": "mbc-codebook/1"}))
    with pytest.raises(DamagedFile, match=r"another format: 'mbc-codebook/1'.*mbc-salience/1 is expected"):
        SalienceHead.load(tmp_path / "head.safetensors", "abc")
