"""Sizes and switches of the paper's model, in the paper's symbols; a value object that no module reads from a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from mbc_core.errors import DamagedFile, UsageError

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PaperConfig:
    """Everything that decides the shape and the training rule of a :class:`~mbc_core.paper.model.PaperModel`.

    Attributes:
        codes: where code vectors come from: "learned" (the paper's: amortization and a learned codebook) or "address"
            (a bank's own address codes under a frozen codebook).
        tokens: T, code vectors a passage, and queries a question.
        codewords: K.
        code_width: d_c; the paper's is the language model's width.
        latent_width: width of queries and latents; the paper's is d_c.
        quantize: off is MAC's memory: T·d_c floats a passage.
        reset: give dead codes a new word; in training only.
        reset_rule: "paper": dead below ``dead_below``, the new word is one pre-quantization vector of the batch.
            "pooled": dead below ``dead_share`` of the mean usage, the new word is the mean of five vectors of five
            documents, so that no codeword gives a document away. Either way the new usage is the mean.
        codebook_by: "gradient" (the paper's) or "ema": E = m / N of decayed sums and counts.
        beta: β, weight of the commitment term.
        lambda_vq: λ, weight of L_vq beside L_QA.
        usage_decay: decay of usage (and of EMA sums) a forward.
        usage_tau: when given, decay = exp(−vectors / usage_tau) instead: the batch size no longer matters.
        dead_below: usage (a decayed count a forward) under which a code is dead, rule "paper".
        standardize: center z and give it unit variance, each token and element by its own decayed mean and variance of
            training, before quantization. Not in the paper: without it a token's z is nearly the same for every
            passage at the start, so each token gets one code for all passages, and codes tell passages apart late.
        dead_share: share of the mean usage under which a code is dead, rule "pooled".
        seed: of the first codebook and of the choice of reset vectors.
        amortizer: "encoder": a sentence encoder and a small decoder of T learned queries; "t5": the paper's.
        train_encoder: gradients reach the encoder's own weights. The paper's: yes.
        amortizer_blocks, amortizer_heads: of the small decoder.
        shared_heads: one output head for all T tokens; the paper has one a token.
        question: queries from the question's "tokens" (the same trick as for passages) or from its "embedding".
        embedding_width: width of that embedding.
        blocks, heads: of the aggregation.
        slot_marks: add a learned embedding of its slot to each code vector before it is read, so that a histogram has
            T·K cells and codes of different slots are told apart. Not in the paper, whose reader sees K cells.
        feed_forward: hidden width of its feed-forward parts is min(latent_width, feed_forward).
        prefix_tokens: virtual tokens a layer.
        prefix_hidden: hidden width of the prefix's networks.
        prefix_shared: one network with an embedding for each slot; the paper has one network a slot.
        kv_lora: off leaves the language model as it is.
        lora_r, lora_alpha, lora_dropout: rank, alpha (scale alpha/r) and dropout of KV-LoRA.
        lora_last_n: how many last layers it adapts; None is all.
        backprop_keep: share of the documents of a batch that gradients flow into (1: all). The complement of MAC's
            "backprop dropout"; the reference calls the kept share ``backprop_drop``.
    """

    codes: Literal["learned", "address"] = "learned"
    tokens: int = 12
    codewords: int = 512
    code_width: int = 576
    latent_width: int = 576
    quantize: bool = True
    reset: bool = True
    reset_rule: Literal["paper", "pooled"] = "paper"
    codebook_by: Literal["gradient", "ema"] = "gradient"
    beta: float = 0.25
    lambda_vq: float = 1.0
    usage_decay: float = 0.99
    usage_tau: float | None = None
    dead_below: float = 1e-4
    dead_share: float = 0.02
    standardize: bool = False
    seed: int = 0
    amortizer: Literal["encoder", "t5"] = "encoder"
    train_encoder: bool = False
    amortizer_blocks: int = 2
    amortizer_heads: int = 8
    shared_heads: bool = False
    question: Literal["tokens", "embedding"] = "tokens"
    embedding_width: int = 384
    blocks: int = 4
    heads: int = 8
    slot_marks: bool = False
    feed_forward: int = 768
    prefix_tokens: int = 2
    prefix_hidden: int = 768
    prefix_shared: bool = True
    kv_lora: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_last_n: int | None = None
    backprop_keep: float = 1.0

    def __post_init__(self) -> None:
        wrong = [name for name, is_wrong in self._problems().items() if is_wrong]
        if wrong:
            raise UsageError(
                "the paper model's configuration is impossible",
                value={name: getattr(self, name) for name in wrong},
                cause="sizes are at least 1, shares and decays lie within 0 and 1, heads divide their width, and a "
                "frozen encoder or address codes leave nothing to train or quantize there",
                fix="correct these values",
            )

    @classmethod
    def address(cls, tokens: int = 12, embedding_width: int = 384, **changes: Any) -> PaperConfig:  # noqa: ANN401  # any field
        """The configuration that reads a bank's own address codes: d_c = embedding_width / T, question as embedding."""
        if tokens < 1 or embedding_width % tokens:
            raise UsageError(
                "T does not divide the embedding's width",
                value=f"T = {tokens}, width {embedding_width}",
                cause="address codes split the rotated embedding into T equal parts",
                fix="use the T of the bank (`mbc inspect`)",
            )
        base = cls(
            codes="address",
            tokens=tokens,
            code_width=embedding_width // tokens,
            latent_width=embedding_width,
            question="embedding",
            embedding_width=embedding_width,
        )
        return replace(base, **changes)

    def to_json(self) -> str:
        """JSON text with sorted keys."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> PaperConfig:
        """Read :meth:`to_json`.

        Raises:
            DamagedFile: not such a text, or an unknown field. A missing one takes its default.
        """
        try:
            told = json.loads(text)
            names = {one.name for one in fields(cls)}
            if not isinstance(told, dict) or not set(told) <= names:
                raise ValueError(f"unknown fields: {sorted(set(told) - names)[:4]}")
            return cls(**told)
        except (ValueError, TypeError, UsageError) as error:
            raise DamagedFile(
                "the paper model's configuration cannot be read",
                value=where,
                cause=str(error),
                fix="restore the folder, or train the model again with `mbc train paper`",
            ) from error

    def _problems(self) -> dict[str, bool]:
        sizes = (
            "tokens", "codewords", "code_width", "latent_width", "amortizer_blocks", "amortizer_heads", "blocks",
            "heads", "feed_forward", "prefix_tokens", "prefix_hidden", "lora_r", "lora_alpha", "embedding_width",
        )  # fmt: skip
        problems = {name: getattr(self, name) < 1 for name in sizes}
        problems["heads"] |= self.latent_width % max(self.heads, 1) != 0
        problems |= {name: not 0 <= getattr(self, name) < 1 for name in ("usage_decay", "dead_share", "lora_dropout")}
        problems |= {name: not getattr(self, name) >= 0 for name in ("beta", "lambda_vq", "dead_below")}
        problems["backprop_keep"] = not 0 < self.backprop_keep <= 1
        problems["usage_tau"] = self.usage_tau is not None and not self.usage_tau > 0
        problems["lora_last_n"] = self.lora_last_n is not None and self.lora_last_n < 1
        problems["quantize"] = self.codes == "address" and not self.quantize
        return problems | {name: getattr(self, name) not in allowed for name, allowed in _CHOICES.items()}


_CHOICES: dict[str, tuple[str, ...]] = {
    "codes": ("learned", "address"),
    "reset_rule": ("paper", "pooled"),
    "codebook_by": ("gradient", "ema"),
    "amortizer": ("encoder", "t5"),
    "question": ("tokens", "embedding"),
}
