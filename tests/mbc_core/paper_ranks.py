"""What one data-parallel rank of the paper's tests runs: a process of its own, gloo over a file."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mbc_core.paper.config import PaperConfig
from mbc_core.paper.vector_quantizer import VectorQuantizer

STEPS, ROWS, TOKENS, WIDTH = 36, 8, 3, 8
_PATIENCE = timedelta(minutes=15)
"""How long a rank waits for the others: on a busy machine they may start minutes apart."""


def global_batches() -> list[torch.Tensor]:
    """Pre-quantization vectors that drift, so that codes die and are reset again and again."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, TOKENS, WIDTH, generator=generator) + step // 8 for step in range(STEPS)]


SETTINGS: dict[str, dict] = {
    "paper": {},
    "ema": {"codebook_by": "ema"},
    "pooled": {"reset_rule": "pooled", "dead_share": 0.5},
    "standardized": {"standardize": True, "tokens": 3},
}


def train_quantizers(rank: int, ranks: int, folder: str, shares: list[list[int]]) -> None:
    """Train a quantizer of each kind, for each way to deal the rows out, on this rank's rows of every global batch."""
    _join(rank, ranks, folder)
    for name, settings in SETTINGS.items():
        for share in shares:
            place = Path(folder) / f"{name}-{'-'.join(map(str, share))}-rank{rank}.safetensors"
            save_file(_train_quantizer(rank, settings, share), place)
    _leave()


def _train_quantizer(rank: int, settings: dict, share: list[int]) -> dict[str, torch.Tensor]:
    config = PaperConfig(codewords=24, code_width=WIDTH, usage_decay=0.5, dead_below=1e-2, **settings)
    made = VectorQuantizer(config).train()
    optimizer = torch.optim.Adam([made.codebook], lr=0.05) if made.codebook.requires_grad else None
    if optimizer is not None:
        made.watch(optimizer)
    codes, start = [], sum(share[:rank])
    for whole in global_batches():
        z = whole[start : start + share[rank]].clone().requires_grad_()
        found = made(z)
        codes.append(found.indices)
        if optimizer is not None:
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
    return made.state_dict() | {"codes": torch.stack(codes)}


def train_model(rank: int, ranks: int, folder: str, settings: dict) -> None:
    """Train the whole tiny model under DistributedDataParallel; each rank has its own share of the passages."""
    from mbc_core.paper.files import paper_state
    from tests.mbc_core.paper_parts import ANSWERS, PASSAGES, QUESTIONS, batch, paper_model

    _join(rank, ranks, folder)
    model = paper_model(lora_dropout=0.0, **settings).train()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.learned_parameters().values(), lr=1e-2)
    model.quantizer.watch(optimizer)
    mine = slice(rank * len(PASSAGES) // ranks, (rank + 1) * len(PASSAGES) // ranks)
    own = batch(model, PASSAGES[mine], QUESTIONS[mine], ANSWERS[mine])
    resets = 0
    for _ in range(4):
        optimizer.zero_grad()
        found = wrapped(own)
        found.total.backward()
        optimizer.step()
        resets += len(found.quantized.reset_rows)
    state = paper_state(model) | {"seen_resets": torch.tensor(resets)}
    save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / f"model-{rank}.safetensors")
    _leave()


def _join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks the host's name up, which may fail
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=_PATIENCE)


def _leave() -> None:
    dist.barrier()
    dist.destroy_process_group()
