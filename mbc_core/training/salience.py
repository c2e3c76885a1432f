"""Train the salience head on frozen encoder states.

Binary cross-entropy a word on two targets (in an answer; shared with a question), AdamW with a cosine schedule.
Resumable: a checkpoint holds the head, the optimizer and the step, and batches depend on (seed, epoch) alone. The
head that kept most answers whole on the held-out passages is the one that is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.encoder import PassageEncoder, SalienceHead
from mbc_core.encoder.salience_head import QUESTION_WEIGHT, SalienceShape
from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.training.data import TrainingPassage, cut_passages
from mbc_core.training.frozen_states import FrozenStates, SalienceBatch, epoch_batches, word_logits
from mbc_core.training.word_targets import share_kept_whole

BUDGETS = (12, 24, 41, 64)
HELD_OUT = "held_out"

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SalienceRecipe:
    """How to train.

    Attributes:
        steps, batch: optimizer steps, passages a step. On 27,000 passages the held-out shares peaked near step 340
            of 1,700, so the schedule is short.
        minutes: stop after this long; the schedule then runs by time where time is the tighter limit.
        evaluate_every, checkpoint_every: in steps.
    """

    steps: int = 400
    batch: int = 512
    seed: int = 0
    minutes: float | None = None
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    dropout: float = 0.1
    warm_up: int = 50
    evaluate_every: int = 80
    checkpoint_every: int = 80
    shape: SalienceShape = field(default_factory=SalienceShape)


def train_salience(
    model_dir: Path,
    passages: Sequence[TrainingPassage],
    out_dir: Path,
    *,
    lexicon: Lexicon,
    recipe: SalienceRecipe | None = None,
    dev: Sequence[TrainingPassage] = (),
    device: str = "cpu",
    resume: bool = True,
    log: Log = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a head and write ``salience.safetensors`` and its card ``salience.json`` into ``out_dir``.

    Args:
        model_dir: the encoder's folder.
        passages: both splits; "dev" ones choose the best step and are never trained on.
        lexicon: gives words their cost when the share of answers kept whole is measured.
        dev: more passages to measure on, reported by source.
        device: torch device; all states live on it (about 350 kB a passage with three layers).
        resume: continue from ``salience.checkpoint.safetensors`` if it is of the same recipe and passages.
        log: told each evaluation.
        progress: called with (step, steps).

    Returns:
        The card.

    Raises:
        UsageError: no passage to train on, or none held out.
    """
    recipe = recipe or SalienceRecipe()
    encoder = PassageEncoder.load(model_dir, None, device=device)
    cut = cut_passages(passages, encoder.count_pieces)
    train = [passage for passage in cut if passage.split == "train" and passage.questions]
    held = [passage for passage in cut if passage.split == "dev" and passage.questions]
    _require_both(train, held)
    began = time.monotonic()
    layers = recipe.shape.layers
    states = FrozenStates(encoder, train, layers, device)
    sets = {HELD_OUT: FrozenStates(encoder, held, layers, device)}
    for source, some in _by_source(cut_passages(dev, encoder.count_pieces)).items():
        sets[source] = FrozenStates(encoder, some, layers, device)
    log(f"{len(states):,} passages, {states.lengths.sum():,} tokens encoded in {time.monotonic() - began:.1f} s")
    run = _Run(recipe, encoder, states, sets, lexicon, out_dir, device, log)
    run.go(resume, progress)
    return run.finish(Counter(passage.source for passage in train))


class _Run:
    """One training run: the head, its optimizer, and where it stands."""

    def __init__(
        self, recipe: SalienceRecipe, encoder: PassageEncoder, states: FrozenStates,
        sets: Mapping[str, FrozenStates], lexicon: Lexicon, out_dir: Path, device: str, log: Log,
    ) -> None:  # fmt: skip
        torch.manual_seed(recipe.seed)
        self.recipe, self.encoder, self.states, self.sets = recipe, encoder, states, sets
        self.lexicon, self.out_dir, self.device, self.log = lexicon, out_dir, device, log
        self.head = SalienceHead(recipe.shape, recipe.dropout).to(device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay,
            fused=torch.device(device).type == "cuda",
        )  # fmt: skip
        self.step, self.spent = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        self.checkpoint = out_dir / "salience.checkpoint.safetensors"
        out_dir.mkdir(parents=True, exist_ok=True)

    def go(self, resume: bool, progress: Callable[[int, int], None] | None) -> None:
        """Train to the end of the schedule."""
        if resume and self.checkpoint.exists():
            self._load()
        recipe, began, before = self.recipe, time.monotonic(), self.spent
        losses: list[Tensor] = []
        for places in self._batches():
            self.spent = before + time.monotonic() - began
            done = self._share_done()
            if done >= 1.0 and self.step:
                break
            losses.append(self._learn(places, done))
            self.step += 1
            if self.step % recipe.evaluate_every == 0:
                self._evaluate(float(torch.stack(losses).mean()))
                losses.clear()
            if self.step % recipe.checkpoint_every == 0:
                self.spent = before + time.monotonic() - began
                self._save()
            if progress is not None:
                progress(self.step, recipe.steps)
        if losses:  # the last steps were not measured yet
            self._evaluate(float(torch.stack(losses).mean()))
        self._save()

    def finish(self, sources: Mapping[str, int]) -> dict[str, Any]:
        """Write the best head and its card."""
        path = self.out_dir / "salience.safetensors"
        self.head.load_state_dict(self.best[1])
        digest = self.head.save(path, self.encoder.digest)
        chosen = max(self.curve, key=lambda row: float(row["held_out_mean"]))
        card = {
            "what": "word salience head over a frozen sentence encoder: chooses the words that become word codes",
            "encoder": self.encoder.encoder_id,
            "file_sha256": digest,
            "bytes": path.stat().st_size,
            "parameters": sum(parameter.numel() for parameter in self.head.parameters()),
            "score": f"p(answer) + {QUESTION_WEIGHT} p(question)",
            "trained_on": dict(sources),
            "recipe": asdict(self.recipe),
            "seconds_of_steps": round(self.spent, 1),
            "chosen_step": chosen["step"],
            "share_of_answers_kept_whole_at_codes": chosen["kept"],
            "answers_measured": {name: _answers(states) for name, states in self.sets.items()},
            "lexicon": self.lexicon.digest,
            "torch": torch.__version__,
            "licence": "Apache-2.0; the data sets named above have their own licences",
        }
        (self.out_dir / "salience.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        return card

    def _batches(self) -> Iterator[npt.NDArray[np.int64]]:
        epoch, seen = 0, 0
        while True:
            for places in epoch_batches(self.states.lengths, self.recipe.batch, self.recipe.seed, epoch):
                if seen >= self.step:
                    yield places
                seen += 1
            epoch += 1

    def _share_done(self) -> float:
        by_step = self.step / self.recipe.steps
        return max(by_step, self.spent / (60 * self.recipe.minutes)) if self.recipe.minutes else by_step

    def _learn(self, places: npt.NDArray[np.int64], done: float) -> Tensor:
        recipe = self.recipe
        rate = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (self.step + 1) / recipe.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)  # dropout, too, depends on (seed, step) alone
        batch = self.states.batch(places)
        self.head.train()
        loss = _loss(self._logits(batch), batch.targets, batch.is_word)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _logits(self, batch: SalienceBatch) -> Tensor:
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            states = batch.states if kind == "cuda" else [state.float() for state in batch.states]
            pieces = self.head(states, batch.mask, batch.features)
        return word_logits(pieces, batch)

    def _evaluate(self, loss: float) -> None:
        kept = {name: self._kept(states) for name, states in self.sets.items()}
        mean = sum(kept[HELD_OUT].values()) / len(BUDGETS)
        self.curve.append({"step": self.step, "loss": loss, "held_out_mean": mean, "kept": kept})
        if mean > self.best[0]:
            self.best = (mean, {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()})
        shown = " · ".join(
            f"{name} {'/'.join(f'{share:.3f}' for share in by_budget.values())}" for name, by_budget in kept.items()
        )
        self.log(f"step {self.step} ({self.spent:.0f} s) loss {loss:.4f} kept at {BUDGETS}: {shown}")
        with (self.out_dir / "salience.curve.jsonl").open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(self.curve[-1]) + "\n")

    def _kept(self, states: FrozenStates) -> dict[int, float]:
        scores: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(states)
        self.head.eval()
        order = np.argsort(states.lengths, kind="stable")
        for start in range(0, len(order), self.recipe.batch):
            places = order[start : start + self.recipe.batch]
            with torch.inference_mode():
                chance = torch.sigmoid(self._logits(states.batch(places)))[:-1]
                score = (chance[:, 0] + QUESTION_WEIGHT * chance[:, 1]).view(len(places), -1).cpu().numpy()
            for row, place in enumerate(places):
                scores[place] = score[row, : len(states.words[place])]
        texts = [[word.text for word in words] for words in states.words]
        return share_kept_whole(texts, scores, states.answers, self.lexicon, BUDGETS)

    def _save(self) -> None:
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best[1].items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        metadata = {
            "run": self._fingerprint(),
            "step": str(self.step),
            "spent": str(self.spent),
            "best": str(self.best[0]),
            "curve": json.dumps(self.curve),
        }
        fresh = self.checkpoint.with_suffix(".new")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, fresh, metadata=metadata)
        fresh.replace(self.checkpoint)

    def _load(self) -> None:
        try:
            with safe_open(self.checkpoint, framework="pt", device=self.device) as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self.log(f"{self.checkpoint.name} cannot be read ({error}): starting anew")
            return
        if metadata.get("run") != self._fingerprint():
            self.log(f"{self.checkpoint.name} is of another recipe or other passages: starting anew")
            return
        self.step, self.spent = int(metadata["step"]), float(metadata["spent"])
        self.curve = json.loads(metadata["curve"])
        self.head.load_state_dict(_under("head.", tensors))
        self.best = (float(metadata["best"]), _under("best.", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.log(f"resuming at step {self.step} of {self.recipe.steps}")

    def _fingerprint(self) -> str:
        """Names what a checkpoint may be continued with: the recipe, the encoder and the passages."""
        parts = [json.dumps(asdict(self.recipe)), self.encoder.encoder_id, str(self.states.lengths.tolist())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _loss(logits: Tensor, targets: Tensor, is_word: Tensor) -> Tensor:
    """Mean over words of both targets' binary cross-entropy."""
    each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    return (each * is_word).sum() / is_word.sum().clamp(min=1)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _answers(states: FrozenStates) -> int:
    return sum(len(passage) for passage in states.answers)


def _by_source(passages: Sequence[TrainingPassage]) -> dict[str, list[TrainingPassage]]:
    found: dict[str, list[TrainingPassage]] = {}
    for passage in passages:
        if passage.questions:
            found.setdefault(passage.source, []).append(passage)
    return found


def _require_both(train: Sequence[TrainingPassage], held: Sequence[TrainingPassage]) -> None:
    if not train or not held:
        raise UsageError(
            "there is nothing to train on, or nothing held out",
            value=f"{len(train)} passages to train on, {len(held)} held out",
            cause="too few passages with questions (2% are held out by hash)",
            fix="give at least a few hundred passages",
        )
