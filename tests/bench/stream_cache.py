"""Streams of embedded passages for the learning benchmark: encoded once, kept in a file outside the repository.

A stream is passages in the order of their time, each with its embedding, and a cloze question about every passage
that offers one. What is measured afterwards needs neither texts nor the encoder.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mbc_core.corpus import demo_documents, load_articles
from mbc_core.evaluation.cloze import make_cloze
from mbc_core.evaluation.learning import Stream
from mbc_core.passages import split_passages
from pipelines.encoding import Encoder
from schemas.document import document_key
from tests.bench.memo_encoder import MemoEncoder

_SALT = bytes(16)
_AT_ONCE = 256


_NAMES = ("embeddings", "keys", "passages", "questions", "rows")


def save(stream: Stream, path: Path) -> None:
    """Write a stream's arrays to a cache file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({name: getattr(stream, name) for name in _NAMES}, partial)
    partial.replace(path)


def load(path: Path) -> Stream:
    """Read a cache file."""
    return Stream(**{name: array for name, array in load_file(path).items() if name in _NAMES})


Text = tuple[str, str]
"""(document id, text)."""


def wikipedia(articles_file: Path) -> Iterator[Text]:
    """The demo corpus: 10,033 lead sections, topic after topic."""
    for one in demo_documents(load_articles(articles_file)):
        yield one["id"], one["text"]


def dated(path: Path, one_in: int) -> Iterator[Text]:
    """Every ``one_in``-th document, by date, of JSON Lines with ``doc_id``, ``timestamp`` and ``text``."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = sorted((row["timestamp"], row.get("doc_id") or row["id"], row["text"]) for row in rows)
    for _, doc_id, text in found[::one_in]:
        yield doc_id, text


def encode(texts: Iterable[Text], encoder: MemoEncoder) -> Stream:
    """Split, embed, and ask one cloze question about every passage that offers one."""
    cut = [
        (document_key(doc_id, _SALT), number, passage)
        for doc_id, text in texts
        for number, passage in enumerate(split_passages(text, encoder.count_pieces))
    ]
    order = sorted(range(len(cut)), key=lambda place: len(cut[place][2]))  # like lengths together: little is padded
    embeddings = np.zeros((len(cut), encoder.width), np.float32)
    asked: dict[int, str] = {}
    began = time.monotonic()
    for start in range(0, len(order), _AT_ONCE):
        places = order[start : start + _AT_ONCE]
        for place, found in zip(places, encoder.encode([cut[place][2] for place in places]), strict=True):
            embeddings[place] = found.embedding
            if made := make_cloze(cut[place][2], found.words, found.scores, seed=0):
                asked[place] = made[0]
        done = start + len(places)
        print(f"{done} of {len(cut)} passages, {done / (time.monotonic() - began):.1f} a second", file=sys.stderr)
    rows = sorted(asked)
    return Stream(
        embeddings,
        np.array([one[0] for one in cut], np.int64),
        np.array([one[1] for one in cut], np.int32),
        _encode_questions([asked[row] for row in rows], encoder),
        np.array(rows, np.int64),
    )


def cached(folder: Path, name: str, texts: Callable[[], Iterable[Text]], load_encoder: Callable[[], Encoder]) -> Stream:
    """The stream ``name`` from its cache file in ``folder``; encoded first when there is none.

    The encodings themselves stay in ``<name>.memo.parquet``, for benchmarks that need words too.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        encoder = MemoEncoder(load_encoder(), folder / f"{name}.memo.parquet")
        stream = encode(texts(), encoder)
        encoder.save()
        save(stream, path)
    return load(path)


def _encode_questions(questions: Sequence[str], encoder: MemoEncoder) -> NDArray[np.float32]:
    order = sorted(range(len(questions)), key=lambda place: len(questions[place]))
    found = np.zeros((len(questions), encoder.width), np.float32)
    for start in range(0, len(order), _AT_ONCE):
        places = order[start : start + _AT_ONCE]
        found[places] = encoder.encode_questions([questions[place] for place in places])
    return found
