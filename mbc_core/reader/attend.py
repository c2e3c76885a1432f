"""The attend read: a recalled passage is read as the vector that its address codes stand for, and as nothing else.

The 27 bytes of a passage → codes → codeword vectors → (inverse rotation) one vector x̂ of the encoder's width → a small
network → a few *soft tokens* in the language model's input embeddings, where a memory line would stand. The network
never sees a code's number, so any codebook version, any T and any rotation can be read.
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
_METADATA = "mbc"
_FEATURES = 3
"""x̂·q, cos(x̂, q) and |x̂|: how well the passage was found, and how well it was quantized."""


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """Shape of the projector.

    Attributes:
        width: of the encoder's embeddings, d.
        lm_width: of the language model's input embeddings.
        soft_tokens: a passage.
        hidden: units of the hidden layer.
        rank: numbers a soft token has before it is spread over ``lm_width``; 0: no such bottleneck.
        question: whether a passage is read for the question: then its input is [x̂, q, x̂∘q], else x̂ alone.
        dropout: of the hidden layer, in training.
    """

    width: int
    lm_width: int
    soft_tokens: int = 4
    hidden: int = 1024
    rank: int = 192
    question: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = (self.width, self.lm_width, self.soft_tokens, self.hidden)
        if min(sizes) < 1 or self.rank < 0 or not 0 <= self.dropout < 1:
            raise ModelError(
                "the attend projector cannot have this shape",
                value=asdict(self),
                cause="a size is below 1, or dropout is not a share",
                fix="use sizes such as hidden 1024, rank 192, 4 soft tokens",
            )


class AttendProjector(nn.Module):
    """Passage vector (and question vector) → soft tokens.

    Args:
        config: its shape.
        scale: root mean square of the language model's input embeddings; soft tokens start out as long.
    """

    def __init__(self, config: AttendConfig, scale: float = 0.1) -> None:
        super().__init__()
        self.config = config
        parts = 3 if config.question else 1
        self.passage_norm = nn.LayerNorm(config.width)
        if config.question:
            self.question_norm = nn.LayerNorm(config.width)
            self.product_norm = nn.LayerNorm(config.width)
        self.inner = nn.Linear(parts * config.width + _FEATURES * config.question, config.hidden)
        self.drop = nn.Dropout(config.dropout)
        per_token = config.rank or config.lm_width
        self.outer = nn.Linear(config.hidden, config.soft_tokens * per_token)
        self.spread = nn.Linear(config.rank, config.lm_width) if config.rank else nn.Identity()
        self.gain = nn.Parameter(torch.full((config.soft_tokens, 1), float(scale)))

    def forward(self, passages: Tensor, questions: Tensor) -> Tensor:
        """Soft tokens of passages, each read for one question.

        Args:
            passages: x̂, float [n, d], as decoded: shorter than 1 the worse they were quantized.
            questions: q, float [n, d], unit norm; not looked at without ``config.question``.

        Returns:
            float [n, soft_tokens, lm_width], dtype of the weights.
        """
        dtype = self.inner.weight.dtype
        passages, questions = passages.to(dtype), questions.to(dtype)
        found = [self.passage_norm(passages)]
        if self.config.question:
            found += [self.question_norm(questions), self.product_norm(passages * questions)]
            found.append(_features(passages.float(), questions.float()).to(dtype))
        hidden = self.drop(nn.functional.gelu(self.inner(torch.cat(found, dim=-1))))
        tokens = self.spread(self.outer(hidden).unflatten(-1, (self.config.soft_tokens, -1))).float()
        unit = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
        soft: Tensor = (unit * self.gain.float()).to(dtype)
        return soft


def _features(passages: Tensor, questions: Tensor) -> Tensor:
    score = (passages * questions).sum(-1)
    length = passages.norm(dim=-1)
    return torch.stack([4 * score, 4 * score / length.clamp(min=1e-6), 4 * (length - 0.8)], dim=-1)


def embedding_scale(weight: Tensor) -> float:
    """Root mean square of the input embeddings [vocabulary, width]."""
    return float(weight.float().square().mean().sqrt())


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
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in projector.state_dict().items()}
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
        projector = AttendProjector(AttendConfig(**told["config"]))
        projector.load_state_dict({name: value.float() for name, value in weights.items()})
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
