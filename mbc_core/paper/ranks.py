"""The rows of all data-parallel ranks in rank order, so that every rank computes what one process would."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of every rank, concatenated by rank; ranks may hold different numbers of rows.

    Gathering moves bits and adds nothing up, so all ranks get equal bytes, whatever the reduction order of the backend.

    Args:
        rows: [n, …]; the result has no gradient.

    Returns:
        [Σ n, …] and where this rank's own rows start. Without an initialised process group: the rows, and 0.
    """
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    ranks = dist.get_world_size()
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(own) for _ in range(ranks)]
    dist.all_gather(counts, own)
    sizes = [int(one) for one in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[: dist.get_rank()])
