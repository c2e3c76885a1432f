"""Aggregation: a question's T queries read the whole bank by cross-attention and become T latents.

Four pre-norm blocks of cross-attention and a feed-forward part; no positions, no attention among queries, no mask.
Nothing tells one entry from an equal one, so N·T code vectors are a histogram: softmax over all of them equals softmax
over the K codewords with ln(count_k) added to logit k. :func:`histogram_memory` reads a bank of any size in O(K) a
codebook version, and exactly; :func:`flat_memory` is the same read the long way. An aggregator with slot marks (not in
the paper) adds to each vector an embedding of the slot that its code stood in, so a histogram has a cell for each slot
and code, T·K of them: as exact, as independent of N, and codes of different slots are no longer confused.

MAC's hierarchical read takes groups of M documents, aggregates each to T latents, and those in groups again: O(M·T)
memory, and another function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.errors import UsageError

_MARK_SCALE = 0.5
"""Of fresh slot marks: about the deviation of what they are added to."""


class Memory(NamedTuple):
    """What is read.

    Attributes:
        vectors: code vectors [n, d_c], the same for all questions, or [B, n, d_c], its own for each.
        counts: how often each occurs, integers or float [n] or [B, n], zeros allowed; None is once each.
        slots: which of the T slots each stood in, int64 [n]; None where nobody tells. Slot marks need it.
    """

    vectors: Tensor
    counts: Tensor | None = None
    slots: Tensor | None = None


def flat_memory(codewords: Tensor, indices: Tensor) -> Memory:
    """Every code vector of the bank, one by one.

    Args:
        codewords: E, [K, d_c].
        indices: int64 [N, T].

    Returns:
        [N·T, d_c] without counts, with slots.
    """
    return Memory(functional.embedding(indices.reshape(-1), codewords), None, slots_of(indices))


def slots_of(indices: Tensor) -> Tensor:
    """Slots of codes int64 [N, T] (or of vectors [N, T, d_c]) when they stand in a row: int64 [N·T]."""
    return torch.arange(indices.shape[1], device=indices.device).repeat(len(indices))


def histogram_memory(versions: Sequence[tuple[Tensor, Tensor]]) -> Memory:
    """The same bank as the codewords and how often each occurs.

    Args:
        versions: of each codebook version that the bank refers to: codewords [K, d_c], and counts int64 [K], or of
            each slot int64 [T, K] (:func:`cell_counts`).

    Returns:
        [K·versions, d_c] with counts; of counts by slot the cells that occur, with counts and slots.

    Raises:
        UsageError: no version.
    """
    if not versions:
        raise _empty("no codebook version")
    if any(counts.dim() == 2 for _, counts in versions):
        return _cell_memory(versions)
    words, counts = zip(*versions, strict=True)
    return Memory(torch.cat(words), torch.cat(counts))


def _cell_memory(versions: Sequence[tuple[Tensor, Tensor]]) -> Memory:
    words, counts, slots = [], [], []
    for codewords, cells in versions:
        slot, code = cells.nonzero(as_tuple=True)
        words.append(codewords[code])
        counts.append(cells[slot, code])
        slots.append(slot)
    return Memory(torch.cat(words), torch.cat(counts), torch.cat(slots))


def code_counts(indices: Tensor, codewords: int) -> Tensor:
    """How often each code occurs: indices int64 [...] → int64 [K]; histograms of parts of a bank add and subtract.

    Raises:
        UsageError: a code beyond the codebook.
    """
    counts = torch.bincount(indices.reshape(-1), minlength=codewords)
    if len(counts) > codewords:
        raise UsageError(
            "a code lies beyond the codebook",
            value=len(counts) - 1,
            cause=f"the codebook has {codewords} codewords: the codes belong to another one",
            fix="count each row under the codebook version it names",
        )
    return counts


def cell_counts(indices: Tensor, codewords: int) -> Tensor:
    """How often each code occurs in each slot: indices int64 [N, T] → int64 [T, K]; summed over T: the histogram.

    Raises:
        UsageError: a code beyond the codebook.
    """
    code_counts(indices, codewords)
    slots = indices.shape[1]
    cells = indices + codewords * torch.arange(slots, device=indices.device)
    return torch.bincount(cells.reshape(-1), minlength=slots * codewords).view(slots, codewords)


class Aggregator(nn.Module):
    """The blocks, and the map from code vectors to the latents' width where the two differ.

    Args:
        context_width: d_c.
        width: of queries and latents.
        blocks, heads: 4 and 8 in the paper.
        feed_forward: hidden width is min(width, feed_forward).
        slots: T: add a learned mark of its slot to each vector; 0, the paper's: none.

    Raises:
        UsageError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self, context_width: int, width: int, *, blocks: int = 4, heads: int = 8, feed_forward: int = 768,
        slots: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise UsageError(
                "the heads do not divide the latents' width",
                value=f"{heads} heads, width {width}",
                cause="each head reads an equal part",
                fix="set heads to a divisor",
            )
        self.context: nn.Module = nn.Linear(context_width, width) if context_width != width else nn.Identity()
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, heads, min(width, feed_forward)) for _ in range(blocks))
        self.marks = nn.Parameter(torch.randn(slots, width) * _MARK_SCALE) if slots else None

    def forward(self, queries: Tensor, memory: Memory | None) -> Tensor:
        """Read all of ``memory`` at once.

        Args:
            queries: [B, T, w].
            memory: None leaves the cross-attention out and keeps the rest: an equally trained closed book.

        Returns:
            latents [B, T, w].

        Raises:
            UsageError: the memory is empty, all its counts are zero, or it has no slots and this has slot marks.
        """
        if memory is None:
            for block in self.blocks:
                queries = cast(CrossAttentionBlock, block).without_context(queries)
            return queries
        _require_entries(memory)
        return self._read(queries, self._context(memory), memory.counts)

    def hierarchical(self, queries: Tensor, codewords: Tensor, indices: Tensor, group: int) -> Tensor:
        """MAC's read in groups of M documents: latents of each group, those in groups of M again, until one is left.

        A group's T latents take the place of one document's T vectors. No more than M documents are decoded at a
        time. With M ≥ N it is the flat read; otherwise another function of the bank.

        Args:
            queries: [B, T, w].
            codewords: E, [K, d_c].
            indices: int64 [N, T].
            group: M, at least 2.

        Raises:
            UsageError: ``group`` is below 2 (the number of groups would never shrink), or the bank is empty.
        """
        if group < 2:
            raise UsageError(
                "groups of fewer than two documents never get fewer",
                value=group,
                cause="hierarchical reading merges M documents into one",
                fix="use M ≥ 2",
            )
        if not len(indices):
            raise _empty("no document")
        read = [
            self._read(queries, self._context(flat_memory(codewords, part)), None)
            for part in torch.split(indices, group)
        ]
        while len(read) > 1:
            parts = [read[start : start + group] for start in range(0, len(read), group)]
            read = [self._read(queries, torch.cat(part, dim=1), None) for part in parts]
        return read[0]

    @torch.no_grad()
    def fit_scale(self, codewords: Tensor) -> None:
        """Let a fresh map from code vectors start as if these, [K, d_c], had mean 0 and variance 1.

        Parts of unit vectors are small beside the map's bias: left alone, codes hardly differ for the attention.
        """
        if isinstance(self.context, nn.Linear):
            self.context.weight.div_(codewords.std())
            self.context.bias.sub_(self.context.weight @ codewords.mean(0))

    def _context(self, memory: Memory) -> Tensor:
        context: Tensor = self.context(memory.vectors)
        if self.marks is None:
            return context
        if memory.slots is None:
            raise UsageError(
                "the memory does not say which slot each code stood in",
                value=list(memory.vectors.shape),
                cause="these weights were trained with slot marks",
                fix="count codes by slot (cell_counts), or train with slot_marks=False",
            )
        return context + self.marks[memory.slots]

    def _read(self, queries: Tensor, context: Tensor, counts: Tensor | None) -> Tensor:
        # The logarithm is taken in float32 at least: in bfloat16 the error at a count of 10⁶ is 6%.
        log_counts = None if counts is None else counts.to(_precise(queries)).log()
        for block in self.blocks:
            queries = block(queries, context, log_counts)
        return queries


class CrossAttentionBlock(nn.Module):
    """x + Attention(LN(x), LN(context)), then x + FeedForward(LN(x)); dropout is zero."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.context_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, queries: Tensor, context: Tensor, log_counts: Tensor | None) -> Tensor:
        """Queries [B, T, w], context [n, w] or [B, n, w], ln of counts [n] or [B, n] → [B, T, w]."""
        normal = self.context_norm(context if context.dim() == 3 else context[None])
        query = self._split(self.query(self.query_norm(queries)))
        key, value = self._split(self.key(normal)), self._split(self.value(normal))
        found = _attention(query, key, value, log_counts)
        return self.without_context(queries + self.out(found.transpose(1, 2).reshape(queries.shape)))

    def without_context(self, queries: Tensor) -> Tensor:
        """The feed-forward half alone."""
        result: Tensor = queries + self.feed_forward(self.norm(queries))
        return result

    def _split(self, states: Tensor) -> Tensor:
        """[B, S, w] → [B, heads, S, w / heads]."""
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, log_counts: Tensor | None) -> Tensor:
    """[B, heads, T, d]; with counts, logits and their logarithms meet in float32 even under autocast."""
    rows = len(query)
    if log_counts is None:
        found: Tensor = functional.scaled_dot_product_attention(
            query, key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)
        )
        return found
    bias = log_counts[:, None, None, :] if log_counts.dim() == 2 else log_counts
    logits = (query @ key.transpose(-1, -2)).to(_precise(query)) * query.shape[-1] ** -0.5 + bias
    weighted: Tensor = logits.softmax(-1).to(value.dtype) @ value
    return weighted


@torch.no_grad()
def hierarchy_distance(
    aggregator: Aggregator, queries: Tensor, codewords: Tensor, indices: Tensor, group: int
) -> float:
    """How far the hierarchical read lies from the exact one: ‖hierarchical − flat‖ / ‖flat‖ over all latents.

    The exact read is taken from the histogram, so this is cheap for any bank. Arguments as for
    :meth:`Aggregator.hierarchical`.
    """
    exact = aggregator(queries, histogram_memory([(codewords, code_counts(indices, len(codewords)))]))
    grouped = aggregator.hierarchical(queries, codewords, indices, group)
    return float((grouped - exact).norm() / exact.norm())


def _precise(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _require_entries(memory: Memory) -> None:
    if not memory.vectors.shape[-2]:
        raise _empty("no vector")
    if memory.counts is not None and not bool((memory.counts.sum(-1) > 0).all()):
        raise _empty("all counts are zero")


def _empty(what: str) -> UsageError:
    return UsageError(
        "the memory is empty",
        value=what,
        cause="no document has been added",
        fix="add documents, or ask without memory (closed book)",
    )
