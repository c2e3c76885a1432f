"""A small scored set made from the documents themselves: seeded cloze questions, read in three ways.

It shows on any documents, without labels, what the bank keeps: recalled word codes beside the closed book (the same
adapter, memory off) and beside the full text of the same recalled passages.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mbc_core.errors import UsageError
from mbc_core.evaluation.cloze import make_cloze
from mbc_core.evaluation.table import format_row, measured_row
from mbc_core.passages import split_passages
from schemas.document import document_key
from schemas.results import EvalRow

if TYPE_CHECKING:
    from mbc_core.answering import Reader
    from mbc_core.encoder import PassageEncoder
    from mbc_core.memory import Recalled

COUNT = 40
_SEED = "scored"


@dataclass(frozen=True, slots=True)
class ScoredQuestion:
    """A cloze question about one document."""

    question: str
    answer: str
    doc_id: str
    title: str | None


@dataclass(frozen=True, slots=True)
class Document:
    """What the scored set needs of a document."""

    doc_id: str
    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """The questions with what each way of reading answered."""

    questions: tuple[ScoredQuestion, ...]
    predictions: dict[str, tuple[str, ...]]
    rows: tuple[EvalRow, ...]


def held_out_first(reader: Reader, doc_ids: Sequence[str]) -> list[str]:
    """Documents whose replay questions no adapter is trained on come first, in the given order within each part."""
    bank = reader.bank
    trained = {row["key"] for row in bank.replay().select(["key", "split"]).to_pylist() if row["split"] == "train"}
    keys = [document_key(doc_id, bank.manifest.salt) for doc_id in doc_ids]
    return [
        doc_id
        for wanted in (False, True)
        for doc_id, key in zip(doc_ids, keys, strict=True)
        if (key in trained) is wanted
    ]


def scored_questions(
    documents: Sequence[Document], encoder: PassageEncoder, *, count: int = COUNT, seed: int = 0
) -> list[ScoredQuestion]:
    """The first ``count`` documents that offer a cloze question, each asked about one passage chosen by the seed.

    Args:
        documents: in order of preference (see :func:`held_out_first`).
        encoder: says which words are salient.

    Returns:
        at most ``count`` questions; fewer when there are fewer documents.
    """
    made: list[ScoredQuestion] = []
    for start in range(0, len(documents), count):
        if len(made) >= count:
            break
        chunk = documents[start : start + count]
        passages = [_one_passage(one, encoder, seed) for one in chunk]
        for document, passage, encoded in zip(chunk, passages, encoder.encode(passages), strict=True):
            cloze = make_cloze(passage, encoded.words, encoded.scores, f"{_SEED}/{seed}")
            if cloze is not None and len(made) < count:
                made.append(ScoredQuestion(*cloze, document.doc_id, document.title))
    return made


def score_reads(
    reader: Reader,
    questions: Sequence[ScoredQuestion],
    texts: Mapping[str, str],
    count_pieces: Callable[[str], int],
    *,
    k: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Scored:
    """Answer every question by recall, closed book and the full text of the recalled passages.

    Args:
        texts: doc_id → text of at least the documents that are recalled.
        count_pieces: the encoder's, which cut the texts into passages.

    Raises:
        UsageError: there are no questions, or a recalled document's text is not given.
    """
    if not questions:
        raise UsageError("there are no questions to score", value=0, fix="give documents of some length")
    asked = [one.question for one in questions]
    began = time.perf_counter()
    found = reader.memory.recall(asked, k)
    recall_ms = 1e3 * (time.perf_counter() - began) / len(asked)
    memories: dict[str, list[list[str]]] = {
        "recall": [[one.words for one in line] for line in found],
        "closed": [[] for _ in asked],
        "text": _texts(found, texts, count_pieces),
    }
    text_bytes = float(np.mean([len(text.encode()) for line in memories["text"] for text in line]))
    sizes = {"recall": reader.memory.payload_bytes, "closed": 0.0, "text": text_bytes}
    predictions: dict[str, tuple[str, ...]] = {}
    rows = []
    for read, memory in memories.items():
        began = time.perf_counter()
        predictions[read] = tuple(reader.answer(memory, asked))
        spent = 1e3 * (time.perf_counter() - began) / len(asked)
        rows.append(
            measured_row(
                read,
                reader.bank.manifest.profile if read == "recall" else "-",
                0 if read == "closed" else k,
                predictions[read],
                [[one.answer] for one in questions],
                bytes_per_passage=sizes[read],
                prompt_tokens=float(np.mean(reader.prompt_tokens(memory, asked))),
                milliseconds=spent + (recall_ms if read != "closed" else 0.0),
                seed=seed,
            )
        )
        say(format_row(rows[-1]))
    return Scored(tuple(questions), predictions, tuple(rows))


def _one_passage(document: Document, encoder: PassageEncoder, seed: int) -> str:
    passages = split_passages(document.text, encoder.count_pieces)
    told = hashlib.blake2b(f"{seed}\x00{document.doc_id}".encode(), digest_size=8).digest()
    return passages[int.from_bytes(told, "little") % len(passages)]


def _texts(
    found: Sequence[Sequence[Recalled]], texts: Mapping[str, str], count_pieces: Callable[[str], int]
) -> list[list[str]]:
    cut: dict[str, list[str]] = {}
    for one in {one.doc_id: one for line in found for one in line}.values():
        if one.doc_id not in texts:
            raise UsageError(
                "the text of a recalled document is not given",
                value=one.doc_id,
                cause="the bank holds documents beyond those given",
                fix="give the texts of all of the bank's documents",
            )
        cut[one.doc_id] = split_passages(texts[one.doc_id], count_pieces)
    return [[cut[one.doc_id][one.passage] for one in line] for line in found]
