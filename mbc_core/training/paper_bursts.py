"""Gradient clipping by parts: no part's gradient scales another's, and a sudden large one cannot throw a part back.

One norm of all gradients is a poor measure of a model that learns codes. The passages' gradients come through a
division by the codes' deviations, so their norm can be hundreds of times the others', and it changes by a factor from
one bank size to the next: a common clip then scales what aggregator, prefix and KV-LoRA learn by one over the
*amortizer's* norm, up and down. Adam turns that into steps: it divides by the root of a decayed mean square, so after
hundreds of scaled-down steps one at full size moves every weight by several times the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mbc_core.errors import UsageError

_DECAY = 0.98
_SEEN = 20
"""Steps before a part's usual norm is known."""

_LEAST = 1e-3
"""Share of the largest norm that a part may always have: one that had no gradient at all must be able to begin."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, such as ``aggregator``; ``kv_lora`` for adapters."""
    return "kv_lora" if "lora_" in name else name.split(".", 1)[0]


class BurstClip:
    """Clips the gradients of each part to a norm, and to a multiple of the part's own usual norm.

    Args:
        parameters: what learns, by name.
        most: largest norm: of each part, or without ``burst`` of all gradients together, as in the paper.
        burst: largest norm of a part in its usual norms: their mean over the last 50 steps or so, as clipped. A norm
            may still grow, by (burst − 1) · 2% a step. None: one common norm and nothing else.
        device: where the norms are kept.

    Attributes:
        parts: parameters of each part.
        usual: float32 [parts + 1], on ``device``: decayed sum of each part's norms, and of ones.

    Raises:
        UsageError: ``burst`` is not above one.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], most: float, burst: float | None, device: torch.device
    ) -> None:
        if burst is not None and burst <= 1:
            raise UsageError(
                "the largest burst is not above one",
                value=burst,
                cause="it is a multiple of a part's usual gradient norm, which half of the steps exceed",
                fix="choose about 3, or None for no limit",
            )
        self.parts: dict[str, list[nn.Parameter]] = {}
        for name, one in parameters.items():
            self.parts.setdefault(part_of(name), []).append(one)
        self.most, self.burst = most, burst
        self.usual = torch.zeros(len(self.parts) + 1, device=device)

    @torch.no_grad()
    def clip(self) -> tuple[Tensor, Tensor]:
        """Scale the gradients in place; nothing is read back from the device.

        Returns:
            each part's norm before clipping, float32 [parts], and whether each was cut as a burst, bool [parts].
        """
        held = [[one.grad for one in part if one.grad is not None] for part in self.parts.values()]
        norms = torch.stack([self._norm(part) for part in held])
        if self.burst is None:
            shares = (self.most / (norms.norm() + 1e-6)).clamp(max=1).expand_as(norms)
            cut = torch.zeros_like(norms, dtype=torch.bool)
        else:
            limits = self.burst * self.usual[:-1] / self.usual[-1].clamp(min=1e-6)
            limits = limits.clamp(min=_LEAST * self.most, max=self.most)
            limits = torch.where(self.usual[-1] > 1 - _DECAY**_SEEN, limits, self.most)
            shares = (limits / (norms + 1e-12)).clamp(max=1)
            cut = (norms > limits) & (limits < self.most)
        for part, share in zip(held, shares.unbind(), strict=True):
            if part:
                torch._foreach_mul_(part, share)
        added = torch.cat([norms * shares, norms.new_ones(1)])
        self.usual.mul_(_DECAY).add_(added, alpha=1 - _DECAY)
        return norms, cut

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.usual.device)
        norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
        return norm.float()
