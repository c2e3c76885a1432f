"""A training run, pool of samples by pool: steps, curve, checkpoints, looks at held-out questions.

Shared by ``mbc train reader`` and ``mbc train attend``, which differ in how a pool is made and in what a look reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from mbc_core.training.batches import prefetched
from mbc_core.training.loop import Batch, Clock, Trainer, save_checkpoint

B = TypeVar("B", bound=Batch)


class Pace(Protocol):
    """What of a run's settings matters here."""

    @property
    def call_minutes(self) -> float | None:
        """Stop after so many minutes of training in this call; None: at the schedule's end."""

    @property
    def evaluate_every(self) -> float:
        """Share of the run between two looks."""


def train_pools(
    trainer: Trainer,
    make: Callable[[int], list[list[B]]],
    pace: Pace,
    out_dir: Path,
    say: Callable[[str], None],
    look: Callable[[], dict[str, float]],
    *,
    leave_compiling_out: bool = False,
    look_last: bool = False,
) -> bool:
    """Steps until the schedule is done (True) or this call's time is up (False).

    Args:
        make: pool number → its steps; called ahead of time.
        out_dir: gets ``curve.jsonl`` and ``checkpoint/``.
        look: held-out figures, for the curve.
        leave_compiling_out: the first step of the call is no training time.
        look_last: also look when the schedule is done.
    """
    clock, call_start = Clock(trainer), trainer.progress.seconds
    clock.compiling = leave_compiling_out
    next_look, logged = pace.evaluate_every, (trainer.progress.samples, trainer.progress.seconds)
    while next_look < trainer.schedule.progress(trainer.progress.step, trainer.progress.seconds):
        next_look += pace.evaluate_every
    for number, steps in prefetched(make, trainer.progress.pool):
        losses = _train_pool(trainer, steps, clock, say)
        here = trainer.progress
        here.pool, here.loss = number + 1, float(np.mean(losses)) if losses else here.loss
        share = trainer.schedule.progress(here.step, here.seconds)
        line: dict[str, object] = {
            "step": here.step,
            "samples": here.samples,
            "seconds": round(here.seconds, 2),
            "loss": round(here.loss, 4),
            "lr": trainer.schedule.rate(share),
            "samples_per_second": round((here.samples - logged[0]) / max(1e-9, here.seconds - logged[1]), 1),
        }
        logged = (here.samples, here.seconds)
        over = pace.call_minutes is not None and here.seconds - call_start >= 60 * pace.call_minutes
        if share >= 1 or over or share >= next_look:
            save_checkpoint(out_dir / "checkpoint", trainer)
        found: dict[str, float] = {}
        if not over and (look_last if share >= 1 else share >= next_look):
            next_look += pace.evaluate_every
            found = look()
            clock.restart()
        _log(out_dir, line | found, say, quiet=number % 4 != 0 and not found and share < 1)
        if share >= 1 or over:
            return share >= 1
    return True


def _train_pool(
    trainer: Trainer, steps: Sequence[Sequence[Batch]], clock: Clock, say: Callable[[str], None]
) -> list[float]:
    """The steps of one pool, or fewer when the schedule ends within it; the losses that were read back."""
    losses = []
    for batches in steps:
        losses.append(_safe_step(trainer, batches, say))
        if clock.compiling:
            clock.restart()
            clock.compiling = False
        clock.tick()
        if trainer.schedule.progress(trainer.progress.step, trainer.progress.seconds) >= 1:
            break
    return [loss for loss in losses if loss == loss]  # nan: left on the device


def _safe_step(trainer: Trainer, batches: Sequence[Batch], say: Callable[[str], None]) -> float:
    """One step; when the compiler fails on this machine, go on without it and say so."""
    try:
        return trainer.step(batches)
    except Exception as error:
        if not trainer.compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        say(f"compiling failed ({type(error).__name__}: {str(error)[:200]}); going on uncompiled")
        trainer.compiled = False
        torch.compiler.set_stance("force_eager")
        for weight in trainer.weights.values():
            weight.grad = None
        return trainer.step(batches)


def _log(out_dir: Path, line: Mapping[str, object], say: Callable[[str], None], *, quiet: bool) -> None:
    with (out_dir / "curve.jsonl").open("a") as stream:
        stream.write(json.dumps(dict(line)) + "\n")
    if not quiet:
        told = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()
        ]
        say("  ".join(told))
