"""The projector's own training: a vector must name the words of its passage and of the answer that is sought.

A step costs one product with the dictionary and no pass through the language model, so thousands of questions fit into
a step. Three projectors are trained: one that is kept, on everything; and one on each half of the passages, which names
the other half while the language model learns to read. A projector names passages that it was trained on better than
new ones, and a language model that had read those names would trust it too much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mbc_core.reader.attend import ANSWER, TOPIC, AttendProjector
from mbc_core.training.loop import Schedule

_LOOKS = 8
_HELD_OUT = 4096


@dataclass(frozen=True, slots=True)
class NamingPhase:
    """Size of the phase: optimizer steps, questions a step, highest learning rate."""

    steps: int = 1000
    batch: int = 2048
    lr: float = 1e-3
    weight_decay: float = 0.1


@dataclass(frozen=True, eq=False)
class NamingTables:
    """Vectors and what they are to name, on the device.

    Attributes:
        vectors: float16 [variants, passages, d]. questions: float16 [questions, d].
        words: int64 [passages, m], answers: int64 [questions, a]: numbers of words, -1 where there are no more.
        rows: int64 [questions], the passage that answers.
        folds: int64 [passages], 0 or 1.
    """

    vectors: Tensor
    questions: Tensor
    words: Tensor
    answers: Tensor
    rows: Tensor
    folds: Tensor


def learn_to_name(
    projector: AttendProjector,
    tables: NamingTables,
    held_out: NamingTables,
    phase: NamingPhase,
    variants: tuple[float, ...],
    *,
    fold: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, float]]:
    """Train ``projector`` in place; it ends as it was when the held-out loss was least.

    Args:
        held_out: passages and questions that are not trained on.
        variants: how often each of a passage's vectors is shown.
        fold: only questions about passages of this fold; None: all.

    Returns:
        the curve: step, loss, held-out loss of answers and words, and how often an answer's word is among the first
        16 of the answer head.
    """
    device = tables.vectors.device
    optimizer = torch.optim.AdamW(projector.parameters(), lr=phase.lr, weight_decay=phase.weight_decay)
    schedule = Schedule(phase.steps, None, phase.lr)
    draw = torch.Generator(device="cpu").manual_seed(seed)
    shares = torch.tensor(variants)
    mine = torch.arange(len(tables.rows), device=device)
    mine = mine if fold is None else mine[tables.folds[tables.rows] == fold]
    best, curve = float("inf"), []
    kept: dict[str, Tensor] | None = None
    for step in range(phase.steps if len(mine) else 0):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(schedule.progress(step, 0.0))
        projector.train()
        asked = mine[torch.randint(len(mine), (phase.batch,), generator=draw).to(device)]
        variant = torch.multinomial(shares, phase.batch, replacement=True, generator=draw).to(device)
        answers, words = _losses(projector, tables, asked, variant)
        optimizer.zero_grad()
        torch.autograd.backward(answers + words)
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, phase.steps // _LOOKS) == 0 or step + 1 == phase.steps:
            line = {"step": float(step + 1), "loss": float((answers + words).detach()), **_look(projector, held_out)}
            curve.append(line)
            say("naming  " + "  ".join(f"{name} {value:.4g}" for name, value in line.items()))
            if line["held_out_answers"] + line["held_out_words"] < best:
                best = line["held_out_answers"] + line["held_out_words"]
                kept = copy.deepcopy(projector.state_dict())
    if kept is not None:
        projector.load_state_dict(kept)
    projector.eval()
    return curve


def start_from_frequencies(projector: AttendProjector, tables: NamingTables) -> None:
    """Each head's bias becomes the logarithm of how often it has to name each word."""
    for head, targets in ((ANSWER, tables.answers), (TOPIC, tables.words)):
        there = targets[targets >= 0]
        counts = torch.full((projector.config.words,), 0.05, device=targets.device)
        counts.index_add_(0, there, torch.ones_like(there, dtype=torch.float32))
        with torch.no_grad():
            projector.bias[head] = (counts / counts.sum()).log()


def named_loss(likelihood: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's words, averaged over the rows that have any.

    Args:
        likelihood: log-softmax over words, [n, V].
        targets: int64 [n, m], -1 where there are no more.
    """
    there = (targets >= 0).float()
    each = -(likelihood.gather(1, targets.clamp(min=0)) * there).sum(1) / there.sum(1).clamp(min=1)
    having = (there.sum(1) > 0).float()
    return (each * having).sum() / having.sum().clamp(min=1)


def _losses(projector: AttendProjector, tables: NamingTables, asked: Tensor, variant: Tensor) -> tuple[Tensor, Tensor]:
    rows = tables.rows[asked]
    device = rows.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = projector.logits(tables.vectors[variant, rows].float(), tables.questions[asked].float())
    likelihood = logits.float().log_softmax(-1)
    answers = named_loss(likelihood[:, ANSWER], tables.answers[asked])
    return answers, named_loss(likelihood[:, TOPIC], tables.words[rows])


@torch.no_grad()
def _look(projector: AttendProjector, held_out: NamingTables) -> dict[str, float]:
    projector.eval()
    count = min(_HELD_OUT, len(held_out.rows))
    if not count:
        return {"held_out_answers": 0.0, "held_out_words": 0.0, "hit_16": 0.0}
    asked = torch.arange(count, device=held_out.rows.device)
    answers, words = _losses(projector, held_out, asked, torch.zeros_like(asked))
    rows = held_out.rows[asked]
    logits = projector.logits(held_out.vectors[0, rows].float(), held_out.questions[asked].float())
    best = logits[:, ANSWER].topk(min(16, projector.config.words), dim=-1).indices
    sought = held_out.answers[asked]
    having = (sought >= 0).any(1)
    hit = ((best[:, :, None] == sought[:, None, :]) & (sought[:, None, :] >= 0)).flatten(1).any(1)
    share = (hit & having).sum() / having.sum().clamp(min=1)
    return {"held_out_answers": float(answers), "held_out_words": float(words), "hit_16": float(share)}
