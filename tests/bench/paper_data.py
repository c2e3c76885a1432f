"""The data step of :mod:`tests.bench.bench_paper`: QA files → prepared sets, and what a bank of them stores. CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from mbc_core.codes import code_size
from mbc_core.evaluation.methods import document_of
from mbc_core.evaluation.qa_file import QaSet, load_qa
from mbc_core.training.data import TrainingPassage
from mbc_core.training.prepare import PASSAGES, prepare, questions_schema
from mbc_core.training.prepared import Prepared, load_prepared

MOST_DOCUMENTS = 1_665
"""The paper's test streams: so many unique documents in file order, with all their questions."""

STORED_FILE = "stored.json"
Say = Callable[[str], None]


def make_set(
    file: Path, only: Mapping[str, frozenset[str]] | None, out: Path, models: tuple[Path, Path], say: Say
) -> None:
    """Prepare the first 1,665 documents of a QA file with all their questions, repeated ones too.

    Args:
        models: folder of the encoder, file of the salience head.
    """
    qa = load_qa(file, only).first_documents(MOST_DOCUMENTS)
    say(f"{out.name}: {len(qa.documents):,} documents, {len(qa.questions):,} question rows")
    prepare(models[0], models[1], passages_of(qa), out, log=say)
    (out / STORED_FILE).write_text(json.dumps(stored_bytes(qa, say)) + "\n")


def passages_of(qa: QaSet) -> list[TrainingPassage]:
    """Documents in order, each with its questions."""
    asked: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in qa.documents]
    for one in qa.questions:
        asked[one.document].append((one.question, one.answers))
    return [
        TrainingPassage(document.doc_id, document.doc_id.split(":")[0], document.text, tuple(questions), "dev")
        for document, questions in zip(qa.documents, asked, strict=True)
    ]


def stored_bytes(qa: QaSet, say: Say) -> dict[str, float]:
    """T → bytes a passage of the tables `codes` and `documents` in a bank of the set.

    T = 12 is measured, in a bank of the profile `paper`; no profile keeps 24 codes and no words, so T = 24 is the same
    with the longer address column.
    """
    from mbc_core.bank import Bank
    from pipelines.evaluate import PipelineBanks

    with tempfile.TemporaryDirectory(prefix="mbc-paper-") as folder:
        PipelineBanks(Path(folder), say=say).add("paper", "paper", qa.documents)
        each = Bank.open(str(Path(folder) / "paper")).inspect()["bytes_per_passage"]["all_in"]
    return {"12": each, "24": each + code_size(24) - code_size(12)}


def sample_documents(data: Prepared, count: int, seed: int, *, asked: bool) -> Prepared:
    """``count`` documents drawn by the seed, in a drawn order, each with all its passages.

    Args:
        asked: only documents that a question is about.
    """
    names = np.array([document_of(one) for one in data.table["passage_id"].to_pylist()], dtype=object)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    known = {names[row] for row in data.rows} if asked else set(rows)
    candidates = [name for name in rows if name in known]
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:count]
    return data.take(np.array([row for place in chosen for row in rows[candidates[place]]], dtype=np.int64))


def without_texts(data: Prepared, texts: set[str]) -> Prepared:
    """The passages whose text is none of ``texts``."""
    kept = [row for row, text in enumerate(data.table["text"].to_pylist()) if text not in texts]
    return data.take(np.array(kept, dtype=np.int64))


def write_prepared(folder: Path, data: Prepared) -> None:
    """What :func:`mbc_core.training.prepared.load_prepared` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(data.table.cast(PASSAGES), folder / "passages.parquet", compression="zstd")
    save_file({"embeddings": data.embeddings.astype(np.float16)}, folder / "embeddings.safetensors")
    width = data.embeddings.shape[1]
    flat = pa.array(data.question_embeddings.astype(np.float16).ravel())
    columns = {
        "question": data.questions,
        "answers": data.answers,
        "row": pa.array(data.rows, type=pa.int32()),
        "question_embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    pq.write_table(pa.table(columns, schema=questions_schema(width)), folder / "questions.parquet", compression="zstd")


def make_samples(train: Path, out: Path, held_out: int, strangers: int, say: Say) -> None:
    """``heldout`` (documents to choose learning rates on) and ``strangers`` (the shuffled bank) from training data."""
    data = load_prepared(train)
    known = {text for one in ("squad", "archivalqa") for text in load_prepared(out / one).table["text"].to_pylist()}
    chosen = sample_documents(data.split("dev"), held_out, 0, asked=True)
    write_prepared(out / "heldout", chosen)
    say(f"heldout: {len(chosen):,} passages, {len(chosen.questions):,} questions")
    known |= set(chosen.table["text"].to_pylist())
    others = sample_documents(without_texts(data.split("train"), known), strangers, 1, asked=False)
    write_prepared(out / "strangers", others)
    say(f"strangers: {len(others):,} passages")
