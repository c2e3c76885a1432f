"""The reads that a training run of the attend read is measured by, on prepared sets, without a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Float32, Rotation
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.shuffled import shuffled_rows
from mbc_core.evaluation.table import format_row, measured_row
from mbc_core.reader.attend import AttendProjector
from mbc_core.reader.attend_prompt import answer_attend
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend_data import decoded
from mbc_core.training.prepared import Prepared
from schemas.results import EvalRow

Kind = Literal["closed", "attend", "attend-shuffled", "attend-right"]


@dataclass(frozen=True, slots=True)
class AttendRead:
    """One way to read: nothing, the passages found by code, those of another document each, or the right one."""

    kind: Kind
    k: int


QUICK_READS = (
    AttendRead("closed", 0),
    AttendRead("attend-shuffled", 1),
    AttendRead("attend", 1),
    AttendRead("attend", 5),
)
FULL_READS = (
    AttendRead("closed", 0),
    AttendRead("attend-shuffled", 1),
    AttendRead("attend-shuffled", 5),
    AttendRead("attend", 1),
    AttendRead("attend", 3),
    AttendRead("attend", 5),
    AttendRead("attend-right", 1),
)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Passages as their codes say them.

    Attributes:
        index: finds them.
        decoded: x̂, float32 [n, d].
    """

    index: AddressIndex
    decoded: Float32

    @classmethod
    def of(cls, index: AddressIndex, codebook: Codebook, rotation: Rotation) -> Vectors:
        """Decode the codes of an index."""
        return cls(index, decoded(index, codebook, rotation))


def read_prepared(
    language_model: LanguageModel,
    projector: AttendProjector,
    data: Prepared,
    vectors: Vectors,
    reads: Sequence[AttendRead],
    *,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[EvalRow]:
    """Answer questions of ``data`` in every way.

    Args:
        limit: at most so many questions, drawn by the seed.
        say: told each row when it is done.

    Raises:
        UsageError: there are no questions.
    """
    form = PromptFormat(language_model.tokenizer)
    total = len(data.questions)
    drawn = np.random.default_rng(seed).choice(total, min(limit or total, total), replace=False)
    asked = np.sort(drawn)
    deepest = max(1, *(read.k for read in reads))
    began = time.perf_counter()
    scores, found = vectors.index.nearest_scored(data.question_embeddings[asked], deepest)
    recall_ms = 1e3 * (time.perf_counter() - began) / len(asked)
    rows = []
    for read in reads:
        places = _places(read, found, data.rows[asked], len(data), seed)
        began = time.perf_counter()
        predictions, prompts = answer_attend(
            language_model,
            projector,
            form,
            [vectors.decoded[one] for one in places],
            [data.questions[one] for one in asked],
            data.question_embeddings[asked],
            # a shuffled passage has the say of the one it stands for
            [own[: len(shown)].tolist() for own, shown in zip(scores, places, strict=True)],
        )
        spent = 1e3 * (time.perf_counter() - began) / len(asked)
        rows.append(
            measured_row(
                read.kind,
                f"T={vectors.index.slots}",
                read.k,
                predictions,
                [data.answers[one] for one in asked],
                bytes_per_passage=float(vectors.index.bytes_per_passage) if read.k else 0.0,
                prompt_tokens=float(np.mean([len(one.ids) for one in prompts])),
                milliseconds=spent + (recall_ms if read.kind in ("attend", "attend-shuffled") else 0.0),
                seed=seed,
            )
        )
        say(format_row(rows[-1]))
    return rows


def _places(
    read: AttendRead, found: NDArray[np.int64], right: NDArray[np.int64], passages: int, seed: int
) -> list[NDArray[np.int64]]:
    """Rows of the passages that each question shows."""
    if read.kind == "closed":
        return [np.zeros(0, dtype=np.int64) for _ in right]
    if read.kind == "attend-right":
        return [np.array([one]) for one in right]
    chosen = found[:, : read.k]
    if read.kind == "attend-shuffled":
        others = shuffled_rows(chosen.tolist(), np.arange(passages), right, seed)
        return [np.array(one, dtype=np.int64) for one in others]
    return list(chosen)
