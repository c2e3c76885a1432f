"""One step of the paper's training: passages → code vectors → banks → latents → prefix → the answers' cross-entropy.

L = L_QA + λ·L_vq, end to end through the straight-through codes. The bank that a question reads is made of the passages
of its own step, cut into banks; the controls swap whole banks (``other``) or show none (``none``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mbc_core.errors import UsageError
from mbc_core.paper.aggregation import Memory, slots_of
from mbc_core.paper.model import PaperModel
from mbc_core.paper.vector_quantizer import Quantized
from mbc_core.reader.prefix_cache import Pairs
from mbc_core.training.paper_batches import Batch

Shown = Literal["own", "other", "none"]
"""Whose bank a question reads: the one that holds its passage, another one of the same size, or none."""


class Losses(NamedTuple):
    """Of one batch.

    Attributes:
        answer: summed cross-entropy over the answers' tokens, in nats.
        vq: L_vq, the batch's mean; zero where nothing is quantized.
        quantized: codes and their statistics; None for address codes and without a bank.
    """

    answer: Tensor
    vq: Tensor
    quantized: Quantized | None


def step_losses(
    model: PaperModel, batch: Batch, shown: Shown = "own", layers: Callable[[Tensor, Pairs], Tensor] | None = None
) -> Losses:
    """Forward pass of one batch, on the device it is on.

    Args:
        layers: runs the language model (:class:`mbc_core.training.paper_layers.LayerLoop`); None: its own forward pass.
    """
    vectors, quantized = (None, None) if shown == "none" else _code_vectors(model, batch)
    pairs = _prefix(model, batch, vectors, shown)
    if layers is None:
        answer = model.answer_loss(batch.ids, batch.places, batch.targets, pairs) * len(batch.targets)
    else:
        states = layers(batch.ids, pairs).flatten(0, 1)[batch.places]
        logits = model.language_model.model.get_output_embeddings()(states)
        answer = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return Losses(answer, answer.new_zeros(()) if quantized is None else quantized.loss, quantized)


def _code_vectors(model: PaperModel, batch: Batch) -> tuple[Tensor, Quantized | None]:
    """Code vectors of the batch's passages, [D, T, d_c]."""
    if batch.codes is not None:
        return functional.embedding(batch.codes, model.code_vectors()), None
    if model.amortizer is None or model.quantizer is None or batch.order is None:
        raise UsageError(
            "the batch lacks what learned codes are made from",
            value="no passages' tokens",
            cause="it was made for address codes",
            fix="make it without `slots`",
        )
    parts = []
    with torch.autocast(batch.ids.device.type, enabled=False):  # the same codes in training and online
        for number, (ids, mask) in enumerate(batch.chunks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number < batch.with_gradient):
                parts.append(model.amortizer(ids, mask))
        quantized = model.quantizer(torch.cat(parts).index_select(0, batch.order))
    return quantized.vectors, quantized


def _prefix(model: PaperModel, batch: Batch, vectors: Tensor | None, shown: Shown) -> Pairs:
    """Questions read their banks: the queries of a bank's questions are stacked, since none attends to another."""
    queries = model.queries(batch.asked, batch.asked_mask, batch.embeddings)
    if vectors is None:
        return model.read(queries, None)
    banks = len(vectors) // batch.bank
    memory = vectors.reshape(banks, -1, vectors.shape[-1])
    if shown == "other":
        memory = memory.roll(1, 0)
    slots = slots_of(vectors)[: memory.shape[1]]
    latents = model.aggregator(queries.reshape(banks, -1, queries.shape[-1]), Memory(memory, None, slots))
    pairs: Pairs = model.prefix(latents.reshape(queries.shape))
    return pairs
