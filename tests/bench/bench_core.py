"""Speed of the core's steps on this machine: `make bench`. Prints figures; asserts only that the work was done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, pack, quantize, to_slots
from mbc_core.corpus import demo_documents, load_articles
from mbc_core.encoder import PassageEncoder
from mbc_core.recall import RecallIndex

SLOTS, CODEWORDS, WIDTH = 24, 512, 384
ROWS = 200_000


@contextmanager
def timed(what: str, amount: int, unit: str) -> Iterator[None]:
    """Print how long the block took and how much of ``amount`` it did a second."""
    began = time.perf_counter()
    yield
    spent = time.perf_counter() - began
    print(f"\n{what}: {amount:,} {unit} in {spent:.2f} s, {amount / spent:,.0f} a second", end="")


@pytest.fixture(scope="module")
def encoder(assets) -> PassageEncoder:
    return PassageEncoder.load(assets.minilm, None)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Unit vectors around 2,000 centres: real passages cluster, and clusters are what makes search hard."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2_000, WIDTH))
    found = centres[rng.integers(0, 2_000, ROWS)] + 0.7 * rng.standard_normal((ROWS, WIDTH))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_encode(assets, encoder):
    texts = [one["text"] for one in demo_documents(load_articles(assets.wiki), count=256)]
    short = [text for text in texts if encoder.count_pieces(text) <= 250]
    encoder.encode(short[:32])
    with timed(f"encode ({encoder.precision})", len(short), "passages"):
        assert len(encoder.encode(short)) == len(short)


def test_quantize_pack_and_search(vectors):
    rotation = Rotation.random(WIDTH, 0)
    rng = np.random.default_rng(1)
    slots = to_slots(vectors, rotation, SLOTS)
    book = Codebook.first(slots[rng.integers(0, ROWS, CODEWORDS), 3], np.ones(CODEWORDS))
    with timed("quantize", 20_000, "passages"):
        codes = quantize(slots[:20_000], book.codewords)
    with timed("pack", 20_000, "passages"):
        packed = pack(codes)
    many = np.tile(packed, (ROWS // 20_000, 1))
    with timed("index", ROWS, "passages"):
        index = RecallIndex.build([(book, many, np.arange(ROWS, dtype=np.int64))], rotation, SLOTS)
    questions = vectors[:64]
    index.search(questions[:2], 5)
    with timed(f"search among {ROWS:,}", len(questions), "questions"):
        scores, rows = index.search(questions, 5)
    assert scores.shape == rows.shape == (64, 5)
