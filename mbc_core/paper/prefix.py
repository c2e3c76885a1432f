"""Modulation: latents become a key and value prefix of every layer (P-tuning v2), two virtual tokens by default.

The T latents are repeated to 2·L·P slots (a key and a value for each of L layers and P virtual tokens; the first
latents get one copy more where T does not divide that number), and each slot passes LN–Linear–GELU–Linear plus a
residual. The paper has one such network a slot; here one network with an embedding for each slot is the default
(0.6M parameters instead of 60M at width 384). A slot is as wide as all *key-value* heads together, so grouped-query
attention works.

A prefix stands before the first token in ``past_key_values``: it is always attended, and positions start after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.paper.amortization import SlotLinear
from mbc_core.reader.language_model import HfModel
from mbc_core.reader.prefix_cache import Pairs


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """What the language model's layers take: their number, key-value heads, and width of a head."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: HfModel) -> PrefixShape:
        """Read a transformers configuration; without grouped-query attention all heads are key-value heads."""
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(head_dim)
        )


class Prefix(nn.Module):
    """Latents → keys and values.

    Args:
        shape: of the language model's layers.
        width: of the latents.
        tokens: T.
        prefix_tokens: P, virtual tokens a layer.
        hidden: hidden width of the networks.
        shared: one network and slot embeddings, or one network a slot.
    """

    sources: Tensor

    def __init__(
        self, shape: PrefixShape, width: int, tokens: int, *, prefix_tokens: int = 2, hidden: int = 768,
        shared: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.prefix_tokens = shape, prefix_tokens
        slots, out = 2 * shape.layers * prefix_tokens, shape.kv_heads * shape.head_dim
        networks = 1 if shared else slots
        self.register_buffer("sources", slot_sources(tokens, slots), persistent=False)
        self.slots = nn.Parameter(torch.randn(slots, width) * 0.02) if shared else None
        self.norm_weight = nn.Parameter(torch.ones(networks, width))
        self.norm_bias = nn.Parameter(torch.zeros(networks, width))
        self.inner = SlotLinear(networks, width, hidden)
        self.outer = SlotLinear(networks, hidden, out)
        self.skip: nn.Module = nn.Identity() if width == out else SlotLinear(networks, width, out)

    def forward(self, latents: Tensor) -> Pairs:
        """Latents [B, T, w] → the prefix of every layer."""
        states = latents[:, self.sources]
        if self.slots is not None:
            states = states + self.slots
        normal = functional.layer_norm(states, states.shape[-1:]) * self.norm_weight + self.norm_bias
        found = self.skip(states) + self.outer(functional.gelu(self.inner(normal)))
        shape = self.shape
        split = found.view(len(latents), self.prefix_tokens, shape.layers, 2, shape.kv_heads, shape.head_dim)
        split = split.permute(2, 3, 0, 4, 1, 5)  # layers, key or value, B, heads, virtual tokens, width
        return [(layer[0], layer[1]) for layer in split]


def slot_sources(tokens: int, slots: int) -> Tensor:
    """Which latent each slot is made from, int64 [slots]: each repeated, the first ``slots mod tokens`` once more.

    Where there are more latents than slots the last ones are not read.
    """
    each, more = divmod(slots, tokens)
    copies = torch.tensor([each + (place < more) for place in range(tokens)])
    return torch.arange(tokens).repeat_interleave(copies)
