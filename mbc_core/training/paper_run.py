"""How long `mbc train paper` runs, how fast it learns, and when its held-out loss counts as flat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mbc_core.errors import UsageError
from mbc_core.training.paper_checkpoint import PaperProgress

_LEAST_LOOKS = 6
_ROUNDING = 1e-9
_FREE = ("steps", "minutes", "call_minutes", "cool_down", "flat", "closed")
"""What may differ between a run and the one it is to equal: how long it takes comes from there."""


@dataclass(frozen=True, slots=True)
class PaperRun:
    """Size and speed of a run. It ends when the held-out loss is flat, or at ``steps`` or ``minutes``.

    Attributes:
        steps, minutes: limits; minutes are of training alone, over all calls.
        call_minutes: stop this call after so many minutes and leave a checkpoint to go on from.
        documents, questions: passages a step and questions of each.
        banks: sizes of the banks that a step is cut into; every step draws one.
        grow_every: steps after which the next size of ``banks`` is drawn too: small banks first; 0: all at once.
        cue_steps: over so many first steps some ask for the words of the right passage instead of the answer, ever
            fewer: a plain signal to read codes by. Not in the paper.
        held_out_bank: size of the banks that the held-out loss is measured with; that of single passages is told too.
        max_tokens: most tokens of a question with its answer.
        lr, encoder_lr, lora_lr, codebook_lr: highest learning rates of the new parts, of a fine-tuned sentence encoder,
            of KV-LoRA and of a codebook that learns by gradient.
        clip: largest gradient norm, of each part of the model (amortizer, aggregator, prefix …).
        burst: largest gradient norm of a part in its own usual norms; None: ``clip`` is one norm for all parts, as in
            the paper. Then a long run of learned codes was thrown back (see ``paper_bursts``).
        beta2: of Adam, the decay of the mean square that gradients are measured by.
        warm_up: steps until the learning rate is at its highest; it then stays there.
        cool_down: share of the run over which it falls to zero at the end.
        look_every: steps between two looks at the held-out loss.
        flat: improvement (a share of the loss) over the last third of the looks under which it is flat; None: never.
        keep_best: end with the weights of the look with the lowest held-out loss, not with the last ones.
        closed: train the closed book instead: the same questions and parts, banks that say nothing.
        bf16: compute in bfloat16 where that is safe (codes and losses stay in float32).
        compile_layers: compile the language model's layers (on a GPU, where the model is a Llama-like one).
        chunks: pieces of like length in which passages are encoded.
    """

    steps: int | None = None
    minutes: float | None = 5.0
    call_minutes: float | None = None
    documents: int = 128
    questions: int = 2
    banks: tuple[int, ...] = (1, 4, 16, 64)
    grow_every: int = 0
    cue_steps: int = 0
    held_out_bank: int = 16
    max_tokens: int = 40
    lr: float = 5e-4
    encoder_lr: float = 5e-5
    lora_lr: float = 7e-4
    codebook_lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    burst: float | None = 3.0
    beta2: float = 0.98
    warm_up: int = 100
    cool_down: float = 0.2
    look_every: int = 200
    flat: float | None = 0.002
    keep_best: bool = True
    closed: bool = False
    bf16: bool = True
    compile_layers: bool = True
    chunks: int = 3
    seed: int = 0


def pace(progress: PaperProgress, run: PaperRun) -> float:
    """Share of the highest learning rate at the next step: warm-up, level, then a straight fall to zero."""
    share = min(1.0, (progress.step + 1) / max(1, run.warm_up))
    if progress.cool_from is None:
        return share
    return share * max(0.0, 1 - (progress.step - progress.cool_from) / max(1, progress.cool_steps))


def cool_when_due(progress: PaperProgress, run: PaperRun) -> None:
    """Begin the fall when the held-out loss is flat, or when what the limits leave is just enough for it."""
    if progress.cool_from is not None or not progress.step:
        return
    done = {
        "steps": progress.step / run.steps if run.steps else 0.0,
        "minutes": progress.seconds / (60 * run.minutes) if run.minutes else 0.0,
    }
    reason = max(done, key=lambda name: done[name])
    if done[reason] >= 1 - run.cool_down - _ROUNDING:
        left = progress.step / done[reason] - progress.step
        begin(progress, reason, round(left))
    elif run.flat is not None and is_flat(_settled(progress.looks, run), run.flat):
        begin(progress, "flat", round(progress.step * run.cool_down / (1 - run.cool_down)))


def as_long_as(run: PaperRun, card: Mapping[str, Any], folder: object) -> PaperRun:
    """``run`` with exactly the steps that a finished run took, its rates falling when those fell: an equal control.

    Args:
        card: of the finished run.
        folder: where it lies, for messages.

    Raises:
        UsageError: it is not finished, does not say when its rates fell, or differs in batches, rates or seed.
    """
    if not card.get("finished") or card.get("cool_from") is None:
        raise UsageError(
            "there is no finished run to train as long as",
            value=str(folder),
            cause="it was cut short, or there is no card"
            if not card.get("finished")
            else "its card does not say when its rates fell",
            fix="finish it first (`mbc train paper` goes on where it was), then name its folder with --like",
        )
    own, theirs = json.loads(json.dumps(asdict(run))), card["run"]
    other = [name for name, one in own.items() if name not in _FREE and theirs.get(name) != one]
    if other:
        raise UsageError(
            "the run would not equal the one it is to be like",
            value=", ".join(f"{name} {own[name]} instead of {theirs.get(name)}" for name in other),
            cause="batches, rates and seed decide what a run learns, besides its steps",
            fix=f"give the options that {folder} was trained with",
        )
    steps = int(card["steps"])
    return replace(run, steps=steps, minutes=None, flat=None, cool_down=(steps - int(card["cool_from"])) / steps)


def _settled(looks: Sequence[tuple[int, float]], run: PaperRun) -> list[tuple[int, float]]:
    """The looks since banks of every size are drawn and no step asks for words any more."""
    first = max(run.grow_every * (len(run.banks) - 1), run.cue_steps)
    return [(step, loss) for step, loss in looks if step >= first]


def begin(progress: PaperProgress, reason: str, steps: int) -> None:
    """Let the learning rate fall over the next ``steps`` steps."""
    progress.cool_from, progress.cool_steps, progress.ended_by = progress.step, max(0, steps), reason


def is_flat(looks: Sequence[tuple[int, float]], least: float) -> bool:
    """Whether the best held-out loss of the last third of the steps is no better than that before, by ``least`` of it.

    >>> is_flat([(step, 1 / step) for step in range(1, 10)], 0.002)
    False
    >>> is_flat([(step, 1.0) for step in range(1, 10)], 0.002)
    True
    """
    if len(looks) < _LEAST_LOOKS:
        return False
    border = looks[0][0] + (looks[-1][0] - looks[0][0]) * 2 / 3
    before = min(loss for step, loss in looks if step <= border)
    after = min(loss for step, loss in looks if step > border)
    return after > before * (1 - least)


def flat_from(looks: Sequence[tuple[int, float]], run: PaperRun, least: float = 0.002) -> int | None:
    """The first look at which a run's held-out loss was flat by :func:`is_flat`; None: at none.

    Args:
        looks: (step, held-out loss), in order; those before the last bank size and the last cue do not count.
    """
    settled = _settled(looks, run)
    flat = (count for count in range(_LEAST_LOOKS, len(settled) + 1) if is_flat(settled[:count], least))
    return next((settled[count - 1][0] for count in flat), None)


def parameter_groups(parameters: dict[str, torch.nn.Parameter], run: PaperRun) -> list[dict[str, object]]:
    """The optimizer's groups: each part with its own learning rate, norms, biases and codewords without decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, one in parameters.items():
        rate = run.lr
        if "lora_" in name:
            rate = run.lora_lr
        elif ".encoder." in name:
            rate = run.encoder_lr
        elif name.endswith("codebook"):
            rate = run.codebook_lr
        decay = run.weight_decay if one.dim() >= 2 and not name.endswith(("codebook", "bias", "norm_weight")) else 0.0
        groups.setdefault((rate, decay), []).append(one)
    return [
        {"params": members, "lr": rate, "highest": rate, "weight_decay": decay}
        for (rate, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]
