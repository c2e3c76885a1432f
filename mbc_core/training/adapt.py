"""Second step of adaptation: a few steps of KV-LoRA on what the bank recalls, judged on held-out questions.

Needs torch and peft, a language model and the set of :mod:`mbc_core.training.set_file`; no bank.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.code_version import code_version
from mbc_core.errors import UsageError
from mbc_core.reader.kv_lora import KVLoraConfig, adapter_config, add_kv_lora, save_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat, prompt_room
from mbc_core.training.adapt_prompts import AdaptBatches, learned_end
from mbc_core.training.candidate import write_candidate
from mbc_core.training.early_stop import Look, Watch, split_dev
from mbc_core.training.gate import Decision, GateRule, decide, mean_scores
from mbc_core.training.judge import documents_of, judge_questions, score_examples
from mbc_core.training.loop import Clock, Schedule, Trainer, read_checkpoint, save_checkpoint, take_up
from mbc_core.training.set_file import Example, SetHeader, TrainingSet
from schemas.results import AdaptScores

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


@dataclass(frozen=True, slots=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
        name: the bank's version, ``shipped``, or a folder's name; None for fresh weights.
        weights_sha256: hex digest of its weights' file; None for fresh weights.
    """

    name: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Adaptation:
    """What came out.

    Attributes:
        folder: the candidate's files, as :func:`mbc_core.training.candidate.add_candidate` reads them.
        steps, seconds: of training alone. best_step: whose weights were kept.
        before, after: F1 in points on held-out questions, with the adapter before and the candidate.
        scores_before, scores_after: the same, question by question.
        decision: of the gate.
        looks: at the held-back questions, in order.
        held_out: how many questions of each split the set has.
    """

    folder: Path
    steps: int
    best_step: int
    seconds: float
    before: AdaptScores
    after: AdaptScores
    scores_before: Mapping[str, NDArray[np.float64]]
    scores_after: Mapping[str, NDArray[np.float64]]
    decision: Decision
    looks: Sequence[Look]
    held_out: dict[str, int]
    run: AdaptRun
    header: SetHeader
    set_digest: str
    start: Start
    base_name: str
    device: str

    def card(self) -> dict[str, Any]:
        """JSON values for the candidate's card: how it was made, from what, and how it did."""
        header = self.header
        return {
            "what": "KV-LoRA adapted to what the bank recalls for its replay questions",
            "started_from": self.start.name,
            "parent_sha256": self.start.weights_sha256,
            "bank": header.bank,
            "instant": header.as_of,
            "since": header.since,
            "codebook_versions": list(header.codebook_versions),
            "passages": header.passages,
            "replay": {split: dict(rows) for split, rows in header.replay.items()},
            "canary": header.canary,
            "set_digest": self.set_digest,
            "seed": self.run.seed,
            "code_version": code_version(),
            "base_model": self.base_name,
            "before": dict(self.before),
            "after": dict(self.after),
            "held_out": self.held_out,
            "decision": self.decision.to_json(),
            "steps": self.steps,
            "best_step": self.best_step,
            "seconds": round(self.seconds, 1),
            "looks": [asdict(one) for one in self.looks],
            "run": asdict(self.run),
            "device": self.device,
            "torch": torch.__version__,
        }


def adapt(
    training_set: TrainingSet | Sequence[Example],
    language_model: LanguageModel,
    out_dir: Path,
    run: AdaptRun | None = None,
    *,
    rule: GateRule | None = None,
    start: Start | None = None,
    checkpoint: Path | None = None,
    say: Say = lambda line: None,
) -> Adaptation:
    """Train a candidate and judge it.

    Args:
        training_set: what the bank recalls, to train on and held out; bare examples are a set of no bank.
        language_model: the base, or the base with its live adapter, which is trained on. It carries the candidate's
            weights afterwards.
        out_dir: gets the candidate's files.
        rule: of the gate.
        start: what ``language_model`` carries, for the card.
        checkpoint: folder to write the run's state to and to go on from; emptied of it when the run is done.

    Raises:
        UsageError: neither steps nor minutes are given, there is nothing to train on, or the checkpoint belongs to
            another run.
        DamagedFile: the checkpoint cannot be read.
    """
    run, rule, start = run or AdaptRun(), rule or GateRule(), start or Start()
    found = training_set if isinstance(training_set, TrainingSet) else TrainingSet.of(training_set)
    training, dev = _to_learn(found, run)
    has_adapter = hasattr(language_model.model, "peft_config")
    language_model, config = _trainable(language_model, run.seed)
    form, room = PromptFormat(language_model.tokenizer), prompt_room(language_model)
    if has_adapter:
        form.end = learned_end(language_model, form, training)
    batches = AdaptBatches(training, dev, form, room, language_model.pad_id, run.batch, _tokens(run, language_model))
    session = _Session.begin(found, language_model, batches, run, checkpoint, say)
    before = session.before
    say(f"before: F1 {_shown(mean_scores(before))}")
    session.train()
    after = judge_questions(found.examples, language_model, form, room)
    say(f"after: F1 {_shown(mean_scores(after))}")
    decision = decide(before, after, documents_of(found.examples), rule)
    say(decision.sentence)
    save_adapter(
        language_model.model, out_dir, config, base_digest=language_model.digest, base_name=language_model.name
    )
    made = Adaptation(
        folder=out_dir,
        steps=session.trainer.progress.step,
        best_step=session.best_step,
        seconds=session.trainer.progress.seconds,
        before=mean_scores(before),
        after=mean_scores(after),
        scores_before=before,
        scores_after=after,
        decision=decision,
        looks=tuple(session.watch.looks),
        held_out=found.counts,
        run=run,
        header=found.header,
        set_digest=found.digest,
        start=start,
        base_name=language_model.name,
        device=str(language_model.device),
    )
    write_candidate(out_dir, made.card(), language_model.digest, before, after, documents_of(found.examples))
    session.clear()
    return made


def _to_learn(found: TrainingSet, run: AdaptRun) -> tuple[list[Example], list[Example]]:
    """(questions to train on, questions held back for looks)."""
    if run.steps is None and run.minutes is None:
        raise UsageError("the adaptation has no end", value=asdict(run), fix="give --steps or --minutes")
    usable = [one for one in found.of_split("train") if one.true_line]
    if not usable:
        raise UsageError(
            "there is nothing to adapt to",
            value=f"{len(found.examples)} examples",
            cause="no question of the training split had its document recalled",
            fix="ingest more documents",
        )
    return split_dev(usable, run.dev_share, run.dev_questions, run.seed)


def _trainable(language_model: LanguageModel, seed: int) -> tuple[LanguageModel, KVLoraConfig]:
    """The model with fresh KV-LoRA, or with the adapter it carries, ready to be trained on."""
    if not hasattr(language_model.model, "peft_config"):
        config = KVLoraConfig()
        return replace(language_model, model=add_kv_lora(language_model.model, config, seed=seed)), config
    config = adapter_config(language_model.model)
    for name, parameter in language_model.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return language_model, config


def _tokens(run: AdaptRun, language_model: LanguageModel) -> int:
    if run.batch_tokens is not None:
        return run.batch_tokens
    return _GPU_TOKENS if language_model.device.type == "cuda" else _CPU_TOKENS


@dataclass
class _Session:
    """One run: its trainer, its looks and its checkpoint."""

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
    ) -> _Session:
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


def _shown(scores: AdaptScores) -> str:
    return f"{scores['new_f1']:.1f} on new documents, {scores['old_f1']:.1f} on old ones"
