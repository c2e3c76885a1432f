"""The processes that train one model together (`torchrun`), or the one that does it alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among ``count`` of them; gradients are exchanged when there is more than one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join the group that `torchrun` started; alone without it. NCCL on GPUs, gloo elsewhere."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count < 2:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(distributed.get_rank(), count)

    def average(self, gradients: Sequence[Tensor | None]) -> None:
        """Replace the gradients by their mean over all processes, in one exchange."""
        held = [one for one in gradients if one is not None]
        if self.count < 2 or not held:
            return
        flat = torch.cat([one.reshape(-1).float() for one in held])
        distributed.all_reduce(flat)
        flat /= self.count
        for one, part in zip(held, torch.split(flat, [one.numel() for one in held]), strict=True):
            one.copy_(part.view_as(one))

    def agreed(self, value: float) -> float:
        """The first process's value, for decisions that all must take alike."""
        if self.count < 2:
            return value
        cuda = distributed.get_backend() == "nccl"
        told = torch.tensor([value], dtype=torch.float64, device="cuda" if cuda else "cpu")
        distributed.broadcast(told, 0)
        return float(told)
