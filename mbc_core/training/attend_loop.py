"""Trains the projector of the attend read together with a KV-LoRA of its own.

The loss is the answer's; for the run's first part chiefly, soft tokens must also name the passage's salient words and
the answer, through the language model's own vocabulary: without that a projector takes long to say anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbc_core.reader.attend import AttendProjector
from mbc_core.reader.attend_prompt import put
from mbc_core.reader.language_model import LanguageModel
from mbc_core.training.attend_samples import AttendBatch, aux_targets
from mbc_core.training.loop import Schedule, Trainer


@dataclass(frozen=True, eq=False)
class AttendTables:
    """What batches point into, on the device.

    Attributes:
        vectors: float16 [variants, passages, d]: x̂ by each codebook, and perhaps the embedding itself.
        questions: float16 [questions, d]; one row of zeros when the projector looks at no question.
        words: int64 [passages, m], tokens of the passage's salient words, -1 where there are no more.
        answers: int64 [questions, a], tokens of the answer, likewise.
    """

    vectors: Tensor
    questions: Tensor
    words: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> AttendTables:
        """The same tables on ``device``."""
        return AttendTables(*(one.to(device) for one in (self.vectors, self.questions, self.words, self.answers)))

    def shown(self, batch: AttendBatch) -> tuple[Tensor, Tensor]:
        """x̂ and q of the batch's lines, [lines, d] each."""
        device = self.vectors.device
        passages = batch.passages.to(device, non_blocking=True)
        variants = batch.variants.to(device, non_blocking=True)
        asked = batch.asked.to(device, non_blocking=True).clamp(max=len(self.questions) - 1)
        return self.vectors[variants, passages].float(), self.questions[asked].float()


@dataclass(frozen=True, slots=True)
class AuxLoss:
    """How much naming words and answers counts.

    Attributes:
        start, end: weight at the run's start and from ``until`` on; linear between.
        until: share of the run.
        answer_share: of the weight that is the answer's; the rest is the words'.
    """

    start: float = 0.5
    end: float = 0.1
    until: float = 0.7
    answer_share: float = 0.5

    def weight(self, progress: float) -> float:
        """At this share of the run."""
        return self.end + (self.start - self.end) * max(0.0, 1 - progress / self.until)


class Namer(nn.Module):
    """Reads words off soft tokens with the language model's own embeddings; kept for training only.

    Each soft token is a distribution over the vocabulary, and a passage's is the mean of its soft tokens': so they
    may share the words out among themselves.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(vocabulary))  # how frequent a word is, so that soft tokens need not say it

    def forward(self, soft: Tensor, embeddings: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted negative log-likelihood of each row's words, [n].

        Args:
            soft: [n, S, width].
            embeddings: the vocabulary's, [V, width].
            ids, weights: [n, m], as :func:`mbc_core.training.attend_samples.aux_targets` gives them.
        """
        unit = soft * torch.rsqrt(soft.float().square().mean(-1, keepdim=True) + 1e-6).to(soft.dtype)
        logits = (self.scale.to(unit.dtype) * unit) @ embeddings.T + self.bias.to(unit.dtype)
        found = logits.gather(2, ids[:, None, :].expand(-1, soft.shape[1], -1)).float()
        likelihood = torch.logsumexp(found - torch.logsumexp(logits.float(), dim=2, keepdim=True), dim=1)
        return -(weights * (likelihood - math.log(soft.shape[1]))).sum(1)


class AttendTrainer(Trainer):
    """Projector, KV-LoRA and one optimizer.

    Args:
        language_model: holds the peft model.
        projector: is cast to the base's precision; its float32 masters are the optimizer's.
        tables: what batches point into, on the language model's device.
        namer: one that has learnt already; a fresh one when None.
        projector_rate: learning rate of the projector, as a multiple of the adapter's.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        projector: AttendProjector,
        tables: AttendTables,
        schedule: Schedule,
        *,
        aux: AuxLoss,
        namer: Namer | None = None,
        projector_rate: float = 1.5,
        weight_decay: float = 0.01,
        seed: int = 0,
        compile_layers: bool = False,
    ) -> None:
        super().__init__(language_model, schedule, seed=seed, compile_layers=compile_layers)
        device = language_model.device
        self.projector, self.tables, self.aux = projector.to(device), tables, aux
        self.embedding = language_model.model.get_input_embeddings()
        self.namer = (namer or Namer(int(self.embedding.weight.shape[0]))).to(device)
        self.aux_loss = math.nan
        named = {f"projector.{name}": one for name, one in projector.named_parameters()}
        self.add_weights(named, scale=projector_rate, weight_decay=weight_decay)
        self.add_weights({f"namer.{name}": one for name, one in self.namer.named_parameters()}, scale=projector_rate)

    def step(self, batches: Sequence[AttendBatch]) -> float:  # type: ignore[override]  # its own kind of batch
        """One optimizer step; returns the mean loss per answer token, in nats."""
        answers = sum(len(batch.targets) for batch in batches)
        lines = max(1, sum(len(batch.true_lines) for batch in batches))
        torch.manual_seed(self.seed * 1_000_003 + self.progress.step)
        weight = self.aux.weight(self.schedule.progress(self.progress.step, self.progress.seconds))
        device = self.language_model.device
        total, named = torch.zeros((), device=device), torch.zeros((), device=device)
        self.language_model.model.train()
        self.projector.train()
        for batch in batches:
            loss, aux = self._losses(batch, with_aux=weight > 0)
            torch.autograd.backward(loss / answers + weight * aux / lines)
            total += loss.detach() / answers
            named += aux.detach() / lines
        self._update()
        self.progress.step += 1
        self.progress.samples += sum(batch.samples for batch in batches)
        self.progress.tokens += sum(batch.ids.numel() for batch in batches)
        if self.progress.step % 10 != 1 and device.type != "cpu":
            return math.nan
        self.aux_loss = float(named)
        return float(total)

    def loss(self, batches: Sequence[AttendBatch]) -> float:  # type: ignore[override]  # its own kind of batch
        """Mean loss per answer token without dropout and without learning."""
        self.language_model.model.eval()
        self.projector.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            total = sum(float(self._losses(batch, with_aux=False)[0]) for batch in batches)
        return total / max(1, sum(len(batch.targets) for batch in batches))

    def _losses(self, batch: AttendBatch, *, with_aux: bool) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy over answer tokens, and the summed auxiliary loss over true passages."""
        device = self.language_model.device
        embedded = self.embedding(batch.ids.to(device, non_blocking=True))
        aux = torch.zeros((), device=device)
        if len(batch.first):
            soft = self.projector(*self.tables.shown(batch))
            embedded = put(embedded, soft, batch.first.to(device, non_blocking=True))
            if with_aux and len(batch.true_lines):
                aux = self._aux(batch, soft)
        hidden = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        places = batch.places.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        logits = self.head(hidden.flatten(0, 1).index_select(0, places)).float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum"), aux

    def _aux(self, batch: AttendBatch, soft: Tensor) -> Tensor:
        device = soft.device
        lines = batch.true_lines.to(device, non_blocking=True)
        passages = batch.passages.to(device, non_blocking=True)[lines]
        asked = batch.asked.to(device, non_blocking=True)[lines]
        share = self.aux.answer_share if self.projector.config.question else 0.0
        ids, weights = aux_targets(self.tables.words[passages], self.tables.answers[asked], share)
        named: Tensor = self.namer(soft[lines], self.embedding.weight, ids, weights)
        return named.sum()
