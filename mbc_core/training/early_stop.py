"""Early stop: a share of the training documents is held back, and the weights that read it best are kept.

The share is taken by document, never from the questions that the gate asks: what chose the weights cannot judge them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbc_core.training.set_file import Example

_FEWEST_DOCUMENTS = 10


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the held-back questions.

    Attributes:
        step: after so many steps.
        loss: of training, nats an answer token; None before the first step, or where it was not fetched.
        dev_loss, dev_f1: on the held-back questions: nats an answer token, and points.
    """

    step: int
    loss: float | None
    dev_loss: float
    dev_f1: float


@dataclass
class Watch:
    """The looks so far and the best weights.

    Attributes:
        patience: looks without a lower loss after which to stop; None: never.
        looks: in order.
        best: weights at the look of lowest loss, by name; empty before the first.
    """

    patience: int | None
    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best_look(self) -> Look | None:
        """The earliest look of the lowest loss."""
        return min(self.looks, key=_rank, default=None)

    @property
    def gives_up(self) -> bool:
        """Whether the last ``patience`` looks have brought nothing."""
        best = self.best_look
        if best is None or self.patience is None:
            return False
        return len(self.looks) - 1 - self.looks.index(best) >= self.patience

    def add(self, look: Look, weights: Mapping[str, Tensor]) -> bool:
        """Note a look; the weights are copied when it is the best so far. Returns whether it is."""
        before = self.best_look
        self.looks.append(look)
        better = before is None or _rank(look) < _rank(before)
        if better:
            self.best = {name: one.detach().clone() for name, one in weights.items()}
        return better

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the best weights into ``weights``, in place."""
        with torch.no_grad():
            for name, one in weights.items():
                one.copy_(self.best[name])

    def to_json(self) -> list[dict[str, Any]]:
        """The looks, for checkpoints and cards."""
        return [asdict(one) for one in self.looks]

    def resume(self, looks: Sequence[Mapping[str, Any]], best: Mapping[str, Tensor], device: torch.device) -> None:
        """Take up what :meth:`to_json` gave, and the best weights."""
        self.looks = [Look(**one) for one in looks]
        self.best = {name: one.to(device) for name, one in best.items()}


def split_dev(examples: Sequence[Example], share: float, most: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold back documents: (to train on, held back), both in the given order.

    Args:
        share: of the documents; the same documents whatever the order.
        most: questions held back at most; those beyond are trained on by nobody.

    Returns:
        nothing held back when there are fewer than ten documents.
    """
    documents = {_document(one) for one in examples}
    count = round(share * len(documents))
    if len(documents) < _FEWEST_DOCUMENTS or not count or not most:
        return list(examples), []
    chosen = set(sorted(documents, key=lambda name: _draw(name, seed))[:count])
    kept = [one for one in examples if _document(one) not in chosen]
    held = [one for one in examples if _document(one) in chosen]
    return kept, held[:most]


def _rank(look: Look) -> float:
    """Its loss; a loss that is no number is the worst of all."""
    return math.inf if math.isnan(look.dev_loss) else look.dev_loss


def _document(one: Example) -> str:
    return one.document or f"\x00{one.question}"


def _draw(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"dev\x00{seed}\x00{name}".encode(), digest_size=8).digest()
