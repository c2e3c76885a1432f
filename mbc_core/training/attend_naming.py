"""The projector alone, before the language model joins in: vectors must name words and answers.

A step costs one product with the vocabulary instead of a pass through the language model, so thousands of passages fit
into a step, and the projector speaks before the adapter learns to listen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mbc_core.reader.attend import AttendProjector
from mbc_core.training.attend_data import AttendData
from mbc_core.training.attend_loop import Namer
from mbc_core.training.attend_samples import aux_targets
from mbc_core.training.loop import Schedule

_LOOKS = 8
_HELD_OUT = 2048


@dataclass(frozen=True, slots=True)
class NamingPhase:
    """Size of the phase: optimizer steps (0: none), questions a step, highest learning rate."""

    steps: int = 1000
    batch: int = 2048
    lr: float = 1.5e-3
    weight_decay: float = 0.02


def learn_to_name(
    projector: AttendProjector,
    namer: Namer,
    embeddings: Tensor,
    data: AttendData,
    held_out: AttendData,
    phase: NamingPhase,
    *,
    answer_share: float,
    variants: tuple[float, ...],
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, float]]:
    """Train ``projector`` and ``namer`` in place; they end as they were when the held-out loss was least.

    Args:
        embeddings: of the language model's vocabulary, [V, width], on the device.
        held_out: passages and questions that are not trained on.
        answer_share, variants: as in :class:`mbc_core.training.attend.AttendRun`.

    Returns:
        the curve: step, loss, held_out_loss.
    """
    weights = [*projector.parameters(), *namer.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=phase.lr, weight_decay=phase.weight_decay)
    schedule = Schedule(phase.steps, None, phase.lr)
    device = embeddings.device
    draw = torch.Generator(device="cpu").manual_seed(seed)
    shares = torch.tensor(variants)
    rows = torch.from_numpy(data.source.samples.rows).to(device)
    best, curve = float("inf"), []
    kept: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(schedule.progress(step, 0.0))
        projector.train()
        asked = torch.randint(len(rows), (phase.batch,), generator=draw).to(device)
        variant = torch.multinomial(shares, phase.batch, replacement=True, generator=draw).to(device)
        loss = _loss(projector, namer, embeddings, data, asked, rows[asked], variant, answer_share)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % max(1, phase.steps // _LOOKS) == 0 or step + 1 == phase.steps:
            now = _held_out_loss(projector, namer, embeddings, held_out, answer_share)
            curve.append({"step": float(step + 1), "loss": float(loss.detach()), "held_out_loss": now})
            say(f"naming step {step + 1}  loss {float(loss.detach()):.3f}  held out {now:.3f}")
            if now < best:
                best, kept = now, (copy.deepcopy(projector.state_dict()), copy.deepcopy(namer.state_dict()))
    if kept is not None:
        projector.load_state_dict(kept[0])
        namer.load_state_dict(kept[1])
    return curve


def word_frequencies(data: AttendData, vocabulary: int, answer_share: float) -> Tensor:
    """How often each token is to be named, float32 [vocabulary], summing to 1; none is 0."""
    counts = torch.full((vocabulary,), 1e-2)
    rows = torch.from_numpy(data.source.samples.rows)
    ids, weights = aux_targets(data.tables.words.cpu()[rows], data.tables.answers.cpu(), answer_share)
    counts.index_add_(0, ids.flatten(), weights.flatten())
    return counts / counts.sum()


def _loss(
    projector: AttendProjector,
    namer: Namer,
    embeddings: Tensor,
    data: AttendData,
    asked: Tensor,
    rows: Tensor,
    variant: Tensor,
    answer_share: float,
) -> Tensor:
    tables = data.tables
    vectors, questions = tables.vectors[variant, rows].float(), tables.questions[asked].float()
    ids, weights = aux_targets(tables.words[rows], tables.answers[asked], answer_share)
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=embeddings.device.type == "cuda"):
        soft = projector(vectors, questions)
        named: Tensor = namer(soft.to(embeddings.dtype), embeddings, ids, weights)
    return named.mean()


@torch.no_grad()
def _held_out_loss(
    projector: AttendProjector, namer: Namer, embeddings: Tensor, data: AttendData, answer_share: float
) -> float:
    projector.eval()
    rows = torch.from_numpy(data.source.samples.rows[:_HELD_OUT]).to(embeddings.device)
    asked = torch.arange(len(rows), device=embeddings.device)
    first = torch.zeros_like(rows)
    return float(_loss(projector, namer, embeddings, data, asked, rows, first, answer_share))
