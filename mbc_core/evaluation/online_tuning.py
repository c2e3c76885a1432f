"""Online fine-tuning, the paper's baselines without a bank: one gradient step a document, in the order of arrival.

**Uniform** weighs every token alike, which is the plain language-model loss; **Salient Spans** learns from the tokens
of salient spans alone. Both start from a model that was taught to answer questions, as the predecessor's paper does,
and change *all* of the language model's weights: an adapter trained on questions is merged first. The base model that
was handed in is never touched, since a copy is tuned.

The weights are held in float32 by AdamW and copied into a model of the base's precision before each step, as in
:mod:`mbc_core.training.loop`. Nothing is drawn at random.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import BankSize, MethodSet, folder_digest
from mbc_core.lexicon import Lexicon
from mbc_core.reader.generate import NEW_TOKENS, answer_prompts
from mbc_core.reader.kv_lora import load_adapter
from mbc_core.reader.language_model import HfModel, LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.prepared import Prepared
from mbc_core.words import budget_bits, choose_places, split_words, word_worth

Weighting = Literal["uniform", "salient"]
SPAN_BUDGET = 24
"""Word codes that a passage's salient spans may take: those of the profile ``default``."""

_SAYS = {
    "uniform": "online fine-tuning of the whole language model, every token of a document alike",
    "salient": "the same, only tokens of salient words (names, numbers, dates, as the salience head ranks them)",
}


@dataclass(frozen=True, slots=True)
class TuningRun:
    """How a model is tuned on a document.

    Attributes:
        weighting: which tokens count.
        lr: constant learning rate of AdamW (no weight decay).
        steps: gradient steps a document.
        max_tokens: of a passage; the rest is cut.
    """

    weighting: Weighting
    lr: float
    steps: int = 1
    max_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Weighted:
    """Tokens of one document's passages, right-padded.

    Attributes:
        ids: int64 [passages, longest].
        weights: float32 [passages, longest]; what predicting each token counts, 0 for the first and for padding.
    """

    ids: Tensor
    weights: Tensor


def weighted_loss(model: HfModel, batch: Weighted) -> Tensor:
    """Σ w·(−ln p(token | those before)) / Σ w over all tokens of a document, in nats.

    With weights of one this is the plain language-model loss.
    """
    # Right-padded and causal: no token sees the padding, so no mask is needed.
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return torch.dot(losses, weights) / weights.sum()


class TokenWeights:
    """Turns passages into weighted tokens.

    Args:
        lexicon: says what words cost, and so which ones the span budget takes; not needed for ``uniform``.
    """

    def __init__(self, form: PromptFormat, lexicon: Lexicon | None, run: TuningRun, pad_id: int) -> None:
        self._form, self._lexicon, self._run, self._pad_id = form, lexicon, run, pad_id

    def document(self, data: Prepared, rows: Sequence[int]) -> Weighted:
        """The passages ``rows`` of one document."""
        passages = [self.passage(data, int(row)) for row in rows]
        longest = max(len(ids) for ids, _ in passages)
        ids = torch.full((len(passages), longest), self._pad_id)
        weights = torch.zeros(len(passages), longest)
        for place, (tokens, counts) in enumerate(passages):
            ids[place, : len(tokens)] = torch.tensor(tokens)
            weights[place, : len(counts)] = torch.tensor(counts)
        weights[:, 0] = 0.0
        return Weighted(ids, weights)

    def passage(self, data: Prepared, row: int) -> tuple[list[int], list[float]]:
        """Token ids of one passage and the weight of each."""
        text = str(data.table["text"][row].as_py())
        told = self._form.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(told["input_ids"]), list(told["offset_mapping"])
        if self._run.weighting == "uniform":
            weights = [1.0] * len(ids)
        else:
            if self._lexicon is None:
                raise UsageError("salient spans need a lexicon", value=self._run.weighting, fix="give one")
            spans = self._spans(data, row, text, self._lexicon)
            weights = [float(any(start < end_of and begin < end for begin, end_of in spans)) for start, end in offsets]
        start = self._form.start
        most = self._run.max_tokens
        return [*start, *ids][:most], [*(0.0 for _ in start), *weights][:most]

    def _spans(self, data: Prepared, row: int, text: str, lexicon: Lexicon) -> list[tuple[int, int]]:
        """Character spans of the words that the budget takes."""
        words, scores = data.words_of(row)
        placed = split_words(text)
        if [one.text for one in placed] != words:
            raise UsageError(
                "the prepared words are not those of the text",
                value=f"passage {data.table['passage_id'][row].as_py()}",
                cause="the set was prepared without a salience head, or by another release",
                fix="run `mbc train prepare` again with the salience head",
            )
        costs = np.array(lexicon.costs(words), dtype=np.int64)
        room = budget_bits(SPAN_BUDGET)
        taken = choose_places(words, word_worth(scores, costs), costs.tolist(), room, opening=0, bridged=0)
        return [(placed[place].start, placed[place].end) for place in taken]


class OnlineTuning:
    """Fine-tunes a copy of the language model on each document as it comes; see :class:`Method`.

    Args:
        base: the language model, without adapter.
        adapter: KV-LoRA trained on questions without memory; merged into the copy. None: the model as it is.
        lexicon: for ``salient``.
    """

    def __init__(
        self,
        base: LanguageModel,
        adapter: Path | None,
        run: TuningRun,
        *,
        lexicon: Lexicon | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.name, self.says = run.weighting, f"{_SAYS[run.weighting]}, learning rate {run.lr:g}"
        self._base, self._adapter, self._run, self._batch_tokens = base, adapter, run, batch_tokens
        self._form = PromptFormat(base.tokenizer)
        self._weights = TokenWeights(self._form, lexicon, run, base.pad_id)
        told = [
            base.digest, folder_digest(adapter) if adapter else "", asdict(run), SPAN_BUDGET, NEW_TOKENS,
            lexicon.digest if lexicon is not None and run.weighting == "salient" else "",
        ]  # fmt: skip
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self._tuned: _Tuned | None = None

    def start(self, data: MethodSet) -> None:
        """A fresh copy of the merged model, and an optimizer without moments."""
        self._data = data
        self._tuned = _Tuned(merged(self._base, self._adapter), self._run.lr)

    def adapt(self, documents: Sequence[int]) -> None:
        """One document after the other; a document without a weighed token teaches nothing."""
        tuned = self._ready()
        for number in documents:
            batch = self._weights.document(self._data.prepared, self._data.documents[number].tolist())
            if float(batch.weights.sum()) > 0:
                for _ in range(self._run.steps):
                    tuned.step(batch)

    def answer(self, questions: Sequence[int]) -> list[str]:
        """Without any memory: what was learned is in the weights."""
        model = replace(self._base, model=self._ready().model)
        room = model.context
        prompts = [self._form.build([], self._data.prepared.questions[one], room).ids for one in questions]
        return answer_prompts(model, self._form, prompts, batch_tokens=self._batch_tokens)

    def size(self) -> BankSize:
        """Every weight changed, in the precision that answers."""
        changed = sum(one.numel() * one.element_size() for one in self._ready().model.parameters())
        return BankSize("weights", bank=changed)

    def close(self) -> None:
        """Drop the copy."""
        self._tuned = None

    def _ready(self) -> _Tuned:
        if self._tuned is None:
            raise UsageError("the method was not started", value=self.name, fix="call start first")
        return self._tuned


class _Tuned:
    """A model of the base's precision, its float32 weights, and their optimizer."""

    def __init__(self, model: HfModel, lr: float) -> None:
        self.model = model.eval()  # no dropout: nothing is drawn at random
        self._weights = [one.requires_grad_() for one in model.parameters()]
        self._masters = [one.detach().float().clone().requires_grad_() for one in self._weights]
        on_gpu = self._weights[0].device.type == "cuda"
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, weight_decay=0.0, fused=on_gpu)

    def step(self, batch: Weighted) -> None:
        device = self._weights[0].device
        loss = weighted_loss(self.model, Weighted(batch.ids.to(device), batch.weights.to(device)))
        torch.autograd.backward(loss)
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([one.data for one in self._weights], self._masters)


def merged(base: LanguageModel, adapter: Path | None) -> HfModel:
    """A copy of the base model with the adapter's update added to its weights; the base itself stays as it is.

    Raises:
        ModelError, DamagedFile: the adapter belongs to another model or is damaged.
    """
    model = copy.deepcopy(base.model)
    if adapter is None:
        return model
    dtype = next(model.parameters()).dtype
    adapted, _ = load_adapter(model.float(), adapter, base_digest=base.digest)
    return adapted.merge_and_unload().to(dtype)
