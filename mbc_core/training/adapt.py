"""Second step of adaptation: a few steps of KV-LoRA on what the bank recalls, judged on held-out questions.

Needs torch and peft, a language model and the examples of :mod:`mbc_core.training.replay_set`; no bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mbc_core.errors import UsageError
from mbc_core.evaluation.metrics import f1
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.kv_lora import (
    KVLoraConfig,
    adapter_config,
    add_kv_lora,
    save_adapter,
)
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat, prompt_room
from mbc_core.training.batches import Composed, MicroBatch, Ragged, micro_batches
from mbc_core.training.loop import Clock, Schedule, Trainer
from mbc_core.training.replay_set import Example
from schemas.results import AdaptScores

EVALUATED_LINES = 5
_OLD_MAY_LOSE = 1.0  # points of F1
_MEMORY_SIZES = (1, 3, 5, 8)
_NO_MEMORY = 0.04
_ENDS_SEEN = 8
_SHUFFLED = 0.5


@dataclass(frozen=True, slots=True)
class AdaptRun:
    """How long and how fast.

    Attributes:
        steps, minutes: the run ends at whichever comes first; None leaves it to the other.
        batch: questions a step.
        batch_tokens: padded tokens of one forward pass; about 2 MB of memory each on a 135M model.
        lr: highest learning rate: a tenth of the first training's, since few questions are seen.
    """

    steps: int | None = 60
    minutes: float | None = None
    batch: int = 16
    batch_tokens: int = 1024
    lr: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What came out.

    Attributes:
        folder: the candidate's adapter files.
        steps, seconds: of training alone.
        before, after: F1 in per cent on held-out questions, with the adapter before and the candidate.
        promote, reason: what the simple rule says.
        held_out: how many new and old questions were asked.
    """

    folder: Path
    steps: int
    seconds: float
    before: AdaptScores
    after: AdaptScores
    promote: bool
    reason: str
    held_out: dict[str, int]
    run: AdaptRun

    def card(self) -> dict[str, object]:
        """JSON values for the candidate's card."""
        return {
            "what": "KV-LoRA adapted to what the bank recalls for its replay questions",
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "before": dict(self.before),
            "after": dict(self.after),
            "held_out": self.held_out,
            "decision": self.reason,
            "run": asdict(self.run),
            "torch": torch.__version__,
        }


def adapt(
    examples: Sequence[Example],
    language_model: LanguageModel,
    out_dir: Path,
    run: AdaptRun | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Adaptation:
    """Train a candidate and judge it.

    Args:
        examples: what the bank recalls, train and held out.
        language_model: the base, or the base with its live adapter, which is trained on. It carries the candidate's
            weights afterwards.
        out_dir: gets the candidate's files.

    Raises:
        UsageError: neither steps nor minutes are given, or there is nothing to train on.
    """
    run = run or AdaptRun()
    training = [one for one in examples if one.split == "train" and one.true_line]
    if run.steps is None and run.minutes is None:
        raise UsageError("the adaptation has no end", value=asdict(run), fix="give --steps or --minutes")
    if not training:
        raise UsageError(
            "there is nothing to adapt to",
            value=f"{len(examples)} examples",
            cause="no question of the training split had its document recalled",
            fix="ingest more documents",
        )
    read_before = hasattr(language_model.model, "peft_config")
    language_model, config = _trainable(language_model, run.seed)
    form, room = PromptFormat(language_model.tokenizer), prompt_room(language_model)
    if read_before:
        form.end = learned_end(language_model, form, training)
    before = judge(examples, language_model, form, room)
    say(f"before: F1 {_shown(before)}")
    trainer = Trainer(language_model, Schedule(run.steps, run.minutes and run.minutes * 60, run.lr), seed=run.seed)
    _train(trainer, training, form, room, run, say)
    trainer.finish()
    after = judge(examples, language_model, form, room)
    say(f"after: F1 {_shown(after)}")
    promote, reason = decide(before, after)
    save_adapter(
        language_model.model, out_dir, config, base_digest=language_model.digest, base_name=language_model.name
    )
    counts = {split: sum(one.split == split for one in examples) for split in ("new", "old", "train")}
    progress = trainer.progress
    return Adaptation(out_dir, progress.step, progress.seconds, before, after, promote, reason, counts, run)


def decide(before: AdaptScores, after: AdaptScores) -> tuple[bool, str]:
    """The simple rule: better on new documents, and at most a point worse on old ones.

    Returns:
        (promote, reason in a sentence).
    """
    new = after["new_f1"] - before["new_f1"]
    old = after["old_f1"] - before["old_f1"]
    told = f"F1 on new documents {new:+.1f}, on old ones {old:+.1f}"
    if old < -_OLD_MAY_LOSE:
        return False, f"{told}: old knowledge may lose at most {_OLD_MAY_LOSE:.0f} point"
    if new <= 0:
        return False, f"{told}: no better on new documents"
    return True, told


def learned_end(language_model: LanguageModel, form: PromptFormat, examples: Sequence[Example]) -> list[int]:
    """The token with which an adapted model ends its answers.

    Releases of transformers name different tokens as a GGUF's end of text. Teaching an adapter another one than it
    was first trained with would cost it many steps, and its answers.

    Args:
        examples: the first few are looked at.

    Returns:
        the one likeliest of ``form.stop_ids`` after the true answers.
    """
    total = torch.zeros(len(form.stop_ids))
    for one in examples[:_ENDS_SEEN]:
        answered = form.answer(one.answer)[: -len(form.end)]
        ids = [*form.build([one.true_line], one.question).ids, *answered]
        with torch.no_grad():
            logits = language_model.model(input_ids=torch.tensor([ids], device=language_model.device)).logits[0, -1]
        total += torch.log_softmax(logits.float(), -1)[form.stop_ids].cpu()
    return [form.stop_ids[int(total.argmax())]]


def judge(examples: Sequence[Example], language_model: LanguageModel, form: PromptFormat, room: int) -> AdaptScores:
    """F1 in per cent on the held-out questions, read from the five best lines, as answers are; 0 without questions."""
    language_model.model.eval()
    scores = {}
    for split in ("new", "old"):
        asked = [one for one in examples if one.split == split]
        prompts = [form.build(one.lines[:EVALUATED_LINES], one.question, room).ids for one in asked]
        answers = answer_prompts(language_model, form, prompts)
        found = [f1(answer, [one.answer]) for answer, one in zip(answers, asked, strict=True)]
        scores[split] = round(100 * float(np.mean(found)), 2) if found else 0.0
    return {"new_f1": scores["new"], "old_f1": scores["old"]}


def _trainable(language_model: LanguageModel, seed: int) -> tuple[LanguageModel, KVLoraConfig]:
    """The model with fresh KV-LoRA, or with the adapter it carries, ready to be trained on."""
    if not hasattr(language_model.model, "peft_config"):
        config = KVLoraConfig()
        return replace(language_model, model=add_kv_lora(language_model.model, config, seed=seed)), config
    config = adapter_config(language_model.model)
    for name, parameter in language_model.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return language_model, config


def _train(
    trainer: Trainer,
    training: Sequence[Example],
    form: PromptFormat,
    room: int,
    run: AdaptRun,
    say: Callable[[str], None],
) -> None:
    clock, said = Clock(trainer), time.monotonic()
    pad = trainer.language_model.pad_id
    for number, chosen in enumerate(_epochs(len(training), run.batch, run.seed)):
        rng = np.random.default_rng([run.seed, number])
        composed = compose([training[one] for one in chosen], form, room, rng)
        batches: list[MicroBatch] = micro_batches(composed, pad, run.batch_tokens, run.batch, (run.seed, number, 1))
        loss = trainer.step(batches)
        clock.tick()
        share = trainer.schedule.progress(trainer.progress.step, trainer.progress.seconds)
        if share >= 1 or time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"step {trainer.progress.step}, {100 * share:.0f}% of the run, loss {loss:.3f}")
        if share >= 1:
            return


def _epochs(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Batches of places without end; every question once before any comes again."""
    waiting: list[int] = []
    epoch = 0
    while True:
        while len(waiting) < batch:
            waiting += np.random.default_rng([seed, epoch, 2]).permutation(count).tolist()
            epoch += 1
        yield waiting[:batch]
        waiting = waiting[batch:]


def compose(examples: Sequence[Example], form: PromptFormat, room: int, rng: np.random.Generator) -> Composed:
    """Prompts as the bank gives them, with the true document among their lines, and a few without memory."""
    prompts, answers = [], []
    for one in examples:
        answer = form.answer(one.answer)
        prompt = form.build(_lines(one, rng), one.question, room - len(answer)).ids
        prompts.append([*prompt, *answer])
        answers.append(len(answer))
    return Composed(Ragged.of(prompts), np.array(answers, dtype=np.int64))


def _lines(one: Example, rng: np.random.Generator) -> list[str]:
    """1, 3, 5 or 8 lines in the bank's order or shuffled; the true line replaces the last when it is missing."""
    if rng.random() < _NO_MEMORY:
        return []
    count = int(rng.choice(_MEMORY_SIZES))
    lines = list(one.lines[:count])
    if one.true is None or one.true >= len(lines):
        lines[-1:] = [one.true_line]
    if rng.random() < _SHUFFLED:
        rng.shuffle(lines)
    return lines


def _shown(scores: AdaptScores) -> str:
    return f"{scores['new_f1']:.1f} on new documents, {scores['old_f1']:.1f} on old ones"
