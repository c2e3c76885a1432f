"""One run of the second step of adaptation: its steps, its looks at held-back questions, and its checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.reader.language_model import LanguageModel
from mbc_core.training.adapt_prompts import AdaptBatches
from mbc_core.training.early_stop import Look, Watch
from mbc_core.training.judge import judge_questions, score_examples
from mbc_core.training.loop import Clock, Schedule, Trainer, read_checkpoint, save_checkpoint, take_up
from mbc_core.training.set_file import TrainingSet

Say = Callable[[str], None]
_SAID_EVERY = 10.0  # seconds
_CPU_TOKENS, _GPU_TOKENS = 1024, 32_768


@dataclass(frozen=True, slots=True)
class AdaptRun:
    """How long and how fast.

    Attributes:
        steps, minutes: the run ends at whichever comes first; None leaves it to the other. Minutes are of training
            alone: loading, looks and judging come on top.
        batch: questions a step.
        batch_tokens: padded tokens of one forward pass; about 2 MB of memory each on a 135M model. None: 1,024 on a
            CPU, 32,768 on a GPU.
        lr: highest learning rate: a tenth of the first training's, since few questions are seen.
        evaluate_every: steps between two looks at the held-back questions; each look writes the checkpoint.
        patience: looks without a lower loss after which the run stops; None: it never stops early.
        dev_share, dev_questions: share of the training documents held back for looks, and the most questions of a
            look.
        no_memory: share of the prompts without memory lines; 1.0 trains a closed book.
    """

    steps: int | None = 60
    minutes: float | None = None
    batch: int = 16
    batch_tokens: int | None = None
    lr: float = 1e-4
    seed: int = 0
    evaluate_every: int = 10
    patience: int | None = 4
    dev_share: float = 0.1
    dev_questions: int = 48
    no_memory: float = 0.04


def batch_tokens(run: AdaptRun, language_model: LanguageModel) -> int:
    """Padded tokens of one forward pass on the model's device."""
    if run.batch_tokens is not None:
        return run.batch_tokens
    return _GPU_TOKENS if language_model.device.type == "cuda" else _CPU_TOKENS


@dataclass
class Session:
    """One run: its trainer, its looks and its checkpoint. Make one with :meth:`begin`."""

    trainer: Trainer
    batches: AdaptBatches
    run: AdaptRun
    watch: Watch
    checkpoint: Path | None
    fingerprint: str
    say: Say
    scores: dict[str, list[float]] = field(default_factory=dict)
    loss: float = math.nan

    @classmethod
    def begin(
        cls,
        found: TrainingSet,
        language_model: LanguageModel,
        batches: AdaptBatches,
        run: AdaptRun,
        checkpoint: Path | None,
        say: Say,
    ) -> Session:
        """A new run, or the one that the checkpoint holds."""
        # Judged before the trainer rounds the adapter's weights to the base's precision: as readers use them.
        state = None if checkpoint is None else read_checkpoint(checkpoint)
        if state is None:
            scores = judge_questions(found.examples, language_model, batches.form, batches.room)
        trainer = Trainer(language_model, Schedule(run.steps, run.minutes and run.minutes * 60, run.lr), seed=run.seed)
        fingerprint = _fingerprint(found, trainer, run)
        made = cls(trainer, batches, run, Watch(run.patience), checkpoint, fingerprint, say)
        if state is None or checkpoint is None:
            made.scores = {split: values.tolist() for split, values in scores.items()}
            return made
        if state.notes.get("run") != fingerprint:
            raise UsageError(
                "the checkpoint belongs to another run",
                value=str(checkpoint),
                cause="it was written for another training set, language model, adapter or other options",
                fix="name another folder, or remove this one to start again",
            )
        take_up(checkpoint, trainer, state)
        made.watch.resume(state.notes["looks"], state.groups.get("best", {}), language_model.device)
        made.scores = state.notes["before"]
        say(f"going on after step {trainer.progress.step} of {checkpoint}")
        return made

    @property
    def before(self) -> dict[str, NDArray[np.float64]]:
        """F1 of the adapter that the run started from, in points, question by question."""
        return {split: np.array(values, dtype=np.float64) for split, values in self.scores.items()}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights being trained."""
        return dict(zip(self.trainer.weights, self.trainer.masters, strict=True))

    @property
    def best_step(self) -> int:
        """Whose weights are kept: the best look's; the last step's when nothing was held back."""
        best = self.watch.best_look
        return self.trainer.progress.step if best is None else best.step

    @property
    def share(self) -> float:
        """Of the run that is done."""
        return self.trainer.schedule.progress(self.trainer.progress.step, self.trainer.progress.seconds)

    def train(self) -> None:
        """Steps until the run's end or until the looks bring nothing more; the best weights are left in the model."""
        trainer, run = self.trainer, self.run
        clock, said = Clock(trainer), time.monotonic()
        if not self.batches.dev:
            self.say("too few documents to hold some back: the run does not stop early, the last weights are kept")
        elif not self.watch.looks:
            self.look()
            clock.restart()
        while self.share < 1 and not self.watch.gives_up:
            loss = trainer.step(self.batches.step(trainer.progress.step, run.seed, run.no_memory))
            self.loss = self.loss if math.isnan(loss) else loss
            clock.tick()
            if trainer.progress.step % run.evaluate_every == 0 or self.share >= 1:
                self.look()
                self.save()
                clock.restart()
                said = time.monotonic()
            elif time.monotonic() - said > _SAID_EVERY:
                said = time.monotonic()
                self.say(f"{self._place()}, loss {self.loss:.3f}")
        if self.watch.gives_up:
            self.say(f"stopped early: {run.patience} looks without a lower loss")
        if self.watch.best:
            self.watch.restore(self.weights)
            self.say(f"keeping the weights of step {self.best_step}")
        trainer.finish()

    def look(self) -> None:
        """Read the held-back questions, if there are any."""
        if not self.batches.dev:
            self.say(self._place() if math.isnan(self.loss) else f"{self._place()}, loss {self.loss:.3f}")
            return
        shown = self.batches.shown_dev(self.run.no_memory)
        dev_loss = self.trainer.loss(self.batches.dev_batches(self.run.no_memory))
        scores = score_examples(shown, self.trainer.language_model, self.batches.form, self.batches.room)
        look = Look(
            self.trainer.progress.step,
            None if math.isnan(self.loss) else round(self.loss, 6),
            dev_loss,
            round(float(scores.mean()), 3),
        )
        better = self.watch.add(look, self.weights)
        told = "" if look.loss is None else f", loss {look.loss:.3f}"
        self.say(
            f"{self._place()}{told}; held back: loss {dev_loss:.4f}, F1 {look.dev_f1:.1f}"
            f" on {len(shown)} questions{' (best so far)' if better else ''}"
        )

    def save(self) -> None:
        """Write the checkpoint."""
        if self.checkpoint is not None:
            notes = {"run": self.fingerprint, "looks": self.watch.to_json(), "before": self.scores}
            more = {"best": self.watch.best} if self.watch.best else {}
            save_checkpoint(self.checkpoint, self.trainer, more=more, notes=notes)

    def clear(self) -> None:
        """Remove the checkpoint's files, by name; other files of the folder stay."""
        if self.checkpoint is None:
            return
        state = self.checkpoint / "state.json"
        if state.exists():
            names = json.loads(state.read_text())["files"].values()
            state.unlink()
            for name in names:
                (self.checkpoint / name).unlink(missing_ok=True)

    def _place(self) -> str:
        progress = self.trainer.progress
        bar = "█" * round(10 * self.share)
        return f"[{bar:░<10}] step {progress.step}, {progress.seconds:.0f} s, {100 * self.share:.0f}% of the run"


def _fingerprint(found: TrainingSet, trainer: Trainer, run: AdaptRun) -> str:
    """What a checkpoint must have been written for: the set, the options, the base and the weights at the start."""
    digest = hashlib.sha256(json.dumps([found.digest, asdict(run), trainer.language_model.digest]).encode())
    for name, master in zip(trainer.weights, trainer.masters, strict=True):
        digest.update(name.encode() + master.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
