"""The paper's model end to end: passages → code vectors → (question) latents → prefix → answer.

L = L_QA (cross-entropy of answer tokens alone) + λ·L_vq. In training a batch's own passages are its bank. The language
model's own weights are frozen; KV-LoRA, when on, is trained with everything else and frozen online. A prefix never
passes through KV-LoRA (it stands in the cache already): LoRA adapts how questions and answers are read, so an equally
trained model without memory (``closed=True``) is the control that tells the memory's part from LoRA's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.errors import UsageError
from mbc_core.paper.aggregation import (
    Aggregator,
    Memory,
    cell_counts,
    code_counts,
    flat_memory,
    histogram_memory,
    slots_of,
)
from mbc_core.paper.amortization import Amortizer, EmbeddingQueries, T5Amortizer
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.prefix import Prefix, PrefixShape
from mbc_core.paper.vector_quantizer import Quantized, VectorQuantizer
from mbc_core.reader.kv_lora import KVLoraConfig, add_kv_lora
from mbc_core.reader.language_model import HfModel, LanguageModel
from mbc_core.reader.prefix_cache import Pairs, prefix_cache

_MOST_LOGITS = 1 << 27
"""Attention logits of one block that are computed at once when a whole bank is read: half a gigabyte in float32."""


@dataclass(frozen=True, slots=True)
class PaperBatch:
    """Questions with answers, and the passages that are their bank.

    Attributes:
        ids: prompts with answers, int64 [B, L], right-padded.
        places: int64 [answer tokens], places in the flattened ``ids`` whose next token is an answer's.
        targets: int64 [answer tokens], those tokens.
        question_ids, question_mask: int64 [B, S], when the configuration reads a question's tokens.
        question_embeddings: float32 [B, embedding_width], when it reads its embedding.
        document_ids, document_mask: int64 [N, S], passages of learned codes.
        codes: int64 [N, T], passages of address codes.
        banks: how many separate banks the batch holds: equal shares of passages and of questions, in order.
        kept: bool [N], passages that gradients flow into; drawn by ``backprop_keep`` when None.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None
    question_embeddings: Tensor | None = None
    document_ids: Tensor | None = None
    document_mask: Tensor | None = None
    codes: Tensor | None = None
    banks: int = 1
    kept: Tensor | None = None


class PaperLosses(NamedTuple):
    """What a forward pass gives.

    Attributes:
        total: answer + λ · vq, scalar.
        answer: L_QA, nats an answer token, scalar.
        vq: L_vq, scalar.
        quantized: codes, perplexity, used codes, reset rows; None when the passages were not quantized here.
    """

    total: Tensor
    answer: Tensor
    vq: Tensor
    quantized: Quantized | None


class PaperModel(nn.Module):
    """The modules and how they meet.

    Args:
        config: sizes and switches.
        language_model: frozen and without adapter; KV-LoRA is put on when the configuration says so.
        encoder: for learned codes: a sentence encoder, or a ``T5Model``.
        question_encoder: for questions read from tokens; may be ``encoder`` itself.
        codewords: for address codes: the frozen codebook, float32 [K, d_c].

    Attributes:
        amortizer, quantizer: of passages; None for address codes.
        codewords: the frozen codebook of address codes, else None.
        question: (ids, mask) or (embeddings,) → queries [B, T, w].
        aggregator, prefix: queries and memory → latents → keys and values.
        language_model: with KV-LoRA when it is on.

    Raises:
        UsageError: a needed encoder or codebook is missing, or has another shape.
    """

    codewords: Tensor | None

    def __init__(
        self,
        config: PaperConfig,
        language_model: LanguageModel,
        *,
        encoder: HfModel | None = None,
        question_encoder: HfModel | None = None,
        codewords: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        _require_parts(config, encoder, question_encoder, codewords)
        self.amortizer: Amortizer | T5Amortizer | None = None
        self.quantizer: VectorQuantizer | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if config.codes == "learned":
                self.amortizer = _amortizer(config, encoder, config.code_width)
                self.quantizer = VectorQuantizer(config)
            self.register_buffer("codewords", None if codewords is None else codewords.detach().clone().float())
            self.question: nn.Module = (
                EmbeddingQueries(config.embedding_width, config.tokens, config.latent_width)
                if config.question == "embedding"
                else _amortizer(config, question_encoder, config.latent_width)
            )
            self.aggregator = Aggregator(
                config.code_width, config.latent_width, blocks=config.blocks, heads=config.heads,
                feed_forward=config.feed_forward, slots=config.tokens if config.slot_marks else 0,
            )  # fmt: skip
            self.prefix = Prefix(
                PrefixShape.of(language_model.model.config), config.latent_width, config.tokens,
                prefix_tokens=config.prefix_tokens, hidden=config.prefix_hidden, shared=config.prefix_shared,
            )  # fmt: skip
        for part in (self.amortizer, self.quantizer, self.question, self.aggregator, self.prefix):
            if part is not None:
                part.to(language_model.device)
        self.language_model = _with_lora(config, language_model)
        self.reader: nn.Module = self.language_model.model
        # Every rank computes the codebook's whole gradient itself, so that no reduction order can tell ranks apart.
        kept = [] if self.quantizer is None else list(self.quantizer.state_dict())
        self._ddp_params_and_buffers_to_ignore = [f"quantizer.{name}" for name in kept]

    def forward(self, batch: PaperBatch, *, memory: Memory | None = None, closed: bool = False) -> PaperLosses:
        """Loss of one batch.

        Args:
            memory: read instead of the batch's own passages (a bank, a shuffled bank).
            closed: read no memory at all; KV-LoRA and the question's own part of the prefix stay.
        """
        quantized = None
        if closed:
            memory = None
        elif memory is None:
            memory, quantized = self.batch_memory(batch)
        queries = self.queries(batch.question_ids, batch.question_mask, batch.question_embeddings)
        rows = queries.shape
        if memory is not None and batch.banks > 1:
            queries = queries.reshape(batch.banks, -1, rows[-1])  # queries never meet, so a bank's may stand in a row
        latents = self.aggregator(queries, memory).reshape(rows)
        answer = self.answer_loss(batch.ids, batch.places, batch.targets, self.prefix(latents))
        vq = answer.new_zeros(()) if quantized is None else quantized.loss
        return PaperLosses(answer + self.config.lambda_vq * vq, answer, vq, quantized)

    def batch_memory(self, batch: PaperBatch) -> tuple[Memory, Quantized | None]:
        """The passages of a batch as its bank (as ``batch.banks`` banks)."""
        if self.quantizer is None:
            memory, quantized = flat_memory(self._codewords(), _given(batch.codes, "codes")), None
        else:
            ids, mask = _given(batch.document_ids, "document_ids"), _given(batch.document_mask, "document_mask")
            quantized = self.quantizer(self.amortize(ids, mask, batch.kept))
            memory = Memory(quantized.vectors.flatten(0, 1), None, slots_of(quantized.vectors))
        if batch.banks > 1:
            vectors = memory.vectors.reshape(batch.banks, -1, memory.vectors.shape[-1])
            memory = Memory(vectors, None, None if memory.slots is None else memory.slots[: vectors.shape[1]])
        return memory, quantized

    def amortize(self, ids: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
        """Passages → z, float32 [N, T, d_c], in float32 under autocast too: the same codes in training and online.

        Args:
            ids, mask: int64 [N, S].
            kept: bool [N], passages that gradients flow into; in training, None draws ``backprop_keep`` of them.
        """
        amortizer = self._amortizer()
        if kept is None and self.training and self.config.backprop_keep < 1:
            kept = _draw_kept(len(ids), self.config.backprop_keep).to(ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            if kept is None or not torch.is_grad_enabled():
                z: Tensor = amortizer(ids, mask)
                return z
            order = torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]])
            count = int(kept.sum())
            first, rest = order[:count], order[count:]
            parts = [amortizer(ids[first], mask[first])] if count else []
            if len(rest):
                with torch.no_grad():
                    parts.append(amortizer(ids[rest], mask[rest]))
            return torch.cat(parts)[order.argsort()]

    @torch.no_grad()
    def calibrate(self, passages: Iterable[tuple[Tensor, Tensor]]) -> None:
        """With ``standardize``: take z's mean and variance from training passages, at the weights of now.

        Weights move z by more than passages differ, faster than decayed statistics follow: call this before every
        evaluation and before saving. Without ``standardize`` it does nothing.

        Args:
            passages: batches of ids and mask, int64 [n, S]; a few hundred passages are enough, one batch will do.

        Raises:
            UsageError: no passage.
        """
        if self.quantizer is None or not self.config.standardize:
            return
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for ids, mask in passages:
            with _evaluation(self._amortizer()):
                z = self.amortize(ids, mask).double()
            count, total, squares = count + len(z), z.sum(0) + total.to(z), z.square().sum(0) + squares.to(z)
        if not count:
            raise UsageError(
                "the codes cannot be calibrated on nothing",
                value=count,
                cause="no passage was given",
                fix="pass a few hundred training passages",
            )
        self.quantizer.set_scale(total / count, squares / count)

    @torch.no_grad()
    def encode_documents(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Online adaptation's one step: encode and quantize; no gradient, and no weight or codebook byte changes.

        Args:
            ids, mask: int64 [N, S], the encoder's tokens.

        Returns:
            codes int64 [N, T]; with quantization off, vectors float32 [N, T, d_c] (MAC's bank).
        """
        with _evaluation(self._amortizer()):
            z = self.amortize(ids, mask)
        if self.quantizer is None:
            return z
        z = self.quantizer.standardized(z)
        return self.quantizer.nearest(z) if self.config.quantize else z

    def code_vectors(self) -> Tensor:
        """E, [K, d_c]: the learned codebook, or the frozen one of address codes."""
        return self._codewords() if self.quantizer is None else self.quantizer.codebook

    def histogram(self, codes: Tensor) -> Memory:
        """The memory that holds ``codes`` int64 [N, T] under this model's codebook, in O(K) (slot marks: O(T·K))."""
        words = self.code_vectors()
        count = cell_counts if self.config.slot_marks else code_counts
        return histogram_memory([(words, count(codes, len(words)))])

    def queries(
        self, ids: Tensor | None = None, mask: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Questions → queries [B, T, w], from tokens or from embeddings as configured."""
        if self.config.question == "embedding":
            found: Tensor = self.question(_given(embeddings, "question_embeddings"))
        else:
            found = self.question(_given(ids, "question_ids"), _given(mask, "question_mask"))
        return found

    def read(self, queries: Tensor, memory: Memory | None) -> Pairs:
        """Queries and memory → the prefix that :func:`mbc_core.reader.generate.greedy` takes."""
        many = 1 if memory is None else queries.shape[1] * memory.vectors.shape[-2] * self.config.heads
        parts = [(queries, memory)]
        if memory is not None and memory.vectors.dim() == 2 and (memory.counts is None or memory.counts.dim() == 1):
            at_once = max(1, _MOST_LOGITS // many)  # no question sees another
            parts = [(part, memory) for part in torch.split(queries, at_once)]
        pairs: Pairs = self.prefix(torch.cat([self.aggregator(*part) for part in parts]))
        return pairs

    def answer_loss(self, ids: Tensor, places: Tensor, targets: Tensor, pairs: Pairs | None) -> Tensor:
        """Mean cross-entropy of the answer tokens; ``pairs`` None is the language model (and KV-LoRA) alone."""
        model = self.language_model.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        virtual = pairs[0][0].shape[2] if pairs else 0
        positions = torch.arange(virtual, virtual + ids.shape[1], device=ids.device)
        # Rows are padded on the right and attention is causal: no token of a row sees padding, so no mask is needed.
        states = base.base_model(
            input_ids=ids,
            position_ids=positions.expand(len(ids), -1),
            past_key_values=prefix_cache(pairs, model.dtype) if pairs else None,
            use_cache=pairs is not None,
        ).last_hidden_state
        logits = base.get_output_embeddings()(states.flatten(0, 1)[places])
        return functional.cross_entropy(logits.float(), targets)

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training changes by gradient, by name, each once: codebook, networks, KV-LoRA."""
        return {name: one for name, one in self.named_parameters() if one.requires_grad}

    @torch.no_grad()
    def digest(self) -> str:
        """sha256 (hex) over the bytes of every weight and buffer: base, KV-LoRA, encoders, codebook, usage."""
        found = hashlib.sha256()
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def _amortizer(self) -> nn.Module:
        if self.amortizer is None:
            raise UsageError(
                "address codes are not made here",
                value=self.config.codes,
                cause="a bank's own address codes come from the passage encoder and the bank's codebook",
                fix="ingest the documents, or use codes='learned'",
            )
        return self.amortizer

    def _codewords(self) -> Tensor:
        return _given(self.codewords, "codewords")


def _amortizer(config: PaperConfig, encoder: HfModel, width: int) -> Amortizer | T5Amortizer:
    if config.amortizer == "t5":
        return T5Amortizer(
            encoder, config.tokens, width, shared_heads=config.shared_heads, train_encoder=config.train_encoder
        )
    return Amortizer(
        encoder, config.tokens, width, blocks=config.amortizer_blocks, heads=config.amortizer_heads,
        shared_heads=config.shared_heads, train_encoder=config.train_encoder,
    )  # fmt: skip


def _with_lora(config: PaperConfig, language_model: LanguageModel) -> LanguageModel:
    if not config.kv_lora:
        return language_model
    size = KVLoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_last_n)
    return replace(language_model, model=add_kv_lora(language_model.model, size, seed=config.seed))


def _draw_kept(count: int, share: float) -> Tensor:
    """bool [count] with round(count · share) at random, at least one."""
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.randperm(count)[: max(1, round(count * share))]] = True
    return kept


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def _require_parts(
    config: PaperConfig, encoder: HfModel | None, question_encoder: HfModel | None, codewords: Tensor | None
) -> None:
    missing = []
    if config.codes == "learned" and encoder is None:
        missing.append("encoder")
    if config.question == "tokens" and question_encoder is None:
        missing.append("question_encoder")
    wanted = (config.codewords, config.code_width)
    if config.codes == "address" and (codewords is None or tuple(codewords.shape) != wanted):
        missing.append(f"codewords [{wanted[0]}, {wanted[1]}]")
    if missing:
        raise UsageError(
            "the paper's model lacks a part",
            value=missing,
            cause="learned codes need an encoder, questions read from tokens one too, address codes their codebook",
            fix="pass it to PaperModel",
        )


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise UsageError(
            "the batch lacks what this configuration reads",
            value=name,
            cause="it was made for another configuration (learned or address codes, question as tokens or embedding)",
            fix=f"fill {name}",
        )
    return value
