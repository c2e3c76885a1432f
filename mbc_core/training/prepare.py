"""Everything the later trainings read, computed once: passages with scored words, embeddings, questions.

Writes three files into one folder; rows of ``passages.parquet`` and ``embeddings.safetensors`` stand in the same
order, and ``questions.parquet`` points at them by row number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from mbc_core.encoder import PassageEncoder
from mbc_core.training.data import TrainingPassage, cut_passages

PASSAGES = pa.schema(
    [
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("words", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)


def questions_schema(width: int) -> pa.Schema:
    """Schema of ``questions.parquet`` for embeddings of ``width`` numbers."""
    return pa.schema(
        [
            pa.field("question", pa.string(), nullable=False),
            pa.field("answers", pa.list_(pa.string()), nullable=False),
            pa.field("row", pa.int32(), nullable=False),
            pa.field("question_embedding", pa.list_(pa.float16(), width), nullable=False),
        ]
    )


def prepare(
    model_dir: Path,
    salience: Path | None,
    passages: Sequence[TrainingPassage],
    out_dir: Path,
    device: str = "cpu",
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Encode passages and questions and write ``passages.parquet``, ``embeddings.safetensors``, ``questions.parquet``.

    Passages longer than the encoder reads are cut, each question going to the part that answers it.

    Args:
        model_dir: the encoder's folder.
        salience: the head's file; None leaves ``words`` and ``scores`` empty.
        passages: as :func:`mbc_core.training.data.load_training_passages` gives them.
        out_dir: made when missing; files of an earlier run are replaced.
        device: torch device.
        log: told the counts.
        progress: called with the number of passages just encoded.

    Returns:
        Counts: ``passages``, ``questions``, ``cut`` (passages more than there were texts).

    Raises:
        ModelError, DamagedFile: see :meth:`mbc_core.encoder.PassageEncoder.load`.
    """
    encoder = PassageEncoder.load(model_dir, salience, device=device)
    parts = cut_passages(passages, encoder.count_pieces)
    encoded = encoder.encode([part.text for part in parts], progress)
    out_dir.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "passage_id": [part.passage_id for part in parts],
            "source": [part.source for part in parts],
            "text": [part.text for part in parts],
            "words": [list(one.words) for one in encoded],
            "scores": [one.scores for one in encoded],
            "split": [part.split for part in parts],
        },
        schema=PASSAGES,
    )
    pq.write_table(table, out_dir / "passages.parquet", compression="zstd")
    matrix = np.stack([one.embedding for one in encoded]).astype(np.float16)
    metadata = {"encoder": encoder.encoder_id, "salience": encoder.salience_digest}
    save_file({"embeddings": matrix}, out_dir / "embeddings.safetensors", metadata=metadata)
    questions = _write_questions(encoder, parts, out_dir / "questions.parquet")
    counts = {"passages": len(parts), "questions": questions, "cut": len(parts) - len(passages)}
    log(f"{counts['passages']:,} passages ({counts['cut']:,} of them by cutting), {questions:,} questions → {out_dir}")
    return counts


def _write_questions(encoder: PassageEncoder, parts: Sequence[TrainingPassage], path: Path) -> int:
    asked = [(question, list(answers), row) for row, part in enumerate(parts) for question, answers in part.questions]
    embeddings = encoder.encode_questions([question for question, _, _ in asked]).astype(np.float16)
    columns = {
        "question": [question for question, _, _ in asked],
        "answers": [answers for _, answers, _ in asked],
        "row": pa.array([row for _, _, row in asked], type=pa.int32()),
        "question_embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), encoder.width),
    }
    table = pa.table(columns, schema=questions_schema(encoder.width))
    pq.write_table(table, path, compression="zstd")
    return len(asked)
