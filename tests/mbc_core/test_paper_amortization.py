"""Amortization: T tokens of a text, whatever its padding; the paper's T5 form and the default one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import T5ForConditionalGeneration

from mbc_core.errors import UsageError
from mbc_core.paper.amortization import Amortizer, EmbeddingQueries, T5Amortizer, TokenHeads
from tests.mbc_core.paper_parts import PASSAGES, bert, padded, t5

T, WIDTH = 5, 32


def amortizer(kind: str, **changes) -> Amortizer | T5Amortizer:
    torch.manual_seed(2)
    if kind == "t5":
        return T5Amortizer(t5(), T, WIDTH, **changes).eval()
    return Amortizer(bert(), T, WIDTH, heads=4, **changes).eval()


BOTH = pytest.mark.parametrize("kind", ["encoder", "t5"])


@BOTH
@torch.no_grad()
def test_padding_never_changes_z(kind):
    made = amortizer(kind)
    alone = torch.cat([made(*padded([text])) for text in PASSAGES])
    assert alone.shape == (len(PASSAGES), T, WIDTH)
    assert float(alone.std()) > 0.1
    for longest in (None, 60, 127):
        together = made(*padded(PASSAGES, longest))
        assert float((together - alone).abs().max()) < 1e-6
    if kind == "t5":  # relative positions: even the side of the padding is nothing to it
        ids, mask = padded([PASSAGES[0]], 40)
        count = int(mask.sum())
        left_ids = torch.cat([ids[:, count:], ids[:, :count]], 1)
        left_mask = torch.cat([mask[:, count:], mask[:, :count]], 1)
        assert float((made(left_ids, left_mask) - alone[:1]).abs().max()) < 1e-6


@BOTH
@torch.no_grad()
def test_what_stands_in_the_padding_is_nothing_and_would_matter_if_attended(kind):
    made = amortizer(kind)
    ids, mask = padded(PASSAGES, 48)
    noise = torch.randint(0, 256, ids.shape, generator=torch.Generator().manual_seed(0))
    other = torch.where(mask == 1, ids, noise)
    assert torch.equal(made(ids, mask), made(other, mask))
    # The reference gave T5's decoder no mask of the text, and all of it was attended.
    everything = torch.ones_like(mask)
    assert float((made(ids, everything) - made(other, everything)).abs().max()) > 1e-3


@torch.no_grad()
def test_the_t5_decoder_masks_the_text_by_itself():
    """The encoder's mask alone would not do: the decoder must not see the encoder's states at padding either."""
    made = amortizer("t5")
    ids, mask = padded(PASSAGES, 48)
    seen = {}
    made.encoder.decoder.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    made(ids, mask)
    assert torch.equal(seen["encoder_attention_mask"], mask)
    assert seen["input_ids"] is None
    assert torch.equal(seen["inputs_embeds"][0], made.queries)


@torch.no_grad()
def test_the_t5_decoder_is_causal_and_the_default_one_is_not():
    for kind, causal in (("t5", True), ("encoder", False)):
        made = amortizer(kind)
        ids, mask = padded(PASSAGES[:1])
        before = made(ids, mask)
        made.queries[3] += 1.0
        changed = (made(ids, mask) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == ([False] * 3 + [True] * 2 if causal else [True] * 5)


def test_the_t5_has_no_language_model_head():
    assert not [name for name, _ in amortizer("t5").named_parameters() if "lm_head" in name]
    with pytest.raises(UsageError, match=r"language-model head.*T5ForConditionalGeneration.*T5Model"):
        T5Amortizer(T5ForConditionalGeneration(t5().config), T, WIDTH)


@BOTH
def test_a_trained_encoder_gets_gradients_and_a_frozen_one_neither_gradient_nor_dropout(kind):
    ids, mask = padded(PASSAGES)
    frozen = amortizer(kind, train_encoder=False).train()
    assert torch.equal(frozen(ids, mask), frozen(ids, mask)), "no dropout in a frozen encoder"
    frozen(ids, mask).sum().backward()
    assert not [one for one in frozen.encoder.parameters() if one.grad is not None or one.requires_grad]
    assert frozen.queries.grad is not None
    trained = amortizer(kind, train_encoder=True).train()
    assert not torch.equal(trained(ids, mask), trained(ids, mask))
    trained(ids, mask).square().sum().backward()
    assert [name for name, one in trained.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("out", [6, 4])
def test_heads_are_the_papers_formula(shared, out):
    torch.manual_seed(0)
    heads = TokenHeads(3, 6, out, shared=shared)
    for one in (heads.norm_weight, heads.norm_bias):
        one.data.normal_()
    states = torch.randn(2, 3, 6)
    found = heads(states)
    for i in range(3):
        k = 0 if shared else i
        h = states[:, i]
        normal = functional.layer_norm(h, (6,), heads.norm_weight[k], heads.norm_bias[k])
        inner = torch.tanh(normal @ heads.inner.weight[k] + heads.inner.bias[k])
        skip = h if out == 6 else h @ heads.skip.weight[k] + heads.skip.bias[k]
        assert torch.allclose(found[:, i], skip + inner @ heads.outer.weight[k] + heads.outer.bias[k], atol=1e-6)
    assert len(heads.inner.weight) == (1 if shared else 3)


def test_queries_from_an_embedding():
    torch.manual_seed(0)
    made = EmbeddingQueries(96, T, WIDTH)
    embeddings = functional.normalize(torch.randn(3, 96))
    found = made(embeddings)
    assert found.shape == (3, T, WIDTH)
    assert torch.allclose(found[:1], made(embeddings[:1]), atol=1e-6)
    assert float((found[:, 0] - found[:, 1]).detach().abs().max()) > 0.1
    assert float((found[0] - found[1]).detach().abs().max()) > 0.1


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"5 heads, width 24.*divisor"):
        Amortizer(bert(), T, WIDTH, heads=5)
