"""Everything that `mbc train paper` shows a model, tokenised once and kept in one file.

Passages and questions for the sentence encoder, prompts and answers for the language model, the passages' address
codes: all flat arrays, so a step is a few gathers on the device and the accelerator never waits for a tokenizer.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation, quantize, to_slots
from mbc_core.encoder import PassageEncoder
from mbc_core.errors import DamagedFile, UsageError
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Int64, Ragged
from mbc_core.training.data import TrainingPassage, cut_passages
from mbc_core.training.prepared import Prepared

FORMAT = "mbc-paper-data/1"
_METADATA = "mbc"
_LISTS = ("passages", "asked", "prompts", "answers", "cues", "words")
_WORDS, _WORD_TOKENS = 8, 16


@dataclass(frozen=True, eq=False)
class PaperData:
    """Passages and their questions as tokens.

    Attributes:
        passages, asked: the encoder's tokens of each passage and question, special tokens included.
        prompts, answers: the language model's tokens of each question as it is asked, and of its first answer.
        cues, words: for learning to read codes at all: each question asking for the words of its passage, and each
            passage's most salient words in text order, ended; empty lists where no words are known.
        rows: int64 [Q], the passage that answers each question.
        held_out: bool [N], passages that are never trained on.
        codes: T → uint16 [N, T], the passages' address codes.
        questions, accepted: texts, for measuring: each question and its accepted answers.
        told: where all this comes from: passages of each source, digests of encoder, rotation and codebooks.
    """

    passages: Ragged
    asked: Ragged
    prompts: Ragged
    answers: Ragged
    cues: Ragged
    words: Ragged
    rows: Int64
    held_out: NDArray[np.bool_]
    codes: Mapping[int, NDArray[np.uint16]]
    questions: Sequence[str]
    accepted: Sequence[Sequence[str]]
    told: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.passages.lengths)

    def embed_questions(self, encoder: PassageEncoder) -> NDArray[np.float32]:
        """Embeddings of the questions, float32 [Q, d], unit norm, as a bank's reader computes them."""
        found = np.zeros((len(self.rows), encoder.width), dtype=np.float32)
        for ran in encoder.hidden_states(as_lists(self.asked), ()):
            found[list(ran.batch.places)] = ran.embeddings[: len(ran.batch.places)].cpu().numpy()
        return found

    def save(self, path: Path) -> None:
        """Write one safetensors file; token ids take 16 bits where the vocabulary allows it."""
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {"rows": self.rows, "held_out": self.held_out}
        for name in _LISTS:
            held: Ragged = getattr(self, name)
            small = int(held.values.max(initial=0)) < 1 << 16
            tensors[f"{name}.values"] = held.values.astype(np.uint16 if small else np.int32)
            tensors[f"{name}.lengths"] = held.lengths.astype(np.int32)
        for slots, codes in self.codes.items():
            tensors[f"codes.{slots}"] = codes
        texts = json.dumps([list(self.questions), [list(one) for one in self.accepted]], ensure_ascii=False)
        tensors["texts"] = np.frombuffer(zlib.compress(texts.encode("utf-8", "surrogatepass"), 9), dtype=np.uint8)
        metadata = {_METADATA: json.dumps({"format": FORMAT, "told": dict(self.told)}, sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.writing")
        staging.write_bytes(save(tensors, metadata=metadata))
        staging.replace(path)

    @classmethod
    def load(cls, path: Path) -> PaperData:
        """Read :meth:`save`.

        Raises:
            DamagedFile: it is not such a file, or its parts do not fit together.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as stored:
                told = json.loads((stored.metadata() or {})[_METADATA])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # not a dict
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']}, this release reads {FORMAT}")
            questions, accepted = json.loads(
                zlib.decompress(tensors["texts"].tobytes()).decode("utf-8", "surrogatepass")
            )
            lists = {name: _unpacked(tensors[f"{name}.values"], tensors[f"{name}.lengths"]) for name in _LISTS}
            codes = {int(name[6:]): one for name, one in tensors.items() if name.startswith("codes.")}
            rows = tensors["rows"].astype(np.int64)
            made = cls(**lists, rows=rows, held_out=tensors["held_out"].astype(bool), codes=codes,
                       questions=questions, accepted=accepted, told=told["told"])  # fmt: skip
            made._require_whole()
        except (OSError, KeyError, ValueError, TypeError, zlib.error, SafetensorError) as error:
            raise DamagedFile(
                "the tokens for training the paper's model cannot be read",
                value=str(path),
                cause=f"{type(error).__name__}: {error}",
                fix="make the file again with `mbc train paper-data`",
            ) from error
        return made

    def _require_whole(self) -> None:
        counts = {len(getattr(self, name).lengths) for name in ("asked", "prompts", "answers", "cues")}
        counts |= {len(self.rows), len(self.questions), len(self.accepted)}
        passages = {len(self), len(self.held_out), len(self.words.lengths), *(len(one) for one in self.codes.values())}
        if len(counts) != 1 or len(passages) != 1:
            raise ValueError(f"{sorted(counts)} questions, {sorted(passages)} passages")
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(self):
            raise ValueError(f"a question names passage {int(self.rows.max())} of {len(self)}")


def data_of_prepared(prepared: Prepared, encoder: PassageEncoder, form: PromptFormat, **pieces: Any) -> PaperData:  # noqa: ANN401
    """Tokens of what `mbc train prepare` wrote; its split ``dev`` is held out.

    Args:
        prepared: passages with embeddings, and questions.
        pieces: ``rotation`` and ``codebooks`` as in :func:`data_of_passages`.
    """
    asked: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in range(len(prepared))]
    for question, answers, row in zip(prepared.questions, prepared.answers, prepared.rows.tolist(), strict=True):
        asked[row].append((question, tuple(answers)))
    columns = zip(
        *(prepared.table[name].to_pylist() for name in ("passage_id", "source", "text", "split")), strict=True
    )
    passages = [
        TrainingPassage(name, source, text, tuple(own), split)
        for (name, source, text, split), own in zip(columns, asked, strict=True)
    ]
    scores = [np.array(one, dtype=np.float32) for one in prepared.table["scores"].to_pylist()]
    words = [_salient(*one) for one in zip(prepared.table["words"].to_pylist(), scores, strict=True)]
    return _tokenised(passages, prepared.embeddings, encoder, form, words=words, **pieces)


def data_of_passages(
    passages: Sequence[TrainingPassage],
    encoder: PassageEncoder,
    form: PromptFormat,
    *,
    rotation: Rotation | None = None,
    codebooks: Sequence[Codebook] = (),
    say: Callable[[str], None] = lambda line: None,
) -> PaperData:
    """Tokens of passages from QA files; long ones are cut as the encoder reads them.

    Args:
        rotation, codebooks: of the address codes, one codebook a T; without them there are none.

    Raises:
        UsageError: a codebook without a rotation, or no passages.
    """
    parts = cut_passages(passages, encoder.count_pieces)
    embeddings = None
    if codebooks:
        say(f"encoding {len(parts):,} passages for their address codes")
        embeddings = np.stack([one.embedding for one in encoder.encode([part.text for part in parts])])
    return _tokenised(parts, embeddings, encoder, form, rotation=rotation, codebooks=codebooks)


def as_lists(ragged: Ragged) -> list[list[int]]:
    """The lists again."""
    ends = ragged.starts + ragged.lengths
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.starts.tolist(), ends.tolist(), strict=True)]


def _tokenised(
    passages: Sequence[TrainingPassage],
    embeddings: NDArray[np.float32] | None,
    encoder: PassageEncoder,
    form: PromptFormat,
    *,
    rotation: Rotation | None = None,
    codebooks: Sequence[Codebook] = (),
    words: Sequence[str] | None = None,
) -> PaperData:
    if not passages:
        raise UsageError("there are no passages to train on", value=0, fix="give files with passages and questions")
    asked = [(question, answers, row) for row, one in enumerate(passages) for question, answers in one.questions]
    spelt = [f"Question: {' '.join(question.split())}\nAnswer:" for question, _, _ in asked]
    cued = [f"Question: {' '.join(question.split())}\nWords:" for question, _, _ in asked]
    kept = form.encode_many([" " + one for one in words]) if words is not None else [[] for _ in passages]
    answered = [" " + " ".join(answers[0].split()) for _, answers, _ in asked]
    codes = _address_codes(embeddings, rotation, codebooks)
    names, counts = np.unique([one.source for one in passages], return_counts=True)
    return PaperData(
        passages=Ragged.of([one.ids for one in encoder.tokenize([passage.text for passage in passages])]),
        asked=Ragged.of(encoder.question_tokens([question for question, _, _ in asked])),
        prompts=Ragged.of([[*form.start, *ids] for ids in form.encode_many(spelt)]),
        answers=Ragged.of([[*ids, *form.end] for ids in form.encode_many(answered)]),
        cues=Ragged.of([[*form.start, *ids] for ids in form.encode_many(cued)]),
        words=Ragged.of([[*ids[:_WORD_TOKENS], *form.end] if words is not None else [] for ids in kept]),
        rows=np.array([row for _, _, row in asked], dtype=np.int64),
        held_out=np.array([passage.split == "dev" for passage in passages]),
        codes=codes,
        questions=[question for question, _, _ in asked],
        accepted=[list(answers) for _, answers, _ in asked],
        told={
            "sources": dict(zip(names.tolist(), counts.tolist(), strict=True)),
            "encoder": encoder.digest,
            "rotation": rotation.digest if rotation is not None else "",
            "codebooks": {str(slots): one.digest for slots, one in zip(codes, codebooks, strict=True)},
        },
    )


def _salient(words: Sequence[str], scores: NDArray[np.float32]) -> str:
    """The words that score best, each once, in text order."""
    best: dict[str, int] = {}
    for place in np.argsort(-scores, kind="stable").tolist():
        best.setdefault(words[place].casefold(), place)
        if len(best) == _WORDS:
            break
    return " ".join(words[place] for place in sorted(best.values()))


def _address_codes(
    embeddings: NDArray[np.float32] | None, rotation: Rotation | None, codebooks: Sequence[Codebook]
) -> dict[int, NDArray[np.uint16]]:
    """T → codes [N, T] of each codebook, in their order."""
    if not codebooks:
        return {}
    if rotation is None or embeddings is None:
        raise UsageError(
            "address codes need the rotation", value="a codebook alone", fix="name the codebook's rotation too"
        )
    made = {}
    for codebook in codebooks:
        slots = rotation.width // codebook.width
        made[slots] = quantize(to_slots(embeddings, rotation, slots), codebook.codewords)
    return made


def _unpacked(values: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
    wide = lengths.astype(np.int64)
    if wide.sum() != len(values) or (len(wide) and wide.min() < 0):
        raise ValueError(f"{len(values)} tokens, lengths sum to {int(wide.sum())}")
    return Ragged(values.astype(np.int32), np.cumsum(wide) - wide, wide)
