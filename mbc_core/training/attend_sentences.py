"""Sentences of the training passages as passages of their own.

A projector has to learn what words lie behind a vector, for any topic; tens of thousands of passages are few for that.
Their sentences are other texts with other vectors and fewer words each, at the cost of encoding them.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mbc_core.evaluation.cloze import sentences_of
from mbc_core.training.attend_dictionary import TextEmbedder
from mbc_core.training.prepared import Prepared
from mbc_core.words import split_words

_FEWEST_WORDS = 6


def sentence_passages(
    data: Prepared, encoder: TextEmbedder, each: int, seed: int = 0
) -> tuple[Prepared, NDArray[np.int64]]:
    """At most ``each`` sentences of every passage, drawn by the seed; a passage of one sentence gives none.

    Words keep the salience that they have in the passage.

    Returns:
        passages of the split ``train`` without questions, and int64 [n], the row of the passage each is from.
    """
    rng = np.random.default_rng([seed, 11])
    texts, owners = [], []
    for row, text in enumerate(data.table["text"].to_pylist()):
        found = [one for one in sentences_of(text) if len(one.split()) >= _FEWEST_WORDS]
        if len(found) < 2:
            continue
        for place in np.sort(rng.permutation(len(found))[:each]).tolist():
            texts.append(found[place])
            owners.append(row)
    words = [[word.text for word in split_words(text)] for text in texts]
    scores = _scores(data, owners, words)
    rows = pa.array(owners, pa.int64())
    table = pa.table(
        {
            "passage_id": [f"sentence/{number}" for number in range(len(texts))],
            "source": data.table["source"].take(rows),
            "text": pa.array(texts, pa.string()),
            "words": pa.array(words, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float32())),
            "split": ["train"] * len(texts),
        }
    ).cast(data.table.schema)
    width = data.embeddings.shape[1]
    embeddings = encoder.encode_questions(texts) if texts else np.zeros((0, width), np.float32)
    nothing = np.zeros(0, dtype=np.int64)
    made = Prepared(table, embeddings, [], [], nothing, np.zeros((0, width), np.float32))
    return made, np.array(owners, dtype=np.int64)


def _scores(data: Prepared, owners: list[int], words: list[list[str]]) -> list[list[float]]:
    """Salience of each word in the passage that it comes from; 0 for one that is not among its words."""
    kept, given = data.table["words"].to_pylist(), data.table["scores"].to_pylist()
    scores: list[list[float]] = []
    known: dict[str, float] = {}
    before = -1
    for row, said in zip(owners, words, strict=True):
        if row != before:
            known = dict(zip(kept[row], given[row], strict=True))
            before = row
        scores.append([known.get(word, 0.0) for word in said])
    return scores
