"""One shared codebook E ∈ R^{K×d_c} that all T tokens are quantized with, kept alive by resetting dead codes.

c = argmin_k ‖z − E_k‖², L_vq = mse(E_c, sg z) + β·mse(sg E_c, z), and gradients pass straight through. Every training
forward then updates the usage n_k ← γ n_k + (1 − γ)·count_k and gives dead codes a new word.

Under data parallelism each rank gathers the vectors of all ranks and computes codes, counts, sums, resets and the
codebook's gradient from them, so codebook and usage are equal bit for bit on all ranks, and equal to those of one
process with the same global batch. The codebook must therefore be left out of gradient averaging
(``PaperModel`` tells DistributedDataParallel so).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from mbc_core.codebook.samples import Candidates
from mbc_core.codebook.update import reset_words
from mbc_core.errors import UsageError
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.ranks import gather_rows

POOL = 5
"""Documents whose vectors make a reset codeword under the rule "pooled"."""

WAIT = 20
"""Vectors a codeword that must gather between two resets under the rule "pooled"."""

_SMALLEST_COUNT = 1e-6
_SMALLEST_VARIANCE = 1e-6
_SCALE_DECAY = 0.9


class Quantized(NamedTuple):
    """What quantization gives.

    Attributes:
        vectors: float32 [B, T, d_c]: E_c in value, z in gradient; z itself when quantization is off.
        indices: c, int64 [B, T]; None when quantization is off.
        loss: L_vq, scalar; the mean over ranks of its gradient is that of the global batch.
        perplexity: exp of the entropy of the (global) batch's code usage, scalar.
        used: codes that the (global) batch uses, int64 scalar.
        reset_rows: int64 [resets]: codes that this forward gave a new word.
    """

    vectors: Tensor
    indices: Tensor | None
    loss: Tensor
    perplexity: Tensor
    used: Tensor
    reset_rows: Tensor


class VectorQuantizer(nn.Module):
    """The codebook, its usage and its reset.

    Attributes:
        codebook: E, float32 [K, d_c], drawn from U(−1/K, 1/K); learns by gradient or, "ema", is m / N.
        usage: n (and N of EMA), float32 [K], the decayed count a forward; starts at 0.
        sum: m of EMA, float32 [K, d_c]; stays 0 under a gradient codebook.
        forwards: training forwards so far, int64 scalar.
        vectors: vectors since the last reset, int64 scalar.
        resets: codes reset so far, int64 scalar.
        z_mean, z_square, z_weight: with ``standardize``: decayed mean and mean square of z, float32 [T, d_c], and
            the weight that both are divided by. Training uses each batch's own; these are for use.
    """

    codebook: nn.Parameter
    usage: Tensor
    sum: Tensor
    forwards: Tensor
    vectors: Tensor
    resets: Tensor
    z_mean: Tensor
    z_square: Tensor
    z_weight: Tensor

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.codewords, config.code_width
        generator = torch.Generator().manual_seed(config.seed)
        words = (torch.rand(size, width, generator=generator) * 2 - 1) / size
        self.codebook = nn.Parameter(words, requires_grad=config.codebook_by == "gradient" and config.quantize)
        self.register_buffer("usage", torch.zeros(size))
        self.register_buffer("sum", torch.zeros(size, width))
        for name in ("forwards", "vectors", "resets"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        if config.standardize:
            for name in ("z_mean", "z_square"):
                self.register_buffer(name, torch.zeros(config.tokens, width))
            self.register_buffer("z_weight", torch.zeros(()))
        self._watched: Optimizer | None = None

    def watch(self, optimizer: Optimizer) -> None:
        """Clear the moments that ``optimizer`` keeps of a codeword whenever the codeword is reset."""
        self._watched = optimizer

    def forward(self, z: Tensor) -> Quantized:
        """Quantize, and in training update the usage and reset.

        Args:
            z: pre-quantization vectors [B, T, d_c], floating point of any precision.

        Raises:
            UsageError: another shape.
        """
        if z.dim() != 3 or z.shape[2] != self.config.code_width:
            raise UsageError(
                "vectors of another shape than the codebook's",
                value=list(z.shape),
                cause=f"[B, T, {self.config.code_width}] is expected",
                fix="build amortizer and quantizer from one configuration",
            )
        z = z.float()
        with torch.autocast(z.device.type, enabled=False):
            every, start = gather_rows(z) if self.training else (z.detach(), 0)
            if self.config.standardize:
                scale = self._learn_scale(every) if self.training else self._scale()
                every = _scaled(every, scale)
                z = _scaled(_without_shared_gradient(z, scale[0]) if self.training else z, scale)
            if self.config.quantize:
                return self._quantize(z, every, start)
            zero = z.new_zeros(())
            return Quantized(z, None, zero, zero, zero.long(), z.new_zeros(0, dtype=torch.int64))

    def standardized(self, z: Tensor) -> Tensor:
        """What is quantized online: z [B, T, d_c] itself, or with ``standardize`` less its mean, by its deviation."""
        return _scaled(z, self._scale()) if self.config.standardize else z

    @torch.no_grad()
    def set_scale(self, mean: Tensor, square: Tensor) -> None:
        """Exact mean and mean square of z, each [T, d_c], in place of the decayed ones of training."""
        for own, given in ((self.z_mean, mean), (self.z_square, square), (self.z_weight, torch.ones(()))):
            own.copy_(given)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Decayed mean and variance of training, [T, d_c]."""
        weight = self.z_weight.clamp(min=_SMALLEST_COUNT)  # Adam's correction of a start at zero
        mean = self.z_mean / weight
        return mean, (self.z_square / weight - mean.square()).clamp(min=0)

    @torch.no_grad()
    def _learn_scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of this (global) batch: z moves faster than any decayed mean can follow."""
        exact = z.double()
        mean, square = exact.mean(0), exact.square().mean(0)
        self.z_mean.mul_(_SCALE_DECAY).add_(mean.float(), alpha=1 - _SCALE_DECAY)
        self.z_square.mul_(_SCALE_DECAY).add_(square.float(), alpha=1 - _SCALE_DECAY)
        self.z_weight.mul_(_SCALE_DECAY).add_(1 - _SCALE_DECAY)
        return mean.float(), (square - mean.square()).clamp(min=0).float()

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest codeword of each vector, int64 [...]; the lowest of equals.

        Products are taken in float64 of float32 values: neither autocast, TF32 nor the batch's shape changes a code.

        Args:
            vectors: [..., d_c], standardized already where that is on.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            words = self.codebook.detach().double()
            scores = vectors.detach().float().double() @ words.T - words.square().sum(1) / 2
            return scores.argmax(-1)

    def _quantize(self, z: Tensor, every: Tensor, first: int) -> Quantized:
        """Vectors of this rank [B, T, d_c], of all ranks, and the passage among those that this rank starts with."""
        batch, tokens, width = z.shape
        own, every, start = z.reshape(-1, width), every.reshape(-1, width), first * tokens
        indices = self.nearest(every)
        chosen = functional.embedding(indices, self.codebook)
        own_indices, own_words = (part[start : start + len(own)] for part in (indices, chosen.detach()))
        loss = self.config.beta * functional.mse_loss(own, own_words)
        if self.codebook.requires_grad:
            loss = loss + functional.mse_loss(chosen, every)
        counts = torch.bincount(indices, minlength=self.config.codewords)
        reset_rows = indices.new_zeros(0)
        if self.training:
            reset_rows = self._learn(every, indices, counts, tokens)
        vectors = own_words + (own - own.detach())  # E_c to the last bit; z + (E_c − z) would round
        return Quantized(
            vectors=vectors.view(batch, tokens, width),
            indices=own_indices.view(batch, tokens),
            loss=loss,
            perplexity=perplexity(counts),
            used=(counts > 0).sum(),
            reset_rows=reset_rows,
        )

    @torch.no_grad()
    def _learn(self, z: Tensor, indices: Tensor, counts: Tensor, tokens: int) -> Tensor:
        """Usage, the EMA codebook and the reset, in this order; returns the reset rows."""
        config = self.config
        decay = config.usage_decay if config.usage_tau is None else math.exp(-len(z) / config.usage_tau)
        unreset = self.codebook.detach().clone() if config.reset else self.codebook
        self.usage.mul_(decay).add_(counts.float(), alpha=1 - decay)
        self.forwards += 1
        self.vectors += len(z)
        if config.codebook_by == "ema":
            one_hot = functional.one_hot(indices, config.codewords).double()
            self.sum.mul_(decay).add_((one_hot.T @ z.double()).float(), alpha=1 - decay)
            moved = self.sum / self.usage[:, None].clamp(min=_SMALLEST_COUNT)
            self.codebook.copy_(torch.where(self.usage[:, None] > _SMALLEST_COUNT, moved, self.codebook))
        return self._reset(z, z != unreset[indices], tokens) if config.reset else indices.new_zeros(0)

    def _reset(self, z: Tensor, differs: Tensor, tokens: int) -> Tensor:
        """Write codeword, count and sum of dead codes together; returns their rows, the lowest first."""
        mean = self.usage.mean()
        pooled = self.config.reset_rule == "pooled"
        if pooled and int(self.vectors) < WAIT * self.config.codewords:
            return z.new_zeros(0, dtype=torch.int64)
        dead = self.usage < (self.config.dead_share * mean if pooled else self.config.dead_below)
        rows = dead.nonzero()[:, 0]
        if not len(rows):
            return rows
        words = self._pooled_words(z, dead, tokens) if pooled else self._batch_words(z[differs.any(1)], len(rows))
        rows = rows[: len(words)]
        self.codebook[rows] = words
        self.usage[rows] = mean
        if self.config.codebook_by == "ema":
            self.sum[rows] = words * mean
        self.resets += len(rows)
        self.vectors.zero_()
        if self._watched is not None:
            clear_moments(self._watched, self.codebook, rows)
        return rows

    def _batch_words(self, z: Tensor, wanted: int) -> Tensor:
        """Up to ``wanted`` distinct vectors of the batch in random order, none of which is a codeword already."""
        distinct = torch.unique(z, dim=0) if len(z) else z
        # A generator of its own, seeded by the step: equal on all ranks, and equal again after a resumed run.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + int(self.forwards))
        return distinct[torch.randperm(len(distinct), generator=generator)[:wanted].to(z.device)]

    def _pooled_words(self, z: Tensor, dead: Tensor, tokens: int) -> Tensor:
        """Means of five vectors of five documents each, where the living codewords serve worst."""
        vectors = z.cpu().numpy()
        rows = np.arange(len(vectors))
        candidates = Candidates(len(rows), rows.astype(np.uint64), rows // tokens, vectors)
        alive = self.codebook.detach()[~dead].cpu().numpy()
        return torch.from_numpy(reset_words(int(dead.sum()), candidates, alive, POOL)).to(z.device)


def _scaled(z: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    mean, variance = scale
    return (z - mean) / (variance + _SMALLEST_VARIANCE).sqrt()


def _without_shared_gradient(z: Tensor, mean: Tensor) -> Tensor:
    """z [B, T, d_c] in value; in gradient without what moves, or widens, all passages alike.

    Standardizing takes both away, so nothing would ever hold them. The mean drifts; and L_vq pulls every z towards its
    codeword, which narrows z, and standardized z is as wide as before, so it goes on: in 150 steps of L_vq alone the
    deviation fell from 0.26 to 0.003, and gradients, divided by it, grew as much.

    Args:
        mean: [T, d_c], constant.
    """
    shared = z.mean(0)
    apart = z - (shared - shared.detach()) - mean
    width = (apart.square().mean(0) + _SMALLEST_VARIANCE).sqrt()
    moved = apart * (width.detach() / width)
    return z.detach() + (moved - moved.detach())


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the usage ``counts`` [K]: K when all are used alike, 1 when one is; float32 scalar."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(share, share).sum()).float()


def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor) -> None:
    """Zero what ``optimizer`` (Adam's family) remembers of some rows of a parameter, and their gradient.

    A reset codeword would otherwise go on in the direction of the word it replaced.

    Args:
        parameter: [K, …].
        rows: int64 [m].
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0
    if parameter.grad is not None:
        parameter.grad[rows] = 0
