"""Two real processes (gloo) train the same model as one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

_ALONE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started(arguments: list[str], folder) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _ALONE} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["gradient", "ema"])
def test_two_processes_end_where_one_does(tmp_path, by):
    module = ["-m", "tests.mbc_core.paper_ranks_run", str(tmp_path), str(tmp_path), by]
    started(module, tmp_path)
    (tmp_path / "run" / "checkpoint" / "state.json").unlink()
    started(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module], tmp_path)
    alone = load_file(tmp_path / "rank-0-of-1.safetensors")
    first, second = (load_file(tmp_path / f"rank-{rank}-of-2.safetensors") for rank in (0, 1))
    before = load_file(tmp_path / "before-0.safetensors")
    moved = {name: float((one.float() - before[name].float()).abs().max()) for name, one in alone.items()}
    assert set(alone) == set(first) == set(second) and sum(far > 1e-3 for far in moved.values()) > len(moved) / 2
    for name, one in alone.items():
        assert torch.equal(first[name], second[name]), name  # ranks agree to the last bit
        assert torch.allclose(one.float(), first[name].float(), rtol=1e-3, atol=1e-5), name
    assert torch.equal(alone["quantizer.resets"], first["quantizer.resets"])
