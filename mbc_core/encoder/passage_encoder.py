"""The frozen passage encoder: one forward pass gives an embedding and, with a head, a score for every word."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from mbc_core.encoder.batches import MAX_TOKENS, Batch, plan_batches, token_matrix
from mbc_core.encoder.salience_head import SalienceHead, word_scores
from mbc_core.encoder.word_features import SIZES, word_features
from mbc_core.errors import DamagedFile, ModelError, UsageError
from mbc_core.passages import MAX_PIECES, PASSAGE_RULE
from mbc_core.words import Word, split_words

Precision = Literal["auto", "float32", "bfloat16"]

LONGEST_WORD = 100
"""Characters; longer runs (addresses, hashes) are embedded but never offered as word codes."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
_NAMES = {"d101471598ac": "all-MiniLM-L6-v2"}  # digest → the name people know it by
_TEXTS_AT_ONCE = 4096  # tokenised and sorted together; bounds memory


@dataclass(frozen=True, slots=True)
class EncodedPassage:
    """What one passage becomes.

    Attributes:
        embedding: float32 [width], unit norm (h in the contract of codes: the rotation makes slot vectors of it).
        words: the passage's words in text order, edge punctuation stripped; empty without a salience head.
        scores: float32 [len(words)], higher is more worth keeping.
    """

    embedding: npt.NDArray[np.float32]
    words: tuple[str, ...]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """One fixed-shape batch after the encoder; rows past ``len(batch.places)`` are padding.

    Attributes:
        batch: which texts, in what shape.
        mask: int64 [rows, length], 1 where a token stands.
        embeddings: float32 [rows, width], unit norm.
        states: of each layer asked for, [rows, length, width] in the encoder's precision.
    """

    batch: Batch
    mask: Tensor
    embeddings: Tensor
    states: tuple[Tensor, ...]


class PassageEncoder:
    """A frozen sentence encoder with an optional salience head; make one with :meth:`load`.

    Attributes:
        encoder_id: names everything that an embedding depends on: model, precision, passage rule.
        salience_digest: sha256 (hex) of the head's file; empty without a head.
        width: length of an embedding.
        precision: "float32" or "bfloat16", as resolved.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, head: SalienceHead | None, *, name: str, digest: str,
        salience_digest: str, precision: str, device: str,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._head = model, tokenizer, head
        self._device = torch.device(device)
        self._pad_id = int(model.config.pad_token_id or 0)
        self.digest, self.salience_digest, self.precision = digest, salience_digest, precision
        self.encoder_id = f"{name}@{digest}/{precision}/{PASSAGE_RULE}"
        self.width = int(model.config.hidden_size)

    @classmethod
    def load(
        cls, model_dir: Path, salience: Path | None, *, precision: Precision = "auto", device: str = "cpu"
    ) -> PassageEncoder:
        """Load a model folder (``model.safetensors``, ``config.json``, ``tokenizer.json``) and a salience head.

        Args:
            model_dir: the folder.
            salience: a head's file, or None for embeddings only.
            precision: "auto" is bfloat16 where the device computes it natively, float32 elsewhere.
            device: a torch device.

        Raises:
            ModelError: a file is missing, or the head belongs to another encoder.
            DamagedFile: a file cannot be read as what it should be.
            UsageError: unknown precision.
        """
        chosen = resolve_precision(precision, device)
        digest = model_digest(model_dir)
        head = SalienceHead.load(salience, digest) if salience is not None else None
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a second needs no bar
        try:
            tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
            model, found = AutoModel.from_pretrained(
                model_dir, dtype=_DTYPES[chosen], attn_implementation="sdpa", local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # tokenizers and safetensors raise bare Exceptions
            raise DamagedFile(
                "the encoder's files cannot be read",
                value=str(model_dir),
                cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="delete the folder and fetch the model again (`mbc demo` does it)",
            ) from error
        _require_weights(found["missing_keys"], model_dir)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if head is not None:
            head.to(device, _DTYPES[chosen])
        return cls(
            model.to(device).eval(), tokenizer, head,
            name=_NAMES.get(digest, model_dir.name), digest=digest, precision=chosen, device=device,
            salience_digest=hashlib.sha256(salience.read_bytes()).hexdigest() if salience is not None else "",
        )  # fmt: skip

    def count_pieces(self, text: str) -> int:
        """Word pieces of ``text``, special tokens not counted."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[EncodedPassage]:
        """Encode passages; the result of each depends on its own text alone, bit for bit.

        Batches are padded to fixed shapes, so many texts a call (≥ 512) waste least.

        Args:
            texts: passages of at most 254 word pieces (see :func:`mbc_core.passages.split_passages`).
            progress: called with the number of passages just finished.

        Returns:
            One :class:`EncodedPassage` a text, in order.

        Raises:
            ModelError: a passage is too long.
        """
        results: list[EncodedPassage | None] = [None] * len(texts)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            chunk = texts[start : start + _TEXTS_AT_ONCE]
            encodings = self.tokenize(chunk)
            words = [_offered(text) for text in chunk] if self._head is not None else [[] for _ in chunk]
            pieces = [piece_words(encoding, one) for encoding, one in zip(encodings, words, strict=True)]
            for batch, embeddings, logits in self._forward(chunk, encodings, words, pieces):
                for row, place in enumerate(batch.places):
                    scores = np.zeros(0, dtype=np.float32)
                    if logits is not None:
                        scores = word_scores(logits[row, : len(pieces[place])], pieces[place], len(words[place]))
                    names = tuple(word.text for word in words[place])
                    results[start + place] = EncodedPassage(embeddings[row].copy(), names, scores)
                if progress is not None:
                    progress(len(batch.places))
        return [result for result in results if result is not None]

    def encode_questions(self, questions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings of questions, float32 [n, width], unit norm; of a longer one, its first 254 word pieces."""
        token_ids = self.question_tokens(questions)
        found = np.zeros((len(token_ids), self.width), dtype=np.float32)
        for ran in self.hidden_states(token_ids, ()):
            found[list(ran.batch.places)] = ran.embeddings[: len(ran.batch.places)].cpu().numpy()
        return found

    def question_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of questions, with [CLS] and [SEP]; of a longer one, its first 254 word pieces."""
        ids = [list(encoding.ids) for encoding in self._tokenizer.encode_batch(list(questions))]
        return [one if len(one) <= MAX_TOKENS else [*one[: MAX_TOKENS - 1], one[-1]] for one in ids]

    def tokenize(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of passages, with [CLS] and [SEP], neither padded nor cut.

        Raises:
            ModelError: a passage is too long.
        """
        encodings: list[Encoding] = self._tokenizer.encode_batch(list(texts))
        for text, encoding in zip(texts, encodings, strict=True):
            if len(encoding.ids) > MAX_TOKENS:
                raise ModelError(
                    f"a passage has {len(encoding.ids) - 2} word pieces, more than the {MAX_PIECES} that are read",
                    value=text,
                    cause="it was not cut into passages",
                    fix="pass the document through mbc_core.passages.split_passages first",
                )
        return encodings

    def hidden_states(self, token_ids: Sequence[Sequence[int]], layers: Sequence[int]) -> Iterator[HiddenStates]:
        """Run the encoder over fixed-shape batches; ``layers`` says whose states are wanted (0 = embeddings)."""
        for batch in plan_batches([len(ids) for ids in token_ids], self._device.type):
            with torch.inference_mode():
                ids, mask = (
                    torch.from_numpy(part).to(self._device) for part in token_matrix(batch, token_ids, self._pad_id)
                )
                out = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=bool(layers))
                states = tuple(out.hidden_states[layer] for layer in layers)
                embeddings = _pool(out.last_hidden_state, mask)
            yield HiddenStates(batch, mask, embeddings, states)  # outside: the caller's own mode is not ours to set

    def _forward(
        self,
        texts: Sequence[str],
        encodings: Sequence[Encoding],
        words: Sequence[Sequence[Word]],
        pieces: Sequence[npt.NDArray[np.int32]],
    ) -> Iterator[tuple[Batch, npt.NDArray[np.float32], npt.NDArray[np.float32] | None]]:
        """Per batch: embeddings float32 [rows, width] and, with a head, logits float32 [rows, length, 2]."""
        layers = self._head.shape.layers if self._head is not None else ()
        for found in self.hidden_states([encoding.ids for encoding in encodings], layers):
            logits = None
            if self._head is not None:
                features = np.zeros((*found.mask.shape, len(SIZES)), dtype=np.uint8)
                for row, place in enumerate(found.batch.places):
                    features[row, : len(pieces[place])] = word_features(texts[place], words[place])[pieces[place]]
                with torch.inference_mode():
                    logits = self._head(found.states, found.mask, torch.from_numpy(features).to(self._device))
                    logits = logits.cpu().numpy()
            yield found.batch, found.embeddings.cpu().numpy(), logits


def resolve_precision(precision: str, device: str) -> str:
    """ "auto" → "bfloat16" where ``device`` computes it natively, else "float32".

    Raises:
        UsageError: neither "auto", "float32" nor "bfloat16".
    """
    if precision in _DTYPES:
        return precision
    if precision != "auto":
        raise UsageError(
            "unknown precision", value=precision, cause="a spelling mistake", fix="use auto, float32 or bfloat16"
        )
    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if kind == "cpu" and _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    """Native bfloat16 products: avx512_bf16 or AMX (x86), bf16 (Arm). Emulated ones are slower than float32."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch ≥ 2.12
        abilities = torch.cpu.get_capabilities()
        return any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _require_weights(missing: Iterable[str], model_dir: Path) -> None:
    """transformers fills missing weights with random numbers; only a pooler, which is not used, may be missing."""
    needed = sorted(name for name in missing if not name.startswith("pooler."))
    if needed:
        raise DamagedFile(
            "the encoder's weights are incomplete",
            value=needed,
            cause=f"{model_dir / 'model.safetensors'} is of another model than its config.json",
            fix="delete the folder and fetch the model again",
        )


def model_digest(model_dir: Path) -> str:
    """12 hexadecimal digits of the sha256 over the weights, configuration and tokenizer.

    Raises:
        ModelError: one of the files is missing.
    """
    digest = hashlib.sha256()
    for name in _MODEL_FILES:
        try:
            with (model_dir / name).open("rb") as stored:
                digest.update(hashlib.file_digest(stored, "sha256").digest())
        except OSError as error:
            raise ModelError(
                "the encoder's folder lacks a file",
                value=str(model_dir / name),
                cause=error.strerror or str(error),
                fix=f"point at a folder with {', '.join(_MODEL_FILES)}",
            ) from error
    return digest.hexdigest()[:12]


def piece_words(encoding: Encoding, words: Sequence[Word]) -> npt.NDArray[np.int32]:
    """Index into ``words`` of each piece, int32 [pieces]; -1 where a piece starts in no word."""
    if not words:
        return np.full(len(encoding.ids), -1, dtype=np.int32)
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts = np.fromiter((word.start for word in words), dtype=np.int64, count=len(words))
    ends = np.fromiter((word.end for word in words), dtype=np.int64, count=len(words))
    place = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    inside = (place >= 0) & (offsets[:, 0] < ends[place]) & (offsets[:, 1] > offsets[:, 0])
    return np.where(inside, place, -1).astype(np.int32)


def _offered(text: str) -> list[Word]:
    """Words that may become word codes."""
    return [word for word in split_words(text) if word.end - word.start <= LONGEST_WORD]


def _pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that stand, then unit norm: float32 [rows, width]."""
    weights = mask.to(torch.float32)[:, :, None]
    mean = (states.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)
