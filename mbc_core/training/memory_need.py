"""How much memory training an adapter takes, from a model's configuration: before anything is loaded.

The activations are those that autograd keeps for LLaMA-like layers in bfloat16 with KV-LoRA on a frozen base (counted
by a test, tensor by tensor): a frozen matrix keeps no input, so what remains are norms, attention, the gated
feed-forward's three products and the adapter's own input. Compiled layers keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbc_core.reader.language_model import HfModel

BYTES = 2  # of a bfloat16
_ADAPTER = 18  # a parameter: float32 master, two Adam moments and gradient, bfloat16 copy and gradient, less overlap
_LOGIT = 10  # an answer token and entry of the vocabulary: bfloat16, float32, and the gradient
_ANSWER_SHARE = 0.03  # answer tokens among all: logits are computed for no others
_OTHER = 1.5e9  # the accelerator's context and the allocator's slack


@dataclass(frozen=True, slots=True)
class Shape:
    """What matters of a model: layers, widths (d, d_ff, d_kv), vocabulary, and whether its head is the embedding."""

    layers: int
    width: int
    feed_forward: int
    kv_width: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: HfModel) -> Shape:
        """From a transformers configuration."""
        heads = int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            feed_forward=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
            kv_width=head * int(getattr(config, "num_key_value_heads", None) or heads),
            vocabulary=int(config.vocab_size),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def parameters(self) -> int:
        """Of the base, norms left out."""
        layer = 2 * self.width * (self.width + self.kv_width) + 3 * self.width * self.feed_forward
        return self.layers * layer + self.vocabulary * self.width * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """r · (d + d_kv) for K and for V of every layer."""
        return 2 * self.layers * rank * (self.width + self.kv_width)

    def activation_bytes(self, rank: int) -> int:
        """Kept for the backward pass, a token."""
        return self.layers * (20 * self.width + 6 * self.feed_forward + 4 * self.kv_width + 4 * rank)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one training process on one accelerator."""

    base: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> float:
        """All of it, with what the accelerator itself takes."""
        return self.base + self.adapter + self.activations + self.logits + _OTHER

    def __str__(self) -> str:
        parts = {"base": self.base, "adapter": self.adapter, "activations": self.activations, "logits": self.logits}
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        return f"about {self.total / 1e9:.1f} GB of memory to train ({told}, other {_OTHER / 1e9:.1f})"


def training_memory(shape: Shape, *, batch_tokens: int, rank: int = 32) -> MemoryNeed:
    """What ``mbc train reader`` takes in bfloat16.

    Args:
        batch_tokens: padded tokens of one forward pass (``--batch-tokens``).
        rank: of the update (``--rank``).
    """
    return MemoryNeed(
        base=BYTES * shape.parameters,
        adapter=_ADAPTER * shape.adapter_parameters(rank),
        activations=batch_tokens * shape.activation_bytes(rank),
        logits=int(_ANSWER_SHARE * batch_tokens * shape.vocabulary * _LOGIT),
    )
