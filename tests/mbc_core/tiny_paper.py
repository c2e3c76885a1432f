"""A paper model small enough for tests, with data to train it on: towns, their founders, and who is asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.encoder import PassageEncoder
from mbc_core.paper.config import PaperConfig
from mbc_core.paper.model import PaperModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.data import TrainingPassage
from mbc_core.training.paper_batches import OnDevice
from mbc_core.training.paper_data import PaperData, data_of_passages
from mbc_core.training.paper_run import PaperRun
from tests.mbc_core.tiny_encoder import WIDTH, write_tiny_encoder
from tests.mbc_core.tiny_reader import language_model, tokenizer

SLOTS, CODEWORDS = 4, 8
CPU = torch.device("cpu")
RUN = PaperRun(
    steps=6, minutes=None, documents=4, questions=2, banks=(1, 2), held_out_bank=2, max_tokens=64, warm_up=2,
    look_every=3, flat=None, lr=3e-3, lora_lr=3e-3, bf16=False, chunks=2,
)  # fmt: skip


def passages(count: int = 20) -> list[TrainingPassage]:
    """Every fifth is held out; towns with an even number have three questions, others one."""
    made = []
    for number in range(count):
        questions = [(f"who founded t{number}?", (f"f{number}", "x")), (f"when t{number}?", (f"{1500 + number}",))]
        questions += [(f"what sells t{number}?", ("salt",))]
        text = f"t{number} was founded by f{number} in {1500 + number}. it sells salt."
        made.append(
            TrainingPassage(
                f"p{number}", "towns" if number % 3 else "others", text, tuple(questions[: 1 if number % 2 else 3]),
                "dev" if number % 5 == 0 else "train",
            )
        )  # fmt: skip
    return made


def pieces(seed: int = 0) -> tuple[Rotation, Codebook]:
    words = np.random.default_rng(seed).standard_normal((CODEWORDS, WIDTH // SLOTS)).astype(np.float32) / 7
    return Rotation.random(WIDTH, seed), Codebook.first(words, np.full(CODEWORDS, 9.0))


def data(folder: Path, count: int = 20) -> tuple[PaperData, PassageEncoder]:
    """Tokens of :func:`passages`, and the encoder (whose folder is ``folder``) that they are for."""
    encoder = PassageEncoder.load(write_tiny_encoder(folder), None, precision="float32")
    rotation, codebook = pieces()
    made = data_of_passages(
        passages(count), encoder, PromptFormat(tokenizer()), rotation=rotation, codebooks=[codebook]
    )
    return made, encoder


def config(codes: str = "learned", **changes: Any) -> PaperConfig:
    shared: dict[str, Any] = {
        "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "heads": 4, "blocks": 2, "prefix_hidden": 16,
        "codewords": CODEWORDS,
    }  # fmt: skip
    if codes == "address":
        return PaperConfig.address(SLOTS, WIDTH, **{**shared, **changes})
    learned: dict[str, Any] = {
        "tokens": SLOTS, "code_width": 32, "latent_width": 32, "embedding_width": WIDTH, "amortizer_heads": 4,
        "amortizer_blocks": 1, "train_encoder": True,
    }  # fmt: skip
    return PaperConfig(**{**shared, **learned, **changes})


def model(folder: Path, configured: PaperConfig, kind: str = "llama") -> PaperModel:
    """A fresh one; ``folder`` is the encoder's."""
    base = language_model(kind)
    if configured.codes == "address":
        return PaperModel(configured, base, codewords=torch.from_numpy(pieces()[1].codewords))
    encoders = [BertModel.from_pretrained(folder, add_pooling_layer=False) for _ in range(2)]
    for one in encoders:  # dropout would make ranks differ from one process
        one.config.hidden_dropout_prob = one.config.attention_probs_dropout_prob = 0.0
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return PaperModel(configured, base, encoder=encoders[0], question_encoder=encoders[1])


def on_device(made: PaperData, encoder: PassageEncoder, codes: str = "learned") -> OnDevice:
    address = codes == "address"
    return OnDevice(
        made, CPU, slots=SLOTS if address else None, embeddings=made.embed_questions(encoder) if address else None,
        max_tokens=64, chunks=2,
    )  # fmt: skip
