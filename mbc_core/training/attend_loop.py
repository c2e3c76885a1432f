"""Trains a KV-LoRA that reads the soft tokens of projectors that have learnt to name words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbc_core.reader.attend import AttendProjector
from mbc_core.reader.attend_prompt import put
from mbc_core.reader.language_model import LanguageModel
from mbc_core.training.attend_samples import AttendBatch
from mbc_core.training.loop import Schedule, Trainer


@dataclass(frozen=True, eq=False)
class AttendTables:
    """What batches point into, on the device.

    Attributes:
        vectors: float16 [variants, passages, d]: x̂ by each codebook, and the embedding itself.
        questions: float16 [questions, d].
        folds: int64 [passages], 0 or 1: which half a passage belongs to.
        held_out: none of these passages was trained on, so folds do not matter.
    """

    vectors: Tensor
    questions: Tensor
    folds: Tensor
    held_out: bool = False

    def shown(self, batch: AttendBatch) -> tuple[Tensor, Tensor, Tensor]:
        """x̂ and q of the batch's lines, [lines, d] each, and the folds of their passages."""
        device = self.vectors.device
        passages = batch.passages.to(device, non_blocking=True)
        variants = batch.variants.to(device, non_blocking=True)
        asked = batch.asked.to(device, non_blocking=True)
        return self.vectors[variants, passages].float(), self.questions[asked].float(), self.folds[passages]


@dataclass(frozen=True, eq=False)
class Projectors:
    """The one that is kept, and the two that were trained on one half of the passages each.

    Attributes:
        whole: names held-out passages.
        halves: number i was trained on fold i, and names the other fold.
    """

    whole: AttendProjector
    halves: tuple[AttendProjector, AttendProjector]

    @torch.no_grad()
    def chosen(self, passages: Tensor, questions: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and likelihoods of every line, by the projector that has not been trained on its passage."""
        first, second = (one.chosen(passages, questions) for one in (self.halves[1], self.halves[0]))
        here = (folds == 0)[:, None]
        return torch.where(here, first[0], second[0]), torch.where(here, first[1], second[1])


class AttendTrainer(Trainer):
    """KV-LoRA, the projector's direction of likelihood, and one optimizer; the naming weights stay as they are.

    Args:
        language_model: holds the peft model.
        projectors: on the language model's device.
        tables: what batches point into, likewise.
        direction_rate: learning rate of the direction, as a multiple of the adapter's.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        projectors: Projectors,
        tables: AttendTables,
        schedule: Schedule,
        *,
        direction_rate: float = 1.0,
        seed: int = 0,
        compile_layers: bool = False,
    ) -> None:
        super().__init__(language_model, schedule, seed=seed, compile_layers=compile_layers)
        self.projectors, self.tables = projectors, tables
        self.embedding = language_model.model.get_input_embeddings()
        self.add_weights({"projector.likely": projectors.whole.likely}, scale=direction_rate)

    @property
    def projector(self) -> AttendProjector:
        """The one that is kept."""
        return self.projectors.whole

    def _forward(self, batch: AttendBatch) -> Tensor:
        """Summed cross-entropy over the answer tokens."""
        device = self.language_model.device
        embedded = self.embedding(batch.ids.to(device, non_blocking=True))
        if len(batch.first):
            passages, questions, folds = self.tables.shown(batch)
            if self.tables.held_out:
                with torch.no_grad():
                    ids, likely = self.projector.chosen(passages, questions)
            else:
                ids, likely = self.projectors.chosen(passages, questions, folds)
            soft = self.projector.shown(ids, likely, self.embedding.weight)
            embedded = put(embedded, soft, batch.first.to(device, non_blocking=True))
        return self._answer_loss(self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state, batch)
