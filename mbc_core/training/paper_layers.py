"""The language model's layers one by one, behind a prefix: the same states as its own forward pass, fit to compile.

A transformers cache is looked up by each layer's number, so a compiler would make one program a layer. Here every layer
gets its own two tensors, and one compiled program serves all layers and shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbc_core.reader.language_model import HfModel
from mbc_core.reader.prefix_cache import Pairs

Layers = Callable[[Tensor, Pairs], Tensor]
"""(ids int64 [B, L] right-padded, prefix) → last hidden states [B, L, w]."""


class LayerLoop:
    """Runs a Llama-like decoder (``embed_tokens``, ``rotary_emb``, ``layers``, ``norm``) layer by layer.

    Args:
        model: the causal model, with or without KV-LoRA.
        compiled: compile the layers, where torch can.
    """

    def __init__(self, model: HfModel, *, compiled: bool = False) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder, self.dtype = base.base_model, base.dtype
        self._numbers = [layer.self_attn.layer_idx for layer in self.decoder.layers]
        self.compiled = compiled
        if compiled:
            for layer in self.decoder.layers:
                layer.compile(dynamic=True)

    @staticmethod
    def fits(model: HfModel) -> bool:
        """Whether the model has the parts that this loop runs."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parts = ("embed_tokens", "rotary_emb", "layers", "norm")
        return all(hasattr(base.base_model, name) for name in parts)

    def __call__(self, ids: Tensor, pairs: Pairs) -> Tensor:
        """See :data:`Layers`."""
        decoder, virtual = self.decoder, pairs[0][0].shape[2]
        hidden = decoder.embed_tokens(ids)
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # else the first layer would be a program of its own
        positions = torch.arange(virtual, virtual + ids.shape[1], device=ids.device)[None]
        rotary = decoder.rotary_emb(hidden, positions)
        seen = torch.arange(virtual + ids.shape[1], device=ids.device)[None] <= positions[0][:, None]
        for layer, (key, value) in zip(decoder.layers, pairs, strict=True):
            hidden = layer(
                hidden,
                attention_mask=seen[None, None],
                position_embeddings=rotary,
                past_key_values=_Behind(key.to(self.dtype), value.to(self.dtype)),
            )
        states: Tensor = decoder.norm(hidden)
        return states

    def begin(self) -> None:
        """Give all layers one number: a compiler takes it for a constant of the program."""
        for layer in self.decoder.layers:
            layer.self_attn.layer_idx = 0

    def end(self) -> None:
        """Give the layers their numbers back, which generation needs."""
        for layer, number in zip(self.decoder.layers, self._numbers, strict=True):
            layer.self_attn.layer_idx = number


class _Behind:
    """What a layer takes for its cache: keys and values that stand before its own."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Keys and values with the prefix before them."""
        return torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
