"""Frozen encoder states of all training passages, computed once and kept on the device.

One flat matrix of tokens, so that a training step only gathers: the host neither tokenises nor copies anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mbc_core.encoder import PassageEncoder
from mbc_core.encoder.passage_encoder import piece_words
from mbc_core.encoder.word_features import word_features
from mbc_core.training.data import TrainingPassage
from mbc_core.training.word_targets import WordTargets, word_targets
from mbc_core.words import Word, split_words

_TEXTS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class SalienceBatch:
    """What one step reads.

    Attributes:
        states: of each layer, bfloat16 [B, L, width].
        mask: bool [B, L].
        features: uint8 [B, L, features], see :mod:`mbc_core.encoder.word_features`.
        word_of_piece: int64 [B, L], word's row in ``targets``; its last row, a dummy, for pieces of no word.
        targets: float32 [B · W + 1, 2].
        is_word: bool [B · W + 1].
    """

    states: tuple[Tensor, ...]
    mask: Tensor
    features: Tensor
    word_of_piece: Tensor
    targets: Tensor
    is_word: Tensor


class FrozenStates:
    """States, word positions and targets of many passages, flat over tokens and over words.

    Attributes:
        lengths: int64 [passages], tokens of each.
        words: the words of each passage.
        answers: see ``WordTargets.answers``.
    """

    def __init__(
        self,
        encoder: PassageEncoder,
        passages: Sequence[TrainingPassage],
        layers: Sequence[int],
        device: str,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        token_ids: list[list[int]] = []
        word_of_piece: list[npt.NDArray[np.int32]] = []
        features: list[npt.NDArray[np.uint8]] = []
        targets: list[WordTargets] = []
        self.words: list[list[Word]] = []
        for start in range(0, len(passages), _TEXTS_AT_ONCE):
            chunk = passages[start : start + _TEXTS_AT_ONCE]
            encodings = encoder.tokenize([passage.text for passage in chunk])
            for passage, encoding in zip(chunk, encodings, strict=True):
                words = split_words(passage.text)
                self.words.append(words)
                token_ids.append(encoding.ids)
                word_of_piece.append(piece_words(encoding, words))
                features.append(word_features(passage.text, words)[word_of_piece[-1]])  # the last row: no word
                targets.append(word_targets(passage, words))
        self.answers = [target.answers for target in targets]
        self.lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        self.word_counts = np.array([len(words) for words in self.words], dtype=np.int64)
        self._starts = torch.from_numpy(_starts(self.lengths)).to(device)
        self._lengths = torch.from_numpy(self.lengths).to(device)
        self._word_starts = torch.from_numpy(_starts(self.word_counts)).to(device)
        self._word_counts = torch.from_numpy(self.word_counts).to(device)
        self._word_of_piece = torch.from_numpy(np.concatenate(word_of_piece)).to(device)
        self._features = torch.from_numpy(np.concatenate(features)).to(device)
        self._targets = torch.from_numpy(np.concatenate([target.targets for target in targets])).to(device)
        self._states = self._run(encoder, token_ids, layers, device, progress)
        self._layers = len(layers)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, places: npt.NDArray[np.int64]) -> SalienceBatch:
        """Gather the passages at ``places``, padded to the longest (rounded up to 16 tokens)."""
        device = self._states.device
        length = -(-int(self.lengths[places].max()) // 16) * 16
        most_words = max(int(self.word_counts[places].max()), 1)
        chosen = torch.from_numpy(places).to(device, non_blocking=True)
        column = torch.arange(length, device=device)
        mask = column < self._lengths[chosen, None]
        token = (self._starts[chosen, None] + column).clamp_(max=self._states.shape[0] - 1)
        word = self._word_of_piece[token].long()
        row = torch.arange(len(places), device=device)[:, None]
        dummy = len(places) * most_words
        word = torch.where(mask & (word >= 0), word + row * most_words, dummy)
        column = torch.arange(most_words, device=device)
        is_word = column < self._word_counts[chosen, None]
        target_row = (self._word_starts[chosen, None] + column).clamp_(max=self._targets.shape[0] - 1)
        targets = torch.cat([self._targets[target_row.flatten()], self._targets.new_zeros(1, 2)])
        is_word = torch.cat([is_word.flatten(), is_word.new_zeros(1)])
        states = self._states[token].chunk(self._layers, dim=-1)
        return SalienceBatch(states, mask, self._features[token], word, targets, is_word)

    def _run(
        self,
        encoder: PassageEncoder,
        token_ids: Sequence[Sequence[int]],
        layers: Sequence[int],
        device: str,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """bfloat16 [tokens, layers · width]."""
        starts = _starts(self.lengths)
        flat = torch.empty((int(self.lengths.sum()), len(layers) * encoder.width), dtype=torch.bfloat16, device=device)
        for ran in encoder.hidden_states(token_ids, layers):
            rows = list(ran.batch.places)
            into = np.concatenate([np.arange(starts[row], starts[row] + self.lengths[row]) for row in rows])
            real = ran.mask[: len(rows)].bool()
            found = torch.cat([state[: len(rows)][real] for state in ran.states], dim=-1)
            flat[torch.from_numpy(into).to(device)] = found.to(torch.bfloat16)
            if progress is not None:
                progress(len(rows))
        return flat


def word_logits(piece_logits: Tensor, batch: SalienceBatch) -> Tensor:
    """Mean of each word's piece logits: float32 [B · W + 1, 2], rows as in ``batch.targets``."""
    place = batch.word_of_piece.flatten()
    total = piece_logits.new_zeros(batch.targets.shape).index_add_(0, place, piece_logits.flatten(0, 1))
    pieces = piece_logits.new_zeros(len(total)).index_add_(0, place, torch.ones_like(place, dtype=total.dtype))
    return total / pieces.clamp(min=1)[:, None]


def epoch_batches(
    lengths: npt.NDArray[np.int64], batch: int, seed: int, epoch: int, *, together: int = 16
) -> list[npt.NDArray[np.int64]]:
    """Shuffled batches of passages of like length; a function of (seed, epoch) alone, so training can resume.

    Passages are shuffled, sorted by length within groups of ``together`` batches, cut, and the batches shuffled. A
    last incomplete batch is left for another epoch unless it is the only one.
    """
    order = np.random.default_rng((seed, epoch))
    places = order.permutation(len(lengths))
    batches = []
    for start in range(0, len(places), batch * together):
        group = places[start : start + batch * together]
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += [group[at : at + batch] for at in range(0, len(group), batch)]
    full = [one for one in batches if len(one) == batch] or batches
    return [full[place] for place in order.permutation(len(full))]


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
