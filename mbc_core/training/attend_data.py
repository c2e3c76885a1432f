"""What ``mbc train attend`` learns from: samples, and tables on the device that their batches point into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from mbc_core.training.attend_dictionary import Dictionary, TextEmbedder
from mbc_core.training.attend_loop import AttendTables
from mbc_core.training.attend_naming import NamingTables
from mbc_core.training.attend_samples import AttendSource
from mbc_core.training.prepared import Prepared
from mbc_core.training.samples import Mixture, build_source, cloze_questions, distractors

_SEARCHED = 25


@dataclass(frozen=True, eq=False)
class AttendData:
    """Tables on the device, and the source whose batches point into them."""

    source: AttendSource
    tables: AttendTables
    naming: NamingTables


@dataclass(frozen=True, slots=True)
class Shown:
    """How samples are shown: soft tokens a passage, how often each of its vectors, and see :class:`AttendSource`."""

    soft_tokens: int
    variants: tuple[float, ...]
    pad_id: int
    as_found: float = 0.0


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
    shown: Shown,
    dictionary: Dictionary,
    *,
    encoder: TextEmbedder | None,
    folds: NDArray[np.int64] | None = None,
    cloze_each: int = 2,
    seed: int = 0,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> AttendData:
    """Search neighbours, make cloze questions, tokenise, and lay everything out.

    Args:
        encoder: embeds the cloze questions; without one there are none.
        folds: int64 [passages], 0 or 1; None: nothing is trained on these passages.
        cloze_each: cloze questions made of a passage, at most.

    Raises:
        UsageError: there is nothing to train on.
    """
    indices = [
        AddressIndex(data.embeddings, rotation, one.codewords, rotation.width // one.width, device) for one in codebooks
    ]
    others, ranks = distractors(data.rows, indices[0].nearest(data.question_embeddings, _SEARCHED))
    passage_others, _ = distractors(np.arange(len(data)), indices[0].nearest(data.embeddings, _SEARCHED))
    say("found the neighbours by code")
    cloze = cloze_questions(data, cloze_each, seed) if mixture.cloze > 0 and encoder is not None else []
    samples = build_source(
        data, lexicon, form, others, ranks, passage_others, mixture=mixture, cloze=cloze, seed=seed, say=say
    )
    asked = [data.question_embeddings]
    words, answers = dictionary.targets(data)
    if cloze and encoder is not None:
        asked.append(encoder.encode_questions([question for question, _, _ in cloze]))
        answers = torch.cat([answers, dictionary.answer_targets([answer for _, answer, _ in cloze])])
        say(f"embedded {len(cloze):,} cloze questions")
    vectors = [decoded(index, one, rotation) for index, one in zip(indices, codebooks, strict=True)]
    stacked = torch.from_numpy(np.stack([*vectors, data.embeddings]).astype(np.float16)).to(device)
    questions = torch.from_numpy(np.concatenate(asked).astype(np.float16)).to(device)
    halves = torch.from_numpy(np.zeros(len(data), np.int64) if folds is None else folds).to(device)
    rows = torch.from_numpy(samples.rows).to(device)
    return AttendData(
        AttendSource(samples, shown.soft_tokens, shown.variants, shown.pad_id, shown.as_found),
        AttendTables(stacked, questions, halves, folds is None),
        NamingTables(stacked, questions, words.to(device), answers.to(device), rows, halves),
    )


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
