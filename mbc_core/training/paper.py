"""Trains the paper's model end to end: amortization, codebook, aggregation, prefix and KV-LoRA together.

One process, or several of them (`torchrun`): each takes whole banks of the same global step, gradients are averaged,
and the codebook, which every rank computes from all ranks' vectors, stays equal by itself. A run stops when its
held-out loss is flat, and can be taken up after any call. It keeps the weights of its best look: once it has learnt
what there is, more steps are learnt by heart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.errors import UsageError
from mbc_core.paper.model import PaperModel
from mbc_core.training.paper_batches import Draw, OnDevice
from mbc_core.training.paper_bursts import BurstClip
from mbc_core.training.paper_checkpoint import PaperProgress, load_checkpoint, restore, save_checkpoint, snapshot
from mbc_core.training.paper_data import PaperData
from mbc_core.training.paper_layers import LayerLoop
from mbc_core.training.paper_ranks import Ranks
from mbc_core.training.paper_run import PaperRun, cool_when_due, pace, parameter_groups
from mbc_core.training.paper_step import Losses, Shown, step_losses

_SYNC_EVERY = 10
_CHECKPOINT_SECONDS = 180.0
_LOOK_SEED = 7_919
_CALIBRATED, _CALIBRATION_TOKENS = 512, 32_768
_CODEBOOK = "quantizer.codebook"


class PaperTrainer:
    """One model with its data, optimizer and progress.

    Args:
        model: the paper's model, on its device.
        data: tokens of passages and questions; held-out passages are looked at only.
        on_device: the same as matrices.
        run: size and speed.
        ranks: the processes that share the work.
    """

    def __init__(
        self, model: PaperModel, data: PaperData, on_device: OnDevice, run: PaperRun, ranks: Ranks | None = None
    ) -> None:
        self.model, self.on_device, self.run, self.ranks = model, on_device, run, ranks or Ranks()
        self.device = on_device.device
        keep = model.config.backprop_keep
        if run.cue_steps and not data.words.lengths.all():
            raise UsageError(
                "the data know no words to ask for",
                value=f"{int((data.words.lengths == 0).sum())} passages without",
                cause="they were made without a salience head, or from QA files",
                fix="make them from a folder of `mbc train prepare --salience`, or leave --cue-steps out",
            )
        self.draw = Draw(
            data, documents=run.documents, questions=run.questions, banks=run.banks, keep=keep,
            max_tokens=run.max_tokens, grow_every=run.grow_every, cue_steps=run.cue_steps,
        )  # fmt: skip
        self.held_out = _held_out_draw(data, run, run.held_out_bank)
        self.alone = _held_out_draw(data, run, 1)
        self.parameters = model.learned_parameters()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.parameters, run), lr=run.lr, betas=(0.9, run.beta2), fused=self.device.type == "cuda"
        )
        self.bursts = BurstClip(self.parameters, run.clip, run.burst, self.device)
        if model.quantizer is not None:
            model.quantizer.watch(self.optimizer)
        self._calibrating = _some_passages(data, run.seed)
        self.progress = PaperProgress()
        self.best: dict[str, Tensor] | None = None
        lm, wanted = model.language_model.model, run.compile_layers and self.device.type == "cuda"
        self.layers = LayerLoop(lm, compiled=True) if wanted and LayerLoop.fits(lm) else None
        self._since: dict[str, Tensor] = {}
        self._highest: Tensor | None = None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What clipping and the codebook remember, and the codewords themselves where no optimizer moves them."""
        quantizer = self.model.quantizer
        found = {"bursts.usual": self.bursts.usual}
        if quantizer is None:
            return found
        found |= {f"quantizer.{name}": one for name, one in quantizer.named_buffers()}
        if _CODEBOOK not in self.parameters:
            found[_CODEBOOK] = quantizer.codebook.data
        return found

    def step(self) -> None:
        """One step of the optimizer; nothing is read back from the device but what the codebook's reset needs."""
        progress, run = self.progress, self.run
        chosen = self.draw.step(run.seed, progress.step)
        own = chosen.part(self.ranks.rank, self.ranks.count)
        torch.manual_seed((run.seed * 1_000_003 + progress.step) * 64 + self.ranks.rank)
        self.model.train()
        with self._autocast():
            losses = step_losses(self.model, self.on_device.batch(own), "none" if run.closed else "own", self.layers)
        answer = losses.answer / self.on_device.answer_tokens(chosen)
        # Gradients are averaged over ranks: each rank's share of the sum counts once.
        total = answer * self.ranks.count + self.model.config.lambda_vq * losses.vq
        torch.autograd.backward(total)
        norms, cut = self._update()
        progress.step += 1
        self._note(answer.detach(), losses, norms, cut)

    def look(self) -> dict[str, float | int]:
        """Held-out loss a token with the right bank and with another one, codes used, their perplexity, and the
        share of passages whose row of codes differs from all others'."""
        self.calibrate()
        if self.run.closed:
            return self._look(self.held_out, ("none",)) | self._averages()
        single = {f"{name}_of_one": loss for name, loss in self._look(self.alone, ("own", "other")).items()}
        kept = {name: single[name] for name in ("held_out_loss_of_one", "held_out_shuffled_of_one")}
        return self._look(self.held_out, ("own", "other")) | kept | self._averages()

    def calibrate(self) -> None:
        """Set what standardized codes are scaled by, from the same training passages every time."""
        if self.model.amortizer is not None:
            batches = self.on_device.passage_batches(self._calibrating, _CALIBRATION_TOKENS)
            self.model.calibrate([(ids, mask) for _, ids, mask in batches])

    def _look(self, draw: Draw, shown: tuple[Shown, ...]) -> dict[str, float | int]:
        sums = {name: torch.zeros((), device=self.device) for name in shown}
        counts = torch.zeros(self.model.config.codewords, dtype=torch.int64, device=self.device)
        tokens, rows = 0, []
        self.model.eval()
        for number in range(draw.steps_per_epoch):
            chosen = draw.step(_LOOK_SEED, number)
            batch = self.on_device.batch(chosen)
            tokens += self.on_device.answer_tokens(chosen)
            for name in shown:
                with torch.no_grad(), self._autocast(), torch.compiler.set_stance("force_eager"):
                    losses = step_losses(self.model, batch, name, self.layers)
                sums[name] += losses.answer
                indices = losses.quantized.indices if losses.quantized is not None else batch.codes
                if name == "own" and indices is not None:
                    counts += torch.bincount(indices.reshape(-1), minlength=len(counts))
                    rows.append(torch.cat([torch.from_numpy(chosen.documents).to(indices)[:, None], indices], dim=1))
        found: dict[str, float | int] = {f"held_out_{_SPELT[name]}": float(one) / tokens for name, one in sums.items()}
        if rows:
            seen = torch.unique(torch.cat(rows), dim=0)
            found["held_out_different"] = len(torch.unique(seen[:, 1:], dim=0)) / len(seen)
            share = counts.double() / counts.sum()
            found["held_out_used"] = int((counts > 0).sum())
            found["held_out_perplexity"] = float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
        return found

    def save(self, folder: Path) -> None:
        """Leave a checkpoint, and the model ready for use."""
        self.calibrate()
        save_checkpoint(folder, self.parameters, self.buffers, self.optimizer, self.progress, self.best)

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint; False when there is none."""
        found = load_checkpoint(folder, self.parameters, self.buffers, self.optimizer)
        if found is not None:
            self.progress, self.best = found
        return found is not None

    def remember(self) -> None:
        """Copy the weights if the look just taken is the best one."""
        if self.run.keep_best and self.progress.best == self.progress.step:
            self.best = snapshot(self.parameters, self.buffers)

    def keep_best(self) -> None:
        """Go back to the best look's weights, if the last ones are not the best."""
        if self.best is not None and self.progress.best != self.progress.step:
            restore(self.best, self.parameters, self.buffers)
            self.progress.kept = self.progress.best
        self.best = None

    def _update(self) -> tuple[Tensor, Tensor]:
        """Norms and bursts as :meth:`BurstClip.clip` tells them."""
        share = pace(self.progress, self.run)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        moving = {name: one for name, one in self.parameters.items() if one.grad is not None}
        self.ranks.average([one.grad for name, one in moving.items() if name != _CODEBOOK])
        told = self.bursts.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return told

    def _note(self, answer: Tensor, losses: Losses, norms: Tensor, cut: Tensor) -> None:
        """Add what this step saw to the sums since the last look, on the device."""
        seen = {"loss": answer * self.ranks.count, "vq": losses.vq.detach(), "norm": norms, "bursts": cut}
        self._highest = norms if self._highest is None else torch.maximum(self._highest, norms)
        if losses.quantized is not None:
            seen |= {"perplexity": losses.quantized.perplexity, "used": losses.quantized.used}
        seen["steps"] = torch.ones((), device=self.device)
        for name, value in seen.items():
            self._since[name] = self._since.get(name, 0) + value.detach().float()

    def _averages(self) -> dict[str, float | int]:
        """Means of :meth:`_note` since the last look."""
        if not self._since:
            return {}
        sums: dict[str, Any] = {name: one.tolist() for name, one in self._since.items()}
        steps, norms, cut = sums.pop("steps"), sums.pop("norm"), sums.pop("bursts")
        highest = norms if self._highest is None else self._highest.tolist()
        self._since, self._highest = {}, None
        found: dict[str, float | int] = {name: value / steps for name, value in sums.items()}
        for part, norm, peak, bursts in zip(self.bursts.parts, norms, highest, cut, strict=True):
            found |= {f"norm_{part}": norm / steps, f"peak_{part}": peak, f"bursts_{part}": int(bursts)}
        return found if self.model.quantizer is None else found | {"resets": int(self.model.quantizer.resets)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.run.bf16)


_SPELT = {"own": "loss", "other": "shuffled", "none": "loss"}


def train_paper(
    trainer: PaperTrainer,
    out_dir: Path,
    *,
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Train until the run or this call is over, and leave a checkpoint and ``curve.jsonl`` in ``out_dir``.

    Args:
        resume: take up the checkpoint in ``out_dir`` when there is one.

    Returns:
        whether the run is finished; False when ``call_minutes`` ended this call early.

    Raises:
        DamagedFile: the checkpoint cannot be read.
    """
    run, progress, leads = trainer.run, trainer.progress, trainer.ranks.rank == 0
    folder = out_dir / "checkpoint"
    if resume and trainer.load(folder):
        progress = trainer.progress
        say(f"resumed at step {progress.step:,} after {progress.seconds:.0f} s of training")
    elif leads:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "curve.jsonl").unlink(missing_ok=True)
    if trainer.layers is not None:
        trainer.layers.begin()
    clock, began = _Clock(trainer), time.monotonic()
    saved, over = began, False
    while not progress.finished:
        if clock.first:
            _first_step(trainer, say)
            clock.restart()  # what a compiler took is no training
        else:
            trainer.step()
        if progress.step % _SYNC_EVERY == 0 or run.call_minutes == 0:
            clock.tick()
            spent = trainer.ranks.agreed(time.monotonic() - began)
            over = run.call_minutes is not None and spent >= 60 * run.call_minutes
        cool_when_due(progress, run)
        if progress.step % run.look_every == 0 or progress.finished:
            clock.tick()
            _look(trainer, out_dir, say)
            clock.restart()
        if leads and not progress.finished and time.monotonic() - saved > _CHECKPOINT_SECONDS:
            trainer.save(folder)
            saved = time.monotonic()
        if over:
            break
    clock.tick()
    if trainer.layers is not None:
        trainer.layers.end()
    if progress.finished:
        trainer.keep_best()
        if progress.kept is not None:
            say(f"kept the weights of step {progress.kept:,}, those of the best look")
    if leads:
        trainer.save(folder)
    return progress.finished


class _Clock:
    """Seconds of training, looks left out; all ranks go by the first one's."""

    def __init__(self, trainer: PaperTrainer) -> None:
        self._trainer = trainer
        self.restart()
        self.first = True

    def tick(self) -> None:
        self._trainer.progress.seconds = self._trainer.ranks.agreed(self._before + time.monotonic() - self._start)

    def restart(self) -> None:
        self._before, self._start = self._trainer.progress.seconds, time.monotonic()
        self.first = False


def _first_step(trainer: PaperTrainer, say: Callable[[str], None]) -> None:
    """One step; when the compiler fails on this machine, go on without it and say so."""
    try:
        trainer.step()
    except Exception as error:
        if trainer.layers is None or not trainer.layers.compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        say(f"compiling failed ({type(error).__name__}: {str(error)[:200]}); going on uncompiled")
        trainer.layers.end()
        trainer.layers = None
        torch.compiler.set_stance("force_eager")
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.step()


def _look(trainer: PaperTrainer, out_dir: Path, say: Callable[[str], None]) -> None:
    progress = trainer.progress
    found = trainer.look()
    progress.looks.append((progress.step, trainer.ranks.agreed(float(found["held_out_loss"]))))
    trainer.remember()
    cool_when_due(progress, trainer.run)
    line = {
        "step": progress.step,
        "seconds": round(progress.seconds, 2),
        "pace": round(pace(progress, trainer.run), 4),
        **{name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()},
    }
    if trainer.ranks.rank == 0:
        with (out_dir / "curve.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    say("  ".join(f"{name} {value:.5g}" for name, value in line.items()))


def _some_passages(data: PaperData, seed: int) -> NDArray[np.int64]:
    """Training passages that codes are calibrated on."""
    there = np.flatnonzero(~data.held_out)
    return np.sort(np.random.default_rng([seed, 2]).permutation(there)[:_CALIBRATED])


def _held_out_draw(data: PaperData, run: PaperRun, bank: int) -> Draw:
    """Every look asks the same questions, in banks of one size."""
    lengths = data.prompts.lengths + data.answers.lengths
    rows = data.rows[data.held_out[data.rows] & (lengths <= run.max_tokens)]
    there = len(set(rows.tolist()))
    documents = min(run.documents, there) // bank * bank
    if documents < 2 * bank:
        raise UsageError(
            "too few held-out passages to measure on",
            value=f"{there} passages with questions",
            cause=f"two banks of {bank} are needed: the right one and another one",
            fix="give more data, or a smaller --held-out-bank",
        )
    return Draw(
        data, held_out=True, documents=documents, questions=run.questions, banks=(bank,), max_tokens=run.max_tokens
    )
