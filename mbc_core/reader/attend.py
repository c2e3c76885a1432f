"""The attend read: a recalled passage is read as the vector that its address codes stand for, and as nothing else.

The 27 bytes of a passage → codes → codeword vectors → (inverse rotation) one vector x̂ of the encoder's width → *soft
tokens* in the language model's input embeddings, where a memory line would stand. The projector never sees a code's
number, so any codebook version, any T and any rotation can be read.

What a vector says is looked up in a dictionary: the encoder's own embeddings of some thousand words, which lie near the
embeddings of texts that hold them. Two heads point into it, one at words of the passage, one at words of the answer
that is sought; the likeliest words' embeddings in the language model are the soft tokens, each moved along a learned
direction by how likely its word is. No word of a passage is stored: all are guessed from its vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbc_core.codes import Float32, Rotation, check_array, decode
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError

PROJECTOR_FILE = "projector.safetensors"
FORMAT = "mbc-attend/1"
WORD_TOKENS = 4
"""Tokens of a word that can be shown; longer words are cut."""

ANSWER, TOPIC = 0, 1
"""Heads: words of the answer, words of the passage."""

_METADATA = "mbc"
_FEATURES = 3
_LEVELS = 7


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """Shape of the projector.

    Attributes:
        width: of the encoder's embeddings, d.
        lm_width: of the language model's input embeddings.
        words: in the dictionary.
        answers, topics: soft tokens a passage, of the words that may answer and of those it is about.
        hidden: units of the hidden layer.
        question: whether a passage is read for the question; else the question is taken for a vector of zeros.
        dropout: of the hidden layer, in training.
    """

    width: int
    lm_width: int
    words: int
    answers: int = 8
    topics: int = 8
    hidden: int = 768
    question: bool = True
    dropout: float = 0.3

    def __post_init__(self) -> None:
        sizes = (self.width, self.lm_width, self.words, self.hidden, self.answers + self.topics)
        shown = max(self.answers, self.topics)
        if min(sizes) < 1 or min(self.answers, self.topics) < 0 or shown > self.words or not 0 <= self.dropout < 1:
            raise ModelError(
                "the attend projector cannot have this shape",
                value=asdict(self),
                cause="a size is below 1, more words are shown than there are, or dropout is not a share",
                fix="use sizes such as hidden 768, 8 answers and 8 topics of 16,000 words",
            )

    @property
    def soft_tokens(self) -> int:
        """A passage."""
        return self.answers + self.topics


class AttendProjector(nn.Module):
    """Passage vector and question vector → soft tokens.

    Args:
        config: its shape.
        dictionary: the encoder's embeddings of the words, float32 [words, d]; kept in 4 bits a number.
        tokens: int64 [words, ≤ 4], each word's tokens in the language model, -1 where there are no more.
    """

    dictionary: Tensor
    tokens: Tensor

    def __init__(self, config: AttendConfig, dictionary: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("dictionary", four_bits(*to_four_bits(dictionary)))
        self.register_buffer("tokens", nn.functional.pad(tokens, (0, WORD_TOKENS - tokens.shape[1]), value=-1))
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.bias = nn.Parameter(torch.zeros(2, config.words))
        self.from_passage = nn.Parameter(torch.eye(width).repeat(2, 1, 1))
        self.from_question = nn.Parameter(torch.zeros(2, width, width))
        self.norm = nn.LayerNorm(3 * width)
        self.inner = nn.Linear(3 * width + _FEATURES, config.hidden)
        self.drop = nn.Dropout(config.dropout)
        self.outer = nn.Linear(config.hidden, 2 * width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.likely = nn.Parameter(torch.zeros(2, config.lm_width))

    def logits(self, passages: Tensor, questions: Tensor) -> Tensor:
        """How likely each word is, by each head.

        Args:
            passages: x̂, float [n, d], as decoded: shorter than 1 the worse they were quantized.
            questions: q, float [n, d], unit norm; not looked at without ``config.question``.

        Returns:
            [n, 2, words], before the softmax; heads are :data:`ANSWER` and :data:`TOPIC`.
        """
        dtype = self.inner.weight.dtype
        passages = passages.to(dtype)
        questions = questions.to(dtype) if self.config.question else torch.zeros_like(passages)
        both = self.norm(torch.cat([passages, questions, 10 * passages * questions], dim=-1))
        found = torch.cat([both, _features(passages.float(), questions.float()).to(dtype)], dim=-1)
        hidden = self.outer(self.drop(nn.functional.gelu(self.inner(found)))).unflatten(-1, (2, -1))
        pointed = torch.einsum("nd,hde->nhe", passages, self.from_passage) + hidden
        if self.config.question:
            pointed = pointed + torch.einsum("nd,hde->nhe", questions, self.from_question)
        logits: Tensor = (self.scale * pointed) @ self.dictionary.to(dtype).T + self.bias
        return logits

    def forward(self, passages: Tensor, questions: Tensor, embeddings: Tensor) -> Tensor:
        """Soft tokens of passages, each read for one question.

        Args:
            passages, questions: as :meth:`logits` takes them.
            embeddings: of the language model's vocabulary, [V, lm_width].

        Returns:
            float [n, soft_tokens, lm_width], dtype of ``embeddings``.
        """
        return self.shown(*self.chosen(passages, questions), embeddings)

    def chosen(self, passages: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the likeliest words, best first, and how likely their words are.

        Returns:
            ids int64 and log-likelihoods, both [n, soft_tokens]; first the answer head's, then the topic head's. A
            word that is cut by the end of its head's room shows its first tokens.
        """
        likelihood = self.logits(passages, questions).float().log_softmax(dim=-1)
        ids, likely = [], []
        for head, room in ((ANSWER, self.config.answers), (TOPIC, self.config.topics)):
            best = likelihood[:, head].topk(room, dim=-1)
            tokens = self.tokens[best.indices].flatten(1)
            # Gaps sort last; the others keep their order, so words stay whole and best first.
            order = (tokens < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :room]
            ids.append(tokens.gather(1, order))
            likely.append(best.values.repeat_interleave(WORD_TOKENS, dim=1).gather(1, order))
        return torch.cat(ids, dim=1).clamp(min=0), torch.cat(likely, dim=1)

    def shown(self, ids: Tensor, likely: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings of the chosen tokens, moved by how likely they are."""
        sizes = torch.tensor([self.config.answers, self.config.topics], device=ids.device)
        moved = self.likely.repeat_interleave(sizes, dim=0)[None] * (likely[..., None] / 8 + 1).to(self.likely.dtype)
        return embeddings[ids] + moved.to(embeddings.dtype)


def to_four_bits(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [n, d] → whole numbers from -7 to 7, int8 [n, d], and the scale of each row, float16 [n]."""
    scale = (vectors.abs().amax(dim=1) / _LEVELS).clamp(min=1e-6).half()
    return (vectors / scale.float()[:, None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def four_bits(numbers: Tensor, scale: Tensor) -> Tensor:
    """Inverse of :func:`to_four_bits`, float32."""
    return numbers.float() * scale.float()[:, None]


def _features(passages: Tensor, questions: Tensor) -> Tensor:
    """x̂·q, cos(x̂, q) and |x̂|: how well the passage was found, and how well it was quantized."""
    score = (passages * questions).sum(-1)
    length = passages.norm(dim=-1)
    return torch.stack([4 * score, 4 * score / length.clamp(min=1e-6), 4 * length], dim=-1)


def passage_vectors(codes: NDArray[np.uint16], codewords: Float32, rotation: Rotation) -> Float32:
    """x̂ of every passage: its codewords one after the other, turned back into the encoder's space.

    Args:
        codes: c, uint16 [n, T].
        codewords: E, float32 [K, d_c] with T · d_c = d, of the codebook version that the codes name.

    Returns:
        float32 [n, d], so that x̂·q is the score that recall ranks by (without its credit for length).

    Raises:
        UsageError: a code beyond the codebook, or another width than the rotation's.
    """
    turned = decode(codes, codewords)
    check_array("the decoded addresses", turned, (None, rotation.width), np.float32)
    return np.asarray(turned @ rotation.matrix, dtype=np.float32)


def encoder_model(encoder_id: str) -> str:
    """The model that an encoder id (model / precision / passage rule) names; the other two do not move its space."""
    return encoder_id.split("/")[0]


def save_projector(path: Path, projector: AttendProjector, *, base_digest: str, encoder: str, rotation: str) -> None:
    """Write float16 weights with what they belong to in the metadata; the file appears whole.

    Args:
        base_digest: of the language model whose embeddings it speaks.
        encoder: model (or id) of the encoder whose vectors it reads.
        rotation: digest of the rotation it was trained behind, for people: any rotation can be read.
    """
    from safetensors.torch import save

    told = {
        "format": FORMAT,
        "config": asdict(projector.config),
        "base_digest": base_digest,
        "encoder": encoder_model(encoder),
        "rotation": rotation,
    }
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in projector.named_parameters()}
    numbers, scale = to_four_bits(projector.dictionary.cpu())
    packed = (numbers + _LEVELS + 1).to(torch.uint8).flatten()
    packed = nn.functional.pad(packed, (0, len(packed) % 2))
    tensors |= {
        "dictionary": packed[0::2] | packed[1::2] << 4,
        "dictionary_scale": scale,
        "tokens": projector.tokens.cpu().to(torch.int32).contiguous(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.writing")
    # one entry: several would be written in any order
    staging.write_bytes(save(tensors, metadata={_METADATA: json.dumps(told, sort_keys=True)}))
    staging.replace(path)


@dataclass(frozen=True, eq=False)
class LoadedProjector:
    """A projector as :func:`load_projector` found it, and what it belongs to."""

    projector: AttendProjector
    base_digest: str
    encoder: str
    rotation: str


def load_projector(path: Path, *, base_digest: str | None = None, encoder: str | None = None) -> LoadedProjector:
    """Read :func:`save_projector`; float32 weights, in evaluation mode.

    Args:
        base_digest: of the language model that is to read; None skips the check.
        encoder: id of the encoder that made the bank; None skips the check.

    Raises:
        ModelError: there is no such file, or it was trained for another language model.
        IncompatibleBank: it reads the vectors of another encoder.
        DamagedFile: it cannot be read.
    """
    if not path.exists():
        raise ModelError(
            "there are no weights for the read `attend`",
            value=str(path),
            cause="this installation or folder holds none",
            fix="train them with `mbc train attend`, or ask with --read recall",
        )
    weights, told = _read(path)
    try:
        projector = _built(AttendConfig(**told["config"]), dict(weights))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error
    found = LoadedProjector(
        projector.eval(), told.get("base_digest", ""), told.get("encoder", ""), told.get("rotation", "")
    )
    if base_digest is not None and found.base_digest != base_digest:
        raise ModelError(
            "the attend weights were trained for another language model",
            value=found.base_digest[:12],
            cause=f"this model's digest is {base_digest[:12]}",
            fix="load the model they were trained for, or train others with `mbc train attend`",
        )
    if encoder is not None and found.encoder != encoder_model(encoder):
        raise IncompatibleBank(
            "the attend weights read the vectors of another encoder",
            value=found.encoder,
            cause=f"the bank was made with {encoder_model(encoder)}",
            fix="train weights for this encoder with `mbc train attend`, or ask with --read recall",
        )
    return found


def _built(config: AttendConfig, weights: dict[str, Tensor]) -> AttendProjector:
    packed, scale, tokens = (weights.pop(name) for name in ("dictionary", "dictionary_scale", "tokens"))
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: config.words * config.width]
    numbers = halves.to(torch.int8).view(config.words, config.width) - _LEVELS - 1
    projector = AttendProjector(config, four_bits(numbers, scale), tokens.long())
    buffers = {"dictionary": projector.dictionary, "tokens": projector.tokens}
    projector.load_state_dict({**{name: value.float() for name, value in weights.items()}, **buffers})
    return projector


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if told.get("format") != FORMAT:
                raise ValueError(f"its format is {told.get('format')!r}, not {FORMAT!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(
        "the attend weights cannot be read",
        value=str(path),
        cause=f"{type(error).__name__}: {str(error).splitlines()[0]}",
        fix="restore the file, or train it again with `mbc train attend`",
    )
