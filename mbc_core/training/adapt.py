"""Second step of adaptation: a few steps of KV-LoRA on what the bank recalls, judged on held-out questions.

Needs torch and peft, a language model and the set of :mod:`mbc_core.training.set_file`; no bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from mbc_core.training.adapt_session import AdaptRun, Say, Session, batch_tokens
from mbc_core.training.candidate import write_candidate
from mbc_core.training.early_stop import Look, split_dev
from mbc_core.training.gate import Decision, GateRule, decide, mean_scores
from mbc_core.training.judge import documents_of, judge_questions
from mbc_core.training.set_file import Example, SetHeader, TrainingSet
from schemas.results import AdaptScores

__all__ = ["AdaptRun", "Adaptation", "Start", "adapt"]


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
    batches = AdaptBatches(
        training, dev, form, room, language_model.pad_id, run.batch, batch_tokens(run, language_model)
    )
    session = Session.begin(found, language_model, batches, run, checkpoint, say)
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


def _shown(scores: AdaptScores) -> str:
    return f"{scores['new_f1']:.1f} on new documents, {scores['old_f1']:.1f} on old ones"
