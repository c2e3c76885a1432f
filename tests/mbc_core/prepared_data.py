"""Prepared training data, as `mbc train prepare` writes it, of small towns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from tests.mbc_core.tiny_reader import WIDTH, BagOfWords, documents


def write_prepared(folder: Path, count: int = 24, *, questions: bool = True) -> Path:
    """``count`` passages; every fourth is held out; one question a passage."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder, docs = BagOfWords(), documents(count)
    encoded = encoder.encode([one.text for one in docs])
    table = pa.table(
        {
            "passage_id": [one.doc_id for one in docs],
            "source": ["towns" if number % 3 else "others" for number in range(count)],
            "text": [one.text for one in docs],
            "words": [list(one.words) for one in encoded],
            "scores": pa.array([one.scores.tolist() for one in encoded], pa.list_(pa.float32())),
            "split": ["dev" if one.split == "heldout" else "train" for one in docs],
        }
    )
    pq.write_table(table, folder / "passages.parquet")
    save_file(
        {"embeddings": np.stack([one.embedding for one in encoded]).astype(np.float16)},
        folder / "embeddings.safetensors",
    )
    asked = docs if questions else []
    vectors = encoder.encode_questions([one.question for one in asked]).astype(np.float16)
    stored = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float16()), WIDTH)
    rows = pa.array(range(len(asked)), pa.int32())
    columns = {"question": [one.question for one in asked], "answers": [[one.answer, "x"] for one in asked]}
    types = {"question": pa.string(), "answers": pa.list_(pa.string())}
    pq.write_table(
        pa.table(
            {
                **{name: pa.array(columns[name], types[name]) for name in types},
                "row": rows,
                "question_embedding": stored,
            }
        ),
        folder / "questions.parquet",
    )
    return folder
