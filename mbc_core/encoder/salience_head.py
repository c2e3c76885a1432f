"""Word salience: which words of a passage questions will be asked about.

A small pre-norm transformer over the frozen encoder's hidden states, and over what the encoder cannot see of the words
(:mod:`mbc_core.encoder.word_features`), gives two logits a word piece: the piece is
part of an answer; it belongs to a content word that a question repeats. A word's logits are the mean of its pieces',
and its score is p(answer) + ½ · p(question).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from mbc_core.codebook.files import damaged, read_tensors, write_tensors
from mbc_core.encoder.word_features import SIZES
from mbc_core.errors import ModelError

FORMAT = "mbc-salience/1"
QUESTION_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class SalienceShape:
    """Size of a head.

    Attributes:
        layers: which hidden states of the encoder it reads (0 = embeddings, n = last block's output).
        input_width: the encoder's width.
        width, heads, feed_forward, depth: of the head's own blocks.
        features: categories of each word feature, as ``word_features.SIZES``; empty to read states alone.
    """

    layers: tuple[int, ...] = (2, 4, 6)
    input_width: int = 384
    width: int = 384
    heads: int = 6
    feed_forward: int = 1024
    depth: int = 2
    features: tuple[int, ...] = SIZES


class SalienceHead(nn.Module):
    """Hidden states → two logits a word piece (answer, question).

    Args:
        shape: sizes.
        dropout: probability on attention output and feed-forward, in training only.
    """

    def __init__(self, shape: SalienceShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.norms = nn.ModuleList(nn.LayerNorm(shape.input_width) for _ in shape.layers)
        self.mix = nn.Linear(shape.input_width * len(shape.layers), shape.width)
        self.features = nn.ModuleList(nn.Embedding(size, shape.width) for size in shape.features)
        self.blocks = nn.ModuleList(_Block(shape, dropout) for _ in range(shape.depth))
        self.last_norm = nn.LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, 2)

    def forward(self, states: Sequence[Tensor], mask: Tensor, features: Tensor) -> Tensor:
        """Logits of every piece.

        Args:
            states: one [B, L, input_width] per entry of ``shape.layers``.
            mask: [B, L], nonzero where a token stands; at least one a row.
            features: integer [B, L, len(shape.features)], those of each piece's word.

        Returns:
            float32 [B, L, 2]; column 0 answer, column 1 question.
        """
        normed = [norm(state) for norm, state in zip(self.norms, states, strict=True)]
        hidden = self.mix(torch.cat(normed, dim=-1))
        for number, table in enumerate(self.features):
            hidden = hidden + table(features[..., number].long())
        keys = mask.bool()[:, None, None, :]
        for block in self.blocks:
            hidden = block(hidden, keys)
        logits: Tensor = self.out(self.last_norm(hidden))
        return logits.float()

    def save(self, path: Path, encoder_digest: str) -> str:
        """Write float16 safetensors for the encoder with this digest; returns the file's sha256 (hex)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().to("cpu", torch.float16).numpy() for name, tensor in self.state_dict().items()}
        stored = write_tensors(tensors, {"format": FORMAT, "encoder": encoder_digest, "shape": asdict(self.shape)})
        path.write_bytes(stored)
        return hashlib.sha256(stored).hexdigest()

    @classmethod
    def load(cls, path: Path, encoder_digest: str) -> SalienceHead:
        """Read a head for the encoder with this digest.

        Raises:
            ModelError: no such file, or made for another encoder.
            DamagedFile: not a salience head, or tensors missing, unexpected or of the wrong shape.
        """
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise ModelError(
                "the salience head cannot be read",
                value=str(path),
                cause=error.strerror or str(error),
                fix="reinstall the package, or make one with `mbc train salience`",
            ) from error
        tensors, metadata = read_tensors(stored, str(path), FORMAT)
        if metadata.get("encoder") != encoder_digest:
            raise ModelError(
                "the salience head was trained for another encoder",
                value=str(path),
                cause=f"it belongs to encoder {metadata.get('encoder')}, this one is {encoder_digest}",
                fix="train one for this encoder with `mbc train salience`, or use a profile without word codes",
            )
        try:
            fields = metadata["shape"]
            # A head written before there were word features names none, and reads none.
            given = {**fields, "layers": tuple(fields["layers"]), "features": tuple(fields.get("features", ()))}
            head = cls(SalienceShape(**given))
            head.load_state_dict({name: torch.from_numpy(tensor).float() for name, tensor in tensors.items()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(str(path), error) from error
        return head.eval()


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: SalienceShape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.forward_norm = nn.LayerNorm(shape.width)
        self.forward_in = nn.Linear(shape.width, shape.feed_forward)
        self.forward_out = nn.Linear(shape.feed_forward, shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, keys: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        projected = self.query_key_value(self.attention_norm(hidden))
        query, key, value = projected.view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
        read = read.transpose(1, 2).reshape(rows, length, width)
        hidden = hidden + self.dropout(self.attention_out(read))
        inner = functional.gelu(self.forward_in(self.forward_norm(hidden)))
        out: Tensor = hidden + self.dropout(self.forward_out(inner))
        return out


def word_scores(
    logits: npt.NDArray[np.float32], word_of_piece: npt.NDArray[np.int32], words: int
) -> npt.NDArray[np.float32]:
    """Score of each word of one passage.

    Args:
        logits: float32 [pieces, 2], as the head gives them.
        word_of_piece: int32 [pieces], index of the piece's word, -1 for none.
        words: number of words.

    Returns:
        float32 [words] in [0, 1.5]; 0 for a word without a piece.
    """
    inside = word_of_piece >= 0
    place = word_of_piece[inside]
    pieces = np.bincount(place, minlength=words)
    # One column at a time, summed in piece order: a passage's scores depend on nothing else.
    answer = np.bincount(place, weights=logits[inside, 0], minlength=words)
    question = np.bincount(place, weights=logits[inside, 1], minlength=words)
    divisor = np.maximum(pieces, 1)
    score = _sigmoid(answer / divisor) + QUESTION_WEIGHT * _sigmoid(question / divisor)
    return np.where(pieces > 0, score, 0.0).astype(np.float32)


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))))
