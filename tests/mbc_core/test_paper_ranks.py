"""Data parallelism in real processes: equal codebooks on all ranks, and equal to one process with the same batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing

from tests.mbc_core.paper_ranks import ROWS, SETTINGS, STEPS, TOKENS, train_model, train_quantizers


def spawn(worker, ranks: int, folder: Path, *more) -> Path:
    folder.mkdir()
    multiprocessing.spawn(worker, (ranks, str(folder), *more), nprocs=ranks)
    return folder


@pytest.mark.slow
def test_the_quantizer_is_the_same_on_1_2_and_4_ranks(tmp_path):
    dealt = {1: [[8]], 2: [[4, 4], [7, 1]], 4: [[2, 2, 2, 2], [1, 3, 1, 3]]}
    for ranks, shares in dealt.items():
        spawn(train_quantizers, ranks, tmp_path / str(ranks), shares)
    for kind in SETTINGS:
        alone = load_file(tmp_path / "1" / f"{kind}-8-rank0.safetensors")
        assert int(alone["resets"]) > 3
        assert int(alone["forwards"]) == STEPS
        for ranks, shares in dealt.items():
            for share in shares:
                names = [f"{kind}-{'-'.join(map(str, share))}-rank{rank}.safetensors" for rank in range(ranks)]
                found = [load_file(tmp_path / str(ranks) / name) for name in names]
                codes = torch.cat([one.pop("codes") for one in found], dim=1)
                assert codes.shape == (STEPS, ROWS, TOKENS)
                assert torch.equal(codes, alone["codes"])
                for one in found:
                    assert [name for name in one if not torch.equal(one[name], alone[name])] == []


@pytest.mark.slow
def test_all_ranks_of_a_model_under_ddp_hold_the_same_weights(tmp_path):
    folder = spawn(train_model, 2, tmp_path / "two", {"usage_decay": 0.5, "dead_below": 0.2})
    first, second = (load_file(folder / f"model-{rank}.safetensors") for rank in range(2))
    assert int(first["seen_resets"]) > 0
    assert {"quantizer.codebook", "quantizer.usage"} <= set(first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
