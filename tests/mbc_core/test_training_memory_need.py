"""The memory estimate against what autograd really keeps, tensor by tensor, and against counted parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora, trainable
from mbc_core.reader.language_model import LanguageModel
from mbc_core.training.batches import MicroBatch
from mbc_core.training.loop import Schedule, Trainer
from mbc_core.training.memory_need import Shape, training_memory
from tests.mbc_core.tiny_reader import gpt2, tokenizer

pytestmark = pytest.mark.usefixtures("single_thread")

TOKENS = 256


def config(layers: int, width: int, feed_forward: int, kv_heads: int, **more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=1, **more,
    )  # fmt: skip


def kept_bytes(given: LlamaConfig, rank: int) -> int:
    """Bytes of all distinct storages that the backward pass of one batch will read, parameters left out."""
    model = LlamaForCausalLM(given).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = add_kv_lora(model, KVLoraConfig(r=rank, alpha=rank, dropout=0.05))
    trainer = Trainer(LanguageModel(adapted, tokenizer(), "x", "x"), Schedule(1, None))
    known = {one.untyped_storage().data_ptr() for one in adapted.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    ids = torch.randint(0, 128, (2, TOKENS // 2))
    batch = MicroBatch(ids, torch.tensor([3]), torch.tensor([5]), 2)
    adapted.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer._forward(batch)
    return sum(one.untyped_storage().nbytes() for one in kept.values())


@pytest.mark.parametrize(
    ("width", "feed_forward", "kv_heads", "rank"),
    [(64, 128, 2, 8), (64, 256, 4, 8), (128, 384, 1, 16), (256, 512, 2, 4)],
)
def test_activations_are_what_autograd_keeps(width, feed_forward, kv_heads, rank):
    two, four = (kept_bytes(config(layers, width, feed_forward, kv_heads), rank) for layers in (2, 4))
    shape = Shape.of(config(1, width, feed_forward, kv_heads))
    assert (four - two) / 2 / TOKENS == pytest.approx(shape.activation_bytes(rank), rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted(tied):
    given = config(3, 64, 160, 2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(given)
    norms = sum(one.numel() for name, one in model.named_parameters() if "norm" in name)
    shape = Shape.of(given)
    assert shape.parameters == sum(one.numel() for one in model.parameters()) - norms
    adapted = add_kv_lora(model, KVLoraConfig(r=4, alpha=8))
    assert shape.adapter_parameters(4) == sum(one.numel() for one in trainable(adapted).values())


def test_an_architecture_with_other_names_has_a_shape_too():
    assert Shape.of(gpt2().config) == Shape(3, 32, 128, 32, 260, True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("1B (Llama 3.2)", Shape(16, 2048, 8192, 512, 128_256, True)),
        ("3B (Llama 3.2)", Shape(28, 3072, 8192, 1024, 128_256, True)),
        ("8B (Llama 3.1)", Shape(32, 4096, 14_336, 1024, 128_256, False)),
    ],
)
def test_the_runbooks_table(name, shape):
    """The row of the runbook is the one that the formula gives."""
    needs = [training_memory(shape, batch_tokens=tokens) for tokens in (2048, 4096, 8192, 16_384)]
    cells = [
        name,
        f"{shape.parameters / 1e9:.2f}",
        f"{shape.adapter_parameters(32) / 1e6:.1f}",
        f"{shape.activation_bytes(32) / 1e6:.2f}",
        *(f"{need.total / 1e9:.0f}" for need in needs),
    ]
    runbook = (Path(__file__).resolve().parents[2] / "runbook.md").read_text("utf-8")
    assert f"| {' | '.join(cells)} |" in runbook
    assert f"about {needs[0].total / 1e9:.1f} GB of memory to train (base {needs[0].base / 1e9:.1f}" in str(needs[0])
