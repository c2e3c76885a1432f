"""What ``mbc train attend`` learns from, as tables on the device: passage vectors, question vectors, words, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Float32, Rotation
from mbc_core.errors import DamagedFile
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.lexicon import Lexicon
from mbc_core.reader.attend import passage_vectors
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.attend_loop import AttendTables
from mbc_core.training.attend_samples import AttendSource, padded_table
from mbc_core.training.prepared import Prepared
from mbc_core.training.samples import Mixture, build_source, cloze_questions, distractors

_SEARCHED = 25
_WORD_TOKENS = 40
_ANSWER_TOKENS = 8


class QuestionEncoder(Protocol):
    """What is needed of an encoder."""

    def encode_questions(self, questions: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, d], unit norm."""


@dataclass(frozen=True, eq=False)
class AttendData:
    """Tables on the device, and the source whose batches point into them."""

    source: AttendSource
    tables: AttendTables


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Prepared sets one after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(one) for one in parts[:-1])])
    columns = parts[0].table.column_names
    return Prepared(
        pa.concat_tables([one.table.select(columns) for one in parts]).combine_chunks(),
        np.concatenate([one.embeddings for one in parts]),
        [question for one in parts for question in one.questions],
        [answers for one in parts for answers in one.answers],
        np.concatenate([one.rows + start for one, start in zip(parts, starts, strict=True)]),
        np.concatenate([one.question_embeddings for one in parts]),
    )


def attend_source(
    data: Prepared,
    lexicon: Lexicon,
    form: PromptFormat,
    codebooks: Sequence[Codebook],
    rotation: Rotation,
    mixture: Mixture,
    soft_tokens: int,
    variants: tuple[float, ...],
    pad_id: int,
    *,
    encoder: QuestionEncoder | None,
    needs_vectors: bool,
    as_found: float = 0.0,
    cloze_each: int = 2,
    seed: int,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> AttendData:
    """Search neighbours, make cloze questions, tokenise, and lay everything out.

    Args:
        cloze_each: cloze questions made of a passage, at most.
        as_found: see :class:`AttendSource`.
        needs_vectors: whether a question without an embedding is of no use; cloze questions then need ``encoder``.

    Raises:
        UsageError: there is nothing to train on.
    """
    indices = [
        AddressIndex(data.embeddings, rotation, one.codewords, rotation.width // one.width, device) for one in codebooks
    ]
    others, ranks = distractors(data.rows, indices[0].nearest(data.question_embeddings, _SEARCHED))
    passage_others, _ = distractors(np.arange(len(data)), indices[0].nearest(data.embeddings, _SEARCHED))
    say("found the neighbours by code")
    with_cloze = mixture.cloze > 0 and (encoder is not None or not needs_vectors)
    cloze = cloze_questions(data, cloze_each, seed) if with_cloze else []
    samples = build_source(
        data, lexicon, form, others, ranks, passage_others, mixture=mixture, cloze=cloze, seed=seed, say=say
    )
    asked = [data.question_embeddings]
    if cloze:
        empty = np.zeros((len(cloze), rotation.width), np.float32)
        asked.append(encoder.encode_questions([one[0] for one in cloze]) if encoder is not None else empty)
        say(f"embedded {len(cloze):,} cloze questions" if encoder is not None else "cloze questions without embeddings")
    source = AttendSource(samples, soft_tokens, variants, pad_id, as_found)
    vectors = [decoded(index, one, rotation) for index, one in zip(indices, codebooks, strict=True)]
    tables = AttendTables(
        torch.from_numpy(np.stack([*vectors, data.embeddings]).astype(np.float16)),
        torch.from_numpy(np.concatenate(asked).astype(np.float16)),
        torch.from_numpy(padded_table(samples.words, _WORD_TOKENS)),
        torch.from_numpy(_answers(padded_table(samples.answers, _ANSWER_TOKENS), form.end[-1])),
    )
    return AttendData(source, tables.to(device))


def _answers(table: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """Without the end of text, which no soft token has to name."""
    return np.where(table == end, -1, table)


def encoder_of(prepared: Path) -> str:
    """Id of the encoder that a prepared folder's embeddings were made with; empty when the file does not say.

    Raises:
        DamagedFile: it cannot be read.
    """
    try:
        with safe_open(prepared / "embeddings.safetensors", "np") as file:
            return str((file.metadata() or {}).get("encoder", ""))
    except (OSError, SafetensorError) as error:
        raise DamagedFile(
            "the prepared embeddings cannot be read",
            value=str(prepared),
            cause=f"{type(error).__name__}: {error}",
            fix="run `mbc train prepare` again",
        ) from error


def decoded(index: AddressIndex, codebook: Codebook, rotation: Rotation) -> Float32:
    """x̂ of every passage of an index, float32 [n, d]."""
    return passage_vectors(index.codes(), codebook.codewords, rotation)
