"""A tiny deterministic encoder with the real one's interface, and a bank's other pieces to fit it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mbc_core.codebook.files import Codebook
from mbc_core.codebook.update import UpdateRule
from mbc_core.codes import Rotation
from mbc_core.encoder import EncodedPassage
from mbc_core.lexicon import Lexicon
from mbc_core.words import split_words
from pipelines.encoding import LoadedEncoder
from pipelines.options import IngestSettings
from schemas.document import Document

WIDTH = 48
SLOTS = 24
CODEWORDS = 16
RULE = UpdateRule(tau=20_000.0, min_vectors=40 * SLOTS, growth=0.0, judged=False)
"""A version every 40 passages, so that small tests see several; too few to judge, so its words always move."""

POISON = "POISON"


class TinyEncoder:
    """Sums a fixed random vector a word; refuses texts that hold ``POISON``."""

    encoder_id = "tiny@000000000000/float32/words-12"
    salience_digest = "tiny-head"
    width = WIDTH

    def count_pieces(self, text):
        return 20 * len(text.split())  # passages of at most 12 words

    def encode_questions(self, questions):
        return np.stack([self.encode([one])[0].embedding for one in questions])

    def encode(self, texts, progress=None):
        found = []
        for text in texts:
            if POISON in text:
                raise ValueError(f"cannot encode {text[:20]!r}")
            words = tuple(word.text for word in split_words(text))
            total = sum((_vector(word) for word in words), np.zeros(WIDTH)) + 1e-3
            scores = np.array([_hash(word)[0] for word in words], np.float32)
            found.append(EncodedPassage((total / np.linalg.norm(total)).astype(np.float32), words, scores))
            if progress is not None:
                progress(1)
        return found


@dataclass(frozen=True)
class TinySpec:
    """Loads the tiny encoder; importable, so that worker processes can unpickle it."""

    name: str = "tiny"

    def load(self):
        return LoadedEncoder(TinyEncoder(), Lexicon([]))


def _hash(word):
    return hashlib.blake2b(word.encode(), digest_size=WIDTH).digest()


def _vector(word):
    return np.frombuffer(_hash(word), np.int8).astype(np.float64)


def codebook() -> Codebook:
    words = np.random.default_rng(7).standard_normal((CODEWORDS, WIDTH // SLOTS)).astype(np.float32) * 0.2
    return Codebook.first(words, np.full(CODEWORDS, RULE.tau / CODEWORDS))


def rotation() -> Rotation:
    return Rotation.random(WIDTH, 3)


def settings(folder: Path, **changes) -> IngestSettings:
    """Settings for a bank of the tiny encoder; its files are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rotation.safetensors").exists():
        rotation().save(folder / "rotation.safetensors")
        (folder / "codebook.safetensors").write_bytes(codebook().to_bytes())
    plain = IngestSettings(
        encoder=TinySpec(),
        rotation=str(folder / "rotation.safetensors"),
        codebook=str(folder / "codebook.safetensors"),
        update_rule=RULE,
        staging=folder / "staging",
        replay_per_window=8,
    )
    return replace(plain, **changes)


def corpus(count: int, start: int = 0) -> list[Document]:
    """Documents whose words drift from day to day; every seventh has no date."""
    found = []
    for number in range(start, start + count):
        draw = np.random.default_rng(number)
        day = number // 17
        words = [f"Word{int(one)}" for one in draw.integers(day * 20, day * 20 + 60, size=draw.integers(5, 40))]
        text = " ".join(words[:9]) + ". " + " ".join(words[9:]) + "."
        time = None if number % 7 == 0 else (day * 86_400 + int(draw.integers(0, 86_400))) * 1_000_000
        found.append(Document(f"doc-{number}", text, title=f"Title {number}", event_time=time))
    return found


def to_line(document: Document) -> bytes:
    time = None if document.event_time is None else np.datetime64(document.event_time, "us").item().isoformat()
    qa = [{"question": q, "answer": a} for q, a in document.qa] or None
    fields = {"id": document.doc_id, "text": document.text, "title": document.title, "timestamp": time, "qa": qa}
    return json.dumps(fields).encode() + b"\n"


def write_corpus(path: Path, documents) -> str:
    path.write_bytes(b"".join(to_line(one) for one in documents))
    return str(path)
