"""The training loop of KV-LoRA, shared by ``mbc train reader`` and ``mbc adapt``.

The base is frozen in the precision of inference; the LoRA weights are held in float32 by the optimizer and copied
into the model before each step. Batches are right-padded and sorted by length, so plain causal attention needs no
mask, and logits are computed at answer positions only: the vocabulary costs next to nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mbc_core.errors import DamagedFile
from mbc_core.reader.kv_lora import trainable
from mbc_core.reader.language_model import HfModel, LanguageModel


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: warm-up, then a cosine to ``floor`` · ``lr``.

    Attributes:
        steps: end after so many steps; None when time alone decides.
        seconds: end after so many seconds of training; None when steps alone decide.
        lr: highest learning rate.
        warm_up: share of the run.
    """

    steps: int | None
    seconds: float | None
    lr: float = 7e-4
    warm_up: float = 0.03
    floor: float = 0.02

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, 0 to 1."""
        parts = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(parts))

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress``."""
        if progress < self.warm_up:
            return self.lr * (progress + 1e-3) / (self.warm_up + 1e-3)
        turn = (progress - self.warm_up) / (1 - self.warm_up)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * turn)))


@dataclass(slots=True)
class Progress:
    """Where a run stands; kept in the checkpoint."""

    step: int = 0
    pool: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0


class Batch(Protocol):
    """What a step needs to know of a micro-batch; see :class:`~mbc_core.training.batches.MicroBatch`."""

    @property
    def ids(self) -> Tensor:
        """int64 [rows, longest]."""

    @property
    def places(self) -> Tensor:
        """int64 [answers]: positions whose next token is an answer's."""

    @property
    def targets(self) -> Tensor:
        """int64 [answers]: those tokens."""

    @property
    def samples(self) -> int:
        """Rows that are real."""


class Trainer:
    """One adapted model with its optimizer.

    Args:
        language_model: holds the peft model; its LoRA weights are cast to the base's precision.
        schedule: length and learning rate.
        compile_layers: compile each decoder layer (CUDA only pays).
    """

    def __init__(
        self,
        language_model: LanguageModel,
        schedule: Schedule,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        seed: int = 0,
        compile_layers: bool = False,
    ) -> None:
        self.language_model, self.schedule, self.clip, self.seed = language_model, schedule, clip, seed
        self.progress = Progress()
        model = language_model.model
        self.weights = trainable(model)
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in self.weights.values()]
        for weight in self.weights.values():
            weight.data = weight.data.to(_base_dtype(model))
        on_gpu = language_model.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.masters, lr=schedule.lr, weight_decay=weight_decay, fused=on_gpu)
        base = model.get_base_model()
        self.decoder, self.head = base.base_model, base.get_output_embeddings()
        self.compiled = compile_layers and _compile_layers(self.decoder)

    def add_weights(
        self, weights: Mapping[str, nn.Parameter], *, scale: float = 1.0, weight_decay: float = 0.0
    ) -> None:
        """Train further weights with the adapter's; before the first step and before a checkpoint is taken up.

        Args:
            weights: by names that no weight of the adapter has; they are cast to the base's precision.
            scale: of the learning rate.
        """
        masters = [weight.detach().float().clone().requires_grad_() for weight in weights.values()]
        for weight in weights.values():
            weight.data = weight.data.to(_base_dtype(self.language_model.model))
        self.weights = {**self.weights, **weights}
        self.masters = [*self.masters, *masters]
        self.optimizer.add_param_group({"params": masters, "scale": scale, "weight_decay": weight_decay})

    def step(self, batches: Sequence[Batch]) -> float:
        """One optimizer step over ``batches``; returns the mean loss per answer token, in nats."""
        answers = sum(len(batch.targets) for batch in batches)
        torch.manual_seed(self.seed * 1_000_003 + self.progress.step)
        total = torch.zeros((), device=self.language_model.device)
        self.language_model.model.train()
        for batch in batches:
            loss = self._forward(batch) / answers
            torch.autograd.backward(loss)
            total += loss.detach()
        self._update()
        self.progress.step += 1
        self.progress.samples += sum(batch.samples for batch in batches)
        self.progress.tokens += sum(batch.ids.numel() for batch in batches)
        return float(total) if self.progress.step % 10 == 1 or total.device.type == "cpu" else math.nan

    def loss(self, batches: Sequence[Batch]) -> float:
        """Mean loss per answer token without dropout and without learning."""
        self.language_model.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            total = sum(float(self._forward(batch)) for batch in batches)
        return total / max(1, sum(len(batch.targets) for batch in batches))

    def _forward(self, batch: Any) -> Tensor:  # noqa: ANN401 (a subclass has its own kind of batch)
        """Summed cross-entropy over the answer tokens of one micro-batch, a :class:`MicroBatch` here."""
        ids = batch.ids.to(self.language_model.device, non_blocking=True)
        return self._answer_loss(self.decoder(input_ids=ids, use_cache=False).last_hidden_state, batch)

    def _answer_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Summed cross-entropy over the answer tokens, from the decoder's last states [rows, longest, d]."""
        device = self.language_model.device
        places = batch.places.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        logits = self.head(hidden.flatten(0, 1).index_select(0, places)).float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def _update(self) -> None:
        rate = self.schedule.rate(self.schedule.progress(self.progress.step, self.progress.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        for master, weight in zip(self.masters, self.weights.values(), strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)
        self.optimizer.step()
        self.publish()

    def publish(self) -> None:
        """Copy the float32 weights into the model."""
        with torch.no_grad():
            torch._foreach_copy_([weight.data for weight in self.weights.values()], self.masters)

    def finish(self) -> None:
        """Leave the model with the weights as they are shipped: rounded to float16, held in float32."""
        for master, weight in zip(self.masters, self.weights.values(), strict=True):
            weight.data = master.detach().half().float()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that a resumed run needs, in groups small enough to travel apart."""
        names = list(self.weights)
        groups: dict[str, dict[str, Tensor]] = {"weights": dict(zip(names, self.masters, strict=True))}
        for key in ("exp_avg", "exp_avg_sq"):
            states = [self.optimizer.state[master].get(key) for master in self.masters]
            groups[key] = {name: one for name, one in zip(names, states, strict=True) if one is not None}
        return {
            group: {name: one.detach().cpu().contiguous() for name, one in held.items()}
            for group, held in groups.items()
        }

    def load_state(self, groups: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
        """Take up :meth:`state` and the progress it belongs to."""
        device = self.language_model.device
        for name, master in zip(self.weights, self.masters, strict=True):
            with torch.no_grad():
                master.copy_(groups["weights"][name].to(device))
            if name in groups["exp_avg"]:
                self.optimizer.state[master] = {
                    "step": torch.tensor(float(progress.step), device=device if device.type == "cuda" else "cpu"),
                    "exp_avg": groups["exp_avg"][name].to(device),
                    "exp_avg_sq": groups["exp_avg_sq"][name].to(device),
                }
        self.progress = progress
        self.publish()


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    *,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the trainer's state; ``state.json`` names the files and is replaced last, so a crash loses nothing.

    Args:
        more: further groups of tensors, by names that the trainer's state does not use.
        notes: JSON values, kept beside the progress.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tag = f"{trainer.progress.step:08d}"
    names = {}
    for group, tensors in {**trainer.state(), **(more or {})}.items():
        names[group] = f"{group}-{tag}.safetensors"
        staged = folder / f".{names[group]}.writing"
        save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, staged)
        staged.replace(folder / names[group])
    staging = folder / ".state.json.writing"
    told = {"files": names, "progress": asdict(trainer.progress), "notes": dict(notes or {})}
    staging.write_text(json.dumps(told, indent=2) + "\n")
    staging.replace(folder / "state.json")
    for old in folder.glob("*.safetensors"):
        if old.name not in names.values():
            old.unlink()


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`save_checkpoint` wrote: groups of tensors, the progress they belong to, and the notes."""

    groups: Mapping[str, Mapping[str, Tensor]]
    progress: Progress
    notes: Mapping[str, Any]


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of ``folder``; None when there is none.

    Raises:
        DamagedFile: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "state.json").exists():
        return None
    try:
        told = json.loads((folder / "state.json").read_text())
        groups = {group: load_file(folder / name) for group, name in told["files"].items()}
        return Checkpoint(groups, Progress(**told["progress"]), told.get("notes", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _cannot_be_taken_up(folder, error) from error


def load_checkpoint(folder: Path, trainer: Trainer) -> bool:
    """Take up the checkpoint of ``folder``; False when there is none.

    Raises:
        DamagedFile: it cannot be read or belongs to another model.
    """
    found = read_checkpoint(folder)
    if found is None:
        return False
    take_up(folder, trainer, found)
    return True


def take_up(folder: Path, trainer: Trainer, found: Checkpoint) -> None:
    """Give the trainer the state that was read from ``folder``.

    Raises:
        DamagedFile: it belongs to another model.
    """
    try:
        trainer.load_state(found.groups, found.progress)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _cannot_be_taken_up(folder, error) from error


def _cannot_be_taken_up(folder: Path, error: Exception) -> DamagedFile:
    return DamagedFile(
        "the checkpoint cannot be taken up",
        value=str(folder),
        cause=f"{type(error).__name__}: {error}",
        fix="remove the folder to start again",
    )


class Clock:
    """Seconds of training, evaluation left out.

    Attributes:
        compiling: the next step compiles, and is no training: :mod:`mbc_core.training.pools` leaves it out.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.compiling = False
        self._trainer, self._before, self._start = trainer, trainer.progress.seconds, time.monotonic()

    def tick(self) -> None:
        """Write the time so far into the trainer's progress."""
        self._trainer.progress.seconds = self._before + time.monotonic() - self._start

    def restart(self) -> None:
        """Go on after a pause."""
        self._before, self._start = self._trainer.progress.seconds, time.monotonic()


def _base_dtype(model: HfModel) -> torch.dtype:
    dtype: torch.dtype = next(one.dtype for one in model.parameters() if not one.requires_grad)
    return dtype


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _compile_layers(decoder: HfModel) -> bool:
    """Compile every decoder layer by itself: one compilation serves them all, whatever the batch's shape."""
    layers = getattr(decoder, "layers", None)
    if layers is None:
        return False
    # Layers whose input needs no gradient would be a second graph, with a minute of compiling of its own.
    decoder.get_input_embeddings().register_forward_hook(_require_gradient)
    for layer in layers:
        layer.compile(dynamic=True)
    return True
