"""Amortization: one forward pass turns a text into T learned tokens z ∈ R^{T×d_c}.

Three encoders with one interface: a sentence encoder with a small decoder of T learned queries (default), the
paper's T5 encoder-decoder, and, for questions, the embedding alone. Each ends in the paper's token heads
z_i = skip(h_i) + Lin(tanh(Lin(LN(h_i)))).

Padding is masked wherever tokens are attended, so it never changes z. No text is cut here: a sentence encoder
reads up to its own limit (all-MiniLM-L6-v2: 256 word pieces of 512 positions, which is how passages are cut), the
paper's T5 1,022 tokens.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.errors import UsageError
from mbc_core.reader.language_model import HfModel

_PROMPT_SCALE = 0.02


class TokenHeads(nn.Module):
    """z_i = skip(h_i) + Lin(tanh(Lin(LN(h_i)))), one head a token (the paper's) or one for all.

    Args:
        tokens: T.
        width: of h.
        out: of z; skip is the identity when equal to ``width``, else linear.
        shared: one head for all tokens.
    """

    def __init__(self, tokens: int, width: int, out: int, *, shared: bool = False) -> None:
        super().__init__()
        heads = 1 if shared else tokens
        self.norm_weight = nn.Parameter(torch.ones(heads, width))
        self.norm_bias = nn.Parameter(torch.zeros(heads, width))
        self.inner = SlotLinear(heads, width, out)
        self.outer = SlotLinear(heads, out, out)
        self.skip: nn.Module = nn.Identity() if width == out else SlotLinear(heads, width, out)

    def forward(self, states: Tensor) -> Tensor:
        """States h [B, T, width] → z [B, T, out]."""
        normal = functional.layer_norm(states, states.shape[-1:]) * self.norm_weight + self.norm_bias
        found: Tensor = self.skip(states) + self.outer(torch.tanh(self.inner(normal)))
        return found


class SlotLinear(nn.Module):
    """A linear map for each slot, or one for all slots when ``slots`` is 1; initialised as ``nn.Linear``."""

    def __init__(self, slots: int, width: int, out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(slots, width, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(slots, out).uniform_(-bound, bound))

    def forward(self, states: Tensor) -> Tensor:
        """[B, S, width] → [B, S, out]."""
        if len(self.weight) == 1:
            return states @ self.weight[0] + self.bias
        return torch.einsum("bsi,sio->bso", states, self.weight) + self.bias


class _DecoderBlock(nn.Module):
    """Pre-norm: the T tokens attend to each other, then to the text, then pass a feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.tokens = nn.MultiheadAttention(width, heads, batch_first=True)
        self.text = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, states: Tensor, padding: Tensor) -> Tensor:
        normal = self.norms[0](queries)
        queries = queries + self.tokens(normal, normal, normal, need_weights=False)[0]
        normal = self.norms[1](queries)
        queries = queries + self.text(normal, states, states, key_padding_mask=padding, need_weights=False)[0]
        found: Tensor = queries + self.feed_forward(self.norms[2](queries))
        return found


class Amortizer(nn.Module):
    """Sentence encoder → small decoder of T learned queries → token heads.

    Args:
        encoder: a transformers encoder (``last_hidden_state``); it becomes part of this module.
        tokens: T.
        width: of z: d_c for passages, the latents' width for questions.
        blocks, heads: of the decoder.
        shared_heads: one output head for all tokens.
        train_encoder: gradients reach the encoder; otherwise it stays in evaluation mode, without gradient.

    Raises:
        UsageError: ``heads`` does not divide the encoder's width.
    """

    def __init__(
        self, encoder: HfModel, tokens: int, width: int, *, blocks: int = 2, heads: int = 8,
        shared_heads: bool = False, train_encoder: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = int(encoder.config.hidden_size)
        _require_divisor(heads, inner)
        self.encoder, self.train_encoder = encoder, train_encoder
        encoder.requires_grad_(train_encoder)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler.requires_grad_(False)  # not read, and data parallelism waits for every gradient it expects
        self.queries = nn.Parameter(torch.randn(tokens, inner) * _PROMPT_SCALE)
        self.blocks = nn.ModuleList(_DecoderBlock(inner, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(inner)
        self.heads = TokenHeads(tokens, inner, width, shared=shared_heads)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts → z.

        Args:
            ids: int64 [B, S], the encoder's tokens.
            mask: int64 [B, S], 1 where a token stands; every row has at least one.

        Returns:
            [B, T, width].
        """
        with nullcontext() if self.train_encoder else torch.no_grad():
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.to(self.queries.dtype)
        found = self.queries.expand(len(ids), -1, -1)
        for block in self.blocks:
            found = block(found, states, mask == 0)
        z: Tensor = self.heads(self.norm(found))
        return z

    def train(self, mode: bool = True) -> Amortizer:
        """Training mode; a frozen encoder stays without dropout."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self


class T5Amortizer(nn.Module):
    """The paper's: T5's decoder gets T learned input embeddings instead of tokens; no language-model head.

    The decoder's self-attention is causal, and its attention to the text is masked where the text is padded.

    Args:
        t5: a ``transformers.T5Model`` (the class without ``lm_head``).
        tokens: T.
        width: of z.
        shared_heads: one output head for all tokens.
        train_encoder: fine-tune the whole T5, as the paper does; otherwise only prompt and heads learn.

    Raises:
        UsageError: the model has a language-model head.
    """

    def __init__(
        self, t5: HfModel, tokens: int, width: int, *, shared_heads: bool = False, train_encoder: bool = True
    ) -> None:
        super().__init__()
        if hasattr(t5, "lm_head"):
            raise UsageError(
                "the T5 has a language-model head",
                value=type(t5).__name__,
                cause="amortization reads the decoder's states; the head would be trained for nothing",
                fix="load it as transformers.T5Model",
            )
        self.encoder, self.train_encoder = t5, train_encoder
        t5.requires_grad_(train_encoder)
        inner = int(t5.config.d_model)
        self.queries = nn.Parameter(torch.randn(tokens, inner) * _PROMPT_SCALE)
        self.heads = TokenHeads(tokens, inner, width, shared=shared_heads)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts → z [B, T, width]; ids and mask int64 [B, S]."""
        states = self.encoder(
            input_ids=ids,
            attention_mask=mask,  # transformers passes it on as the decoder's mask of the text
            decoder_inputs_embeds=self.queries.expand(len(ids), -1, -1),
            use_cache=False,
        ).last_hidden_state
        z: Tensor = self.heads(states.to(self.queries.dtype))
        return z

    def train(self, mode: bool = True) -> T5Amortizer:
        """Training mode; a frozen T5 stays without dropout."""
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self


class EmbeddingQueries(nn.Module):
    """T queries from a question's embedding: an own start for each token, then the shared token head.

    Args:
        embedding_width: of the embedding.
        tokens: T.
        width: of the queries.
    """

    def __init__(self, embedding_width: int, tokens: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, embedding_width))
        self.heads = TokenHeads(tokens, embedding_width, width, shared=True)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, embedding_width], unit norm → queries [B, T, width]."""
        scaled = embeddings * math.sqrt(embeddings.shape[1])  # elements about 1, as those of the tokens' own starts
        found: Tensor = self.heads(scaled[:, None] + self.queries)
        return found


def _require_divisor(heads: int, width: int) -> None:
    if width % heads:
        raise UsageError(
            "the heads do not divide the encoder's width",
            value=f"{heads} heads, width {width}",
            cause="each head reads an equal part of the states",
            fix="set amortizer_heads to a divisor",
        )
