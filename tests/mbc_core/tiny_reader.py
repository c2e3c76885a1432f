"""Language models, an encoder and banks small enough for tests that fetch nothing: real classes, random weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mbc_core.bank import Bank, SliceRows, commit_slice
from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, pack, quantize, to_slots
from mbc_core.encoder import EncodedPassage
from mbc_core.lexicon import Lexicon
from mbc_core.passages import split_passages
from mbc_core.prefix_code import PrefixCode
from mbc_core.reader.language_model import LanguageModel
from mbc_core.words import choose_words, split_words
from schemas.document import document_key, parse_timestamp
from schemas.manifest import Manifest
from schemas.tables import CODES, DEAD_LETTER, DOCUMENTS, LEDGER, REPLAY

WIDTH, SLOTS, CODEWORDS = 96, 24, 64
END = "<|end|>"
SALT = "00112233445566778899aabbccddeeff"


def tokenizer(bos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, as GPT-2 spells them, and an end of text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([END, *([bos] if bos else [])])
    if bos:
        from tokenizers import processors

        plain.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, plain.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, bos_token=bos)


def llama(seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    """Grouped-query attention: four heads, two key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=None, eos_token_id=256, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0, layers: int = 3) -> GPT2LMHeadModel:
    """Fused query-key-value projection, learned positions, dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=260, n_embd=32, n_layer=layers, n_head=4, n_positions=1024, initializer_range=0.3,
        bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def language_model(kind: str = "llama", seed: int = 0) -> LanguageModel:
    made = llama(seed) if kind == "llama" else gpt2(seed)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return LanguageModel(made, tokenizer(), f"{kind}-{seed}".ljust(64, "0"), f"tiny-{kind}")


class BagOfWords:
    """An encoder whose embeddings are near when texts share words; salience prefers capitals and digits."""

    encoder_id = "bag-of-words@0123456789ab/float32/sentences-256"
    salience_digest = "cc" * 32
    width = WIDTH

    def count_pieces(self, text: str) -> int:
        return len(text.split())

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        return np.stack([self._embed(one) for one in questions]) if questions else np.zeros((0, WIDTH), np.float32)

    def encode(self, texts: Sequence[str], progress=None) -> list[EncodedPassage]:
        return [EncodedPassage(self._embed(text), *self._words(text)) for text in texts]

    def _embed(self, text: str) -> np.ndarray:
        total = np.full(WIDTH, 1e-3)
        for word in {one.text.casefold() for one in split_words(text) if len(one.text) > 3}:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
            total += np.random.default_rng(seed).standard_normal(WIDTH)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def _words(self, text: str) -> tuple[tuple[str, ...], np.ndarray]:
        words = tuple(one.text for one in split_words(text))
        scores = [(word[0].isupper() or word[0].isdigit()) + len(word) / 100 for word in words]
        return words, np.array(scores, dtype=np.float32)


@dataclass(frozen=True)
class Doc:
    doc_id: str
    text: str
    timestamp: str | None = None
    question: str = ""
    answer: str = ""
    split: str = "train"


GOODS = ("salt", "amber", "timber", "wool")
TOWNS = ("Avalon", "Brigadoon", "Camelot", "Dunwich", "Elsinore", "Fairhaven", "Gotham", "Hobbiton")


def documents(count: int = 24) -> list[Doc]:
    """Small towns with a founder and a year; every fourth is held out."""
    made = []
    for number in range(count):
        town, founder = f"{TOWNS[number % 8]}{number:02d}", f"Founder{number:02d}"
        text = (
            f"The town of {town} was founded by {founder} in the year {1500 + 7 * number}. "
            f"Its harbour at {town} exports {GOODS[number % 4]} every summer to Port{number:02d}."
        )
        made.append(
            Doc(
                f"doc-{number:02d}", text, f"2024-07-{1 + number // 2:02d}", f"Who founded {town}?", founder,
                "heldout" if number % 4 == 0 else "train",
            )
        )  # fmt: skip
    return made


def lexicon() -> Lexicon:
    merges = [("Ġ", "T"), ("ĠT", "h"), ("o", "u"), ("ou", "n"), ("oun", "d")]
    return Lexicon(merges, PrefixCode.from_counts([1.0] * (256 + len(merges))).lengths.tolist())


def pieces(seed: int = 0) -> tuple[Rotation, Codebook]:
    rotation = Rotation.random(WIDTH, seed)
    encoder = BagOfWords()
    vectors = to_slots(encoder.encode_questions([one.text for one in documents(40)]), rotation, SLOTS).reshape(-1, 4)
    words = np.ascontiguousarray(vectors[:: len(vectors) // CODEWORDS][:CODEWORDS])
    return rotation, Codebook.first(words, np.full(len(words), 50.0))


def manifest(rotation: Rotation, words: int = 24, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "profile": "default" if words else "paper",
        "encoder": BagOfWords.encoder_id,
        "slots": SLOTS,
        "codewords": CODEWORDS,
        "width": WIDTH // SLOTS,
        "words": words,
        "rotation": rotation.digest,
        "lexicon": lexicon().digest if words else "",
        "salience": BagOfWords.salience_digest,
        "key_salt": SALT,
    }
    return Manifest(**{**fields, **changes})


def make_bank(where: Path, docs: Sequence[Doc], *, words: int = 24, **changes: object) -> Bank:
    rotation, codebook = pieces()
    bank = Bank.create(where, manifest(rotation, words, **changes), codebook)
    add_documents(bank, docs, "first")
    return bank


def add_documents(bank: Bank, docs: Sequence[Doc], ingest_id: str, codebook: Codebook | None = None) -> None:
    """What the pipeline does, for a few documents at once."""
    rotation, first = pieces()
    codebook = codebook or first
    encoder, chosen = BagOfWords(), lexicon()
    codes, rows, replay = [], [], []
    for doc in docs:
        moment = parse_timestamp(doc.timestamp)
        window = f"{doc.timestamp}T00:00:00Z" if doc.timestamp else "undated"
        shared = {"key": document_key(doc.doc_id, bytes.fromhex(SALT)), "event_time": moment}
        encoded = encoder.encode(split_passages(doc.text, encoder.count_pieces))
        packed = pack(
            quantize(to_slots(np.stack([one.embedding for one in encoded]), rotation, SLOTS), codebook.codewords)
        )
        for number, one in enumerate(encoded):
            words = choose_words(one.words, one.scores, bank.manifest.words, chosen)
            codes.append(
                shared
                | {"passage": number, "window": window, "address": packed[number].tobytes()}
                | {"words": chosen.pack(words.tolist()), "codebook_version": codebook.version}
            )
        digest = hashlib.sha256(doc.text.encode()).digest()[:16]
        rows.append(
            shared | {"doc_id": doc.doc_id, "title": f"About {doc.doc_id}", "uri": None}
            | {"content_hash": digest, "text_zstd": None}
        )  # fmt: skip
        if doc.question:
            replay.append(
                shared | {"question": doc.question, "answer": doc.answer, "window": window, "split": doc.split}
            )
    ledger = {
        "ingest_id": ingest_id, "slice": "0", "window": "2024-07-01T00:00:00Z", "pane": 0, "documents_in": len(docs),
        "documents": len(docs), "passages": len(codes), "duplicates": 0, "replaced": 0,
        "dead_letters": json.dumps({}), "codebook_version": codebook.version, "statistics": None,
    }  # fmt: skip
    tables = ((codes, CODES), (rows, DOCUMENTS), (replay, REPLAY), ([], DEAD_LETTER), ([ledger], LEDGER))
    commit_slice(bank, SliceRows(*(_table(*one) for one in tables)), ingest_id, "0")


def _table(rows: list[dict[str, object]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, pa.schema([one for one in schema if one.name != "added_at"]))
