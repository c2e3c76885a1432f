"""The prefix: slots as the paper deals them out, and attention to it as written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mbc_core.paper.prefix import Prefix, PrefixShape, slot_sources
from mbc_core.reader.generate import answer_prompts, greedy
from mbc_core.reader.prefix_cache import prefix_cache
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import gpt2, language_model, llama

T, WIDTH = 5, 12
KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def prefix_for(kind: str, **changes) -> Prefix:
    torch.manual_seed(3)
    shape = PrefixShape.of((llama() if kind == "llama" else gpt2()).config)
    return Prefix(shape, WIDTH, T, hidden=16, **changes)


def latents(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, T, WIDTH, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("tokens", "slots", "expected"),
    [
        (3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        (5, 8, [0, 0, 1, 1, 2, 2, 3, 4]),  # T < slots < 2 T, where the reference breaks
        (4, 4, [0, 1, 2, 3]),
        (6, 4, [0, 1, 2, 3]),
    ],
)
def test_each_latent_is_repeated_and_the_first_get_one_copy_more(tokens, slots, expected):
    assert slot_sources(tokens, slots).tolist() == expected


def test_smollm2s_shape():
    config = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    assert PrefixShape.of(config) == PrefixShape(layers=30, kv_heads=3, head_dim=64)
    made = Prefix(PrefixShape.of(config), 384, 24)
    assert made.slots.shape == (120, 384)
    assert slot_sources(24, 120).bincount().tolist() == [5] * 24
    assert sum(one.numel() for one in made.parameters()) < 700_000


@KINDS
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_slots_are_the_papers_formula(kind, shared):
    made = prefix_for(kind, shared=shared)
    for one in (made.norm_weight, made.norm_bias):
        one.normal_()
    shape, given = made.shape, latents()
    pairs = made(given)
    assert len(pairs) == 3
    assert shape.kv_heads == (2 if kind == "llama" else 4)
    for layer, (key, value) in enumerate(pairs):
        assert key.shape == value.shape == (2, shape.kv_heads, 2, shape.head_dim)
        for part, found in enumerate((key, value)):
            for virtual in range(2):
                slot = virtual * 2 * shape.layers + 2 * layer + part
                network = 0 if shared else slot
                x = given[:, made.sources[slot]] + (made.slots[slot] if shared else 0)
                normal = functional.layer_norm(x, (WIDTH,), made.norm_weight[network], made.norm_bias[network])
                hidden = functional.gelu(normal @ made.inner.weight[network] + made.inner.bias[network])
                out = x @ made.skip.weight[network] + made.skip.bias[network]
                out = out + hidden @ made.outer.weight[network] + made.outer.bias[network]
                expected = out.view(2, shape.kv_heads, shape.head_dim)
                assert torch.allclose(found[:, :, virtual], expected, atol=1e-5)


def attended(query, key, value, prefix):
    """Softmax over the prefix, always visible, and over tokens up to one's own."""
    key, value = (torch.cat([a, b], dim=2) for a, b in zip(prefix, (key, value), strict=True))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    tokens, virtual = query.shape[2], prefix[0].shape[2]
    visible = torch.arange(key.shape[2])[None] < torch.arange(tokens)[:, None] + virtual + 1
    found = logits.masked_fill(~visible, -math.inf).softmax(-1) @ value
    return found.transpose(1, 2).flatten(2)


def heads(states, count):
    return states.view(*states.shape[:2], count, -1).transpose(1, 2)


def llama_by_hand(model, ids, pairs):
    config, decoder = model.config, model.model
    x = decoder.embed_tokens(ids)
    positions = 2 + torch.arange(ids.shape[1])[None]
    cos, sin = decoder.rotary_emb(x, positions)
    for layer, prefix in zip(decoder.layers, pairs, strict=True):
        normal, attention = layer.input_layernorm(x), layer.self_attn
        query = heads(attention.q_proj(normal), config.num_attention_heads)
        key, value = (heads(one(normal), config.num_key_value_heads) for one in (attention.k_proj, attention.v_proj))
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        x = x + attention.o_proj(attended(query, key, value, prefix))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


def gpt2_by_hand(model, ids, pairs):
    decoder = model.transformer
    x = decoder.wte(ids) + decoder.wpe(2 + torch.arange(ids.shape[1]))
    for block, prefix in zip(decoder.h, pairs, strict=True):
        query, key, value = (heads(one, 4) for one in block.attn.c_attn(block.ln_1(x)).split(32, dim=2))
        x = x + block.attn.c_proj(attended(query, key, value, prefix))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(decoder.ln_f(x))


@KINDS
@torch.no_grad()
def test_a_prefix_is_attended_as_written_out_by_hand(kind):
    model = llama() if kind == "llama" else gpt2()
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    pairs = prefix_for(kind)(latents())
    by_hand = (llama_by_hand if kind == "llama" else gpt2_by_hand)(model, ids, pairs)
    found = model(ids, position_ids=2 + torch.arange(7).expand(2, -1), past_key_values=prefix_cache(pairs)).logits
    assert torch.allclose(found, by_hand, atol=1e-4, rtol=1e-4)
    assert float((found - model(ids).logits).abs().max()) > 0.01
    unshifted = model(ids, position_ids=torch.arange(7).expand(2, -1), past_key_values=prefix_cache(pairs)).logits
    assert float((unshifted - by_hand).abs().max()) > (1e-3 if kind == "gpt2" else -1)


@KINDS
@torch.no_grad()
def test_generation_says_what_the_training_forward_says(kind):
    reader = language_model(kind)
    pairs = prefix_for(kind)(latents(3))
    prompts = [[7, 8, 9], [40] * 11, [1, 2, 3, 4, 5]]
    made = greedy(reader, prompts, [256], 6, prefix=pairs)
    for row, prompt in enumerate(prompts):
        own = [(key[row : row + 1], value[row : row + 1]) for key, value in pairs]
        assert greedy(reader, [prompt], [256], 6, prefix=own) == [made[row]]
        whole = torch.tensor([prompt + made[row]])
        places = 2 + torch.arange(whole.shape[1])[None]
        logits = reader.model(whole, position_ids=places, past_key_values=prefix_cache(own)).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made[row]
    assert made != greedy(reader, prompts, [256], 6), "the prefix must matter"


@KINDS
@torch.no_grad()
def test_each_prompt_gets_its_own_prefix_whatever_the_batches(kind):
    reader = language_model(kind)
    form = PromptFormat(reader.tokenizer)
    prompts = [form.question(one) for one in ("What is far?", "Who?", "When was the harbour of Camelot built?")]
    pairs = prefix_for(kind)(latents(3))

    def chosen(places):
        return [(key[list(places)], value[list(places)]) for key, value in pairs]

    together = answer_prompts(reader, form, prompts, new_tokens=5, prefixes=chosen)
    alone = answer_prompts(reader, form, prompts, new_tokens=5, prefixes=chosen, batch_tokens=1)
    assert together == alone


@KINDS
def test_gradients_flow_through_the_cache(kind):
    model = llama() if kind == "llama" else gpt2()
    made = prefix_for(kind)
    given = latents().requires_grad_()
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=prefix_cache(made(given))).logits.square().sum().backward()
    assert float(given.grad.abs().min()) > 0
    assert [name for name, one in made.named_parameters() if one.grad is None] == []


def test_a_prefix_takes_the_language_models_precision():
    pairs = prefix_for("llama")(latents())
    cache = prefix_cache(pairs, torch.bfloat16)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.get_seq_length() == 2
