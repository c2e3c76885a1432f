"""A sentence encoder small enough for tests that fetch nothing: real files, real classes, random weights."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from mbc_core.encoder.salience_head import SalienceHead, SalienceShape

WIDTH = 48
SHAPE = SalienceShape(layers=(1, 2), input_width=WIDTH, width=24, heads=2, feed_forward=32, depth=1)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Two BERT blocks and a tokenizer whose pieces are single letters, digits and punctuation marks."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.enable_truncation(16)  # as the real file has one: loading must lift it
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def write_tiny_head(path: Path, encoder_digest: str, seed: int = 1) -> Path:
    """A random salience head for the encoder with this digest."""
    torch.manual_seed(seed)
    SalienceHead(SHAPE).save(path, encoder_digest)
    return path
