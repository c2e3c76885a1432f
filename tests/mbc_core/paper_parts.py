"""The paper's model small enough for tests: real architectures, random weights, byte tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, T5Config, T5Model

from mbc_core.paper.config import PaperConfig
from mbc_core.paper.model import PaperBatch, PaperModel
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from tests.mbc_core.tiny_reader import language_model

TOKENS = 4
SMALL = {
    "tokens": TOKENS, "codewords": 16, "code_width": 32, "latent_width": 32, "amortizer_heads": 4, "heads": 4,
    "blocks": 2, "prefix_hidden": 24, "lora_r": 2, "lora_alpha": 4,
}  # fmt: skip


def bert(seed: int = 0, width: int = 24) -> BertModel:
    """A sentence encoder of bytes."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=257, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def t5(seed: int = 0) -> T5Model:
    """An encoder-decoder of bytes."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=257, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.1, initializer_factor=1.0,
    )  # fmt: skip
    return T5Model(config).eval()


def paper_model(kind: str = "llama", seed: int = 0, reader: LanguageModel | None = None, **changes) -> PaperModel:
    """Learned codes; questions from tokens unless told otherwise; each side its own encoder."""
    config = PaperConfig(**(SMALL | {"seed": seed} | changes))
    make = t5 if config.amortizer == "t5" else bert
    questions = make(1) if config.question == "tokens" else None
    return PaperModel(config, reader or language_model(kind), encoder=make(0), question_encoder=questions)


def address_model(kind: str = "llama", seed: int = 0, **changes) -> PaperModel:
    """Address codes of an embedding of 96 in 4 slots."""
    small = {name: value for name, value in SMALL.items() if name not in ("tokens", "code_width", "latent_width")}
    config = PaperConfig.address(TOKENS, 96, **(small | {"latent_width": 32, "seed": seed} | changes))
    words = torch.randn(config.codewords, config.code_width, generator=torch.Generator().manual_seed(seed))
    return PaperModel(config, language_model(kind), codewords=words)


def padded(texts: Sequence[str], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts → ids and mask of their bytes, right-padded with 256."""
    rows = [[0, *text.encode()] for text in texts]
    width = max(longest or 0, *(len(row) for row in rows))
    ids = torch.tensor([row + [256] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()


PASSAGES = ("Avalon exports salt.", "Brigadoon has a harbour of stone.", "Camelot: 1500.", "Dunwich sank in 1286.")
QUESTIONS = ("What does Avalon export?", "What has Brigadoon?", "When was Camelot founded?", "When did Dunwich sink?")
ANSWERS = ("salt", "a harbour", "1500", "1286")


def batch(
    model: PaperModel,
    passages: Sequence[str] = PASSAGES,
    questions: Sequence[str] = QUESTIONS,
    answers: Sequence[str] = ANSWERS,
    **more,
) -> PaperBatch:
    """What training shows, in the given order."""
    form = PromptFormat(model.language_model.tokenizer)
    prompts = [form.question(one) for one in questions]
    ends = [form.answer(one) for one in answers]
    given: dict = {}
    if model.config.codes == "address":
        generator = torch.Generator().manual_seed(7)
        given["codes"] = torch.randint(0, model.config.codewords, (len(passages), TOKENS), generator=generator)
    else:
        given["document_ids"], given["document_mask"] = padded(passages)
    if model.config.question == "embedding":
        generator = torch.Generator().manual_seed(8)
        width = model.config.embedding_width
        given["question_embeddings"] = torch.randn(len(questions), width, generator=generator) / width**0.5
    else:
        given["question_ids"], given["question_mask"] = padded(questions)
    return PaperBatch(*with_answers(prompts, ends), **(given | more))


def with_answers(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, L], flattened places before answer tokens, and those tokens; order kept."""
    pairs = list(zip(prompts, answers, strict=True))
    width = max(len(a) + len(b) for a, b in pairs)
    ids = torch.full((len(pairs), width), 256)
    places: list[int] = []
    targets: list[int] = []
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        places += [row * width + len(prompt) - 1 + place for place in range(len(answer))]
        targets += answer
    return ids, torch.tensor(places), torch.tensor(targets)
