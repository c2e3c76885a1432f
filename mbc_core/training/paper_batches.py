"""Steps of `mbc train paper`: which passages and questions meet, and their tokens on the device.

A step takes ``documents`` passages and ``questions`` of each one's questions, and cuts them into banks of
``bank`` passages: every question reads the bank that its own passage is in, the others are distractors. The choice
is a pure function of the seed and the step's number, so a resumed run, and every rank of a parallel one, sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.errors import UsageError
from mbc_core.training.batches import Int64, Ragged, spread
from mbc_core.training.paper_data import PaperData

_PAD_TO = 8
_CUED = 0.75


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one step shows.

    Attributes:
        documents: int64 [D], passages, bank after bank.
        questions: int64 [D · q], those of each passage in turn.
        bank: passages a bank; divides D.
        kept: bool [D], passages that gradients flow into.
        cued: the questions ask for words of their passage instead of the answer.
    """

    documents: Int64
    questions: Int64
    bank: int
    kept: NDArray[np.bool_]
    cued: bool = False

    @property
    def banks(self) -> int:
        """How many."""
        return len(self.documents) // self.bank

    def part(self, rank: int, ranks: int) -> Chosen:
        """The banks of one rank.

        Raises:
            UsageError: the banks cannot be dealt out evenly.
        """
        if self.banks % ranks:
            raise UsageError(
                "the banks of a step cannot be dealt out to the processes evenly",
                value=f"{self.banks} banks of {self.bank} passages, {ranks} processes",
                cause="every process takes whole banks",
                fix="use more documents a step, smaller banks, or fewer processes",
            )
        few, many = len(self.documents) // ranks, len(self.questions) // ranks
        own, asked = slice(rank * few, (rank + 1) * few), slice(rank * many, (rank + 1) * many)
        return Chosen(self.documents[own], self.questions[asked], self.bank, self.kept[own], self.cued)


class Draw:
    """Draws steps from the passages of one split that have questions.

    Args:
        data: tokens.
        held_out: draw from the held-out passages instead of the others.
        documents: D, passages a step.
        questions: q, questions of each; a passage with fewer repeats one, one with more comes more than once an epoch.
        banks: sizes of banks; each step takes one of them.
        keep: share of the passages that gradients flow into.
        max_tokens: most tokens of a question with its answer; longer ones are left out.
        grow_every: steps after which the next of ``banks`` is drawn too; 0: all from the start.
        cue_steps: over so many steps the share of steps that ask for words instead falls from 3/4 to nothing.

    Attributes:
        left_out: questions that are too long.
        steps_per_epoch: steps in which every question is seen about once.

    Raises:
        UsageError: too few passages for one step, or a bank that does not divide it.
    """

    def __init__(
        self,
        data: PaperData,
        *,
        held_out: bool = False,
        documents: int = 128,
        questions: int = 2,
        banks: Sequence[int] = (16,),
        keep: float = 1.0,
        max_tokens: int = 40,
        grow_every: int = 0,
        cue_steps: int = 0,
    ) -> None:
        self._grow_every, self._cue_steps = grow_every, cue_steps
        self.documents, self.per_document, self.banks, self.keep = documents, questions, tuple(banks), keep
        wrong = [one for one in self.banks if one < 1 or documents % one]
        if wrong or not self.banks:
            raise UsageError(
                "a bank's size does not divide the passages of a step",
                value=f"banks of {wrong}, {documents} passages",
                cause="a step is cut into banks of equal size",
                fix="choose bank sizes that divide --documents",
            )
        lengths = data.prompts.lengths + data.answers.lengths
        mine = data.held_out[data.rows] == held_out
        self.left_out = int((mine & (lengths > max_tokens)).sum())
        self._questions = np.flatnonzero(mine & (lengths <= max_tokens))
        self._rows = data.rows[self._questions]
        _, counts = np.unique(self._rows, return_counts=True)
        self.steps_per_epoch = int((-(-counts // questions)).sum()) // documents
        if not self.steps_per_epoch:
            raise UsageError(
                "there are too few passages with questions for one step",
                value=f"{len(counts)} passages",
                cause=f"a step takes {documents}",
                fix="give more data or a smaller --documents",
            )
        self._epoch = lru_cache(2)(self._make_epoch)

    def step(self, seed: int, number: int) -> Chosen:
        """Step ``number`` of a run."""
        epoch, place = divmod(number, self.steps_per_epoch)
        documents, questions = self._epoch(seed, epoch)
        own = slice(place * self.documents, (place + 1) * self.documents)
        rng = np.random.default_rng([seed, number, 1])
        there = min(len(self.banks), 1 + number // self._grow_every) if self._grow_every else len(self.banks)
        bank = self.banks[int(rng.integers(there))]
        cued = bool(rng.random() < _CUED * (1 - number / self._cue_steps)) if number < self._cue_steps else False
        kept = np.zeros(self.documents, dtype=bool)
        most = max(1, round(self.keep * bank))
        for start in range(0, self.documents, bank):  # of every bank the same share
            kept[start + rng.permutation(bank)[:most]] = True
        return Chosen(documents[own], questions[own].reshape(-1), bank, kept, cued)

    def _make_epoch(self, seed: int, epoch: int) -> tuple[Int64, NDArray[np.int64]]:
        """Passages int64 [n] and their questions int64 [n, q], in a new order each epoch."""
        rng = np.random.default_rng([seed, epoch])
        order = np.lexsort((rng.random(len(self._rows)), self._rows))
        rows, asked = self._rows[order], self._questions[order]
        documents, starts, counts = np.unique(rows, return_index=True, return_counts=True)
        groups = -(-counts // self.per_document)
        first = spread(np.zeros(len(groups), dtype=np.int64), groups) * self.per_document
        inside = (first[:, None] + np.arange(self.per_document)) % np.repeat(counts, groups)[:, None]
        chosen = asked[np.repeat(starts, groups)[:, None] + inside]
        shuffled = rng.permutation(len(chosen))
        return np.repeat(documents, groups)[shuffled], chosen[shuffled]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of one step, or of one rank's part of it, on the device.

    Attributes:
        ids: int64 [B, L], questions with answers for the language model, right-padded; B = D · q.
        places, targets: int64 [answers], as in :class:`mbc_core.training.batches.MicroBatch`.
        asked, asked_mask: int64 [B, S], the questions for the encoder; None where embeddings do.
        embeddings: float32 [B, d], the questions' embeddings; None where tokens do.
        codes: int64 [D, T], address codes; None for learned codes.
        chunks: (ids, mask) int64 [·, S] of passages of like length, those with gradient first; empty for address codes.
        with_gradient: how many chunks gradients flow into.
        order: int64 [D], where each passage stands among the chunks' rows.
        bank: passages a bank.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor
    asked: Tensor | None
    asked_mask: Tensor | None
    embeddings: Tensor | None
    codes: Tensor | None
    chunks: tuple[tuple[Tensor, Tensor], ...]
    with_gradient: int
    order: Tensor | None
    bank: int


class OnDevice:
    """The tokens of :class:`PaperData` as padded matrices on a device.

    Args:
        data: tokens.
        device: where they go.
        slots: T of the address codes; None for learned codes, which need the passages' tokens instead.
        embeddings: float32 [Q, d] of the questions; None: the questions' tokens are shown.
        max_tokens: as in :class:`Draw`; longer questions are cut here, and never drawn there.
        pad_id, encoder_pad_id: what fills the rest of a row.
        chunks: passages go to the encoder in so many pieces of like length, to waste less on padding.
    """

    def __init__(
        self,
        data: PaperData,
        device: torch.device,
        *,
        slots: int | None,
        embeddings: NDArray[np.float32] | None,
        max_tokens: int = 40,
        pad_id: int = 0,
        encoder_pad_id: int = 0,
        chunks: int = 3,
    ) -> None:
        self.device, self._chunks = device, chunks
        if slots is not None and slots not in data.codes:
            raise UsageError(
                "the data hold no address codes of this T",
                value=f"T = {slots}, there are {sorted(data.codes)}",
                cause="the file was made without this codebook",
                fix="make it again with `mbc train paper-data --codebook FILE`",
            )
        self._prompt_lengths = np.minimum(data.prompts.lengths, max_tokens)
        self._answer_lengths = np.minimum(data.answers.lengths, max_tokens - self._prompt_lengths)
        whole = _joined(data.prompts, data.answers)
        self._sequences = _matrix(whole, max_tokens, pad_id, device)
        words = _taken(data.words, data.rows)
        self._cue_lengths, self._word_lengths = data.cues.lengths, words.lengths
        self._cues = _matrix(_joined(data.cues, words), None, pad_id, device)
        self._passage_lengths, self._asked_lengths = data.passages.lengths, data.asked.lengths
        self._passages = None if slots is not None else _matrix(data.passages, None, encoder_pad_id, device)
        self._asked = None if embeddings is not None else _matrix(data.asked, None, encoder_pad_id, device)
        self._embeddings = None if embeddings is None else torch.from_numpy(embeddings).to(device)
        self._codes = None if slots is None else torch.from_numpy(data.codes[slots].astype(np.int64)).to(device)

    def batch(self, chosen: Chosen) -> Batch:
        """The tokens of ``chosen``; nothing here waits for the device."""
        documents, questions = self._sent(chosen.documents), self._sent(chosen.questions)
        starts, lengths = self._lengths(chosen)
        sequences = self._cues if chosen.cued else self._sequences
        longest = _padded(int((starts + lengths).max()), sequences.shape[1])
        ids = sequences[questions, :longest]
        flat = spread(np.arange(len(starts)) * longest + starts, lengths)
        places = self._sent(flat)
        asked = mask = None
        if self._asked is not None:
            asked, mask = self._cut(self._asked, questions, self._asked_lengths[chosen.questions])
        chunks, with_gradient, order = self._passage_chunks(chosen)
        return Batch(
            ids=ids.long(),
            places=places - 1,
            targets=ids.reshape(-1)[places].long(),
            asked=asked,
            asked_mask=mask,
            embeddings=None if self._embeddings is None else self._embeddings[questions],
            codes=None if self._codes is None else self._codes[documents],
            chunks=chunks,
            with_gradient=with_gradient,
            order=order,
            bank=chosen.bank,
        )

    def answer_tokens(self, chosen: Chosen) -> int:
        """How many tokens the answers of a whole step have."""
        return int(self._lengths(chosen)[1].sum())

    def passage_batches(self, rows: Int64, batch_tokens: int) -> list[tuple[Int64, Tensor, Tensor]]:
        """All of ``rows`` for the encoder: (rows, ids, mask), sorted by length, at most ``batch_tokens`` padded tokens.

        Raises:
            UsageError: the passages' tokens are not here (address codes).
        """
        if self._passages is None:
            raise UsageError(
                "passages with address codes are not encoded again", value=len(rows), fix="use their codes"
            )
        lengths = self._passage_lengths[rows]
        order, made, start = np.argsort(lengths, kind="stable"), [], 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * int(lengths[order[stop]]) <= batch_tokens:
                stop += 1
            own = rows[order[start:stop]]
            made.append((own, *self._cut(self._passages, self._sent(own), self._passage_lengths[own])))
            start = stop
        return made

    def codes_of(self, rows: Int64) -> Tensor:
        """Address codes int64 [n, T] of passages."""
        if self._codes is None:
            raise UsageError("there are no address codes", value=len(rows), fix="encode the passages")
        return self._codes[self._sent(rows)]

    def question_inputs(self, questions: Int64) -> tuple[Tensor, ...]:
        """What the model's question side takes: (ids, mask) int64 [n, S], or (embeddings,) float32 [n, d]."""
        sent = self._sent(questions)
        if self._embeddings is not None:
            return (self._embeddings[sent],)
        if self._asked is None:
            raise UsageError("the questions' tokens are not here", value=len(questions), fix="use their embeddings")
        return self._cut(self._asked, sent, self._asked_lengths[questions])

    def _lengths(self, chosen: Chosen) -> tuple[Int64, Int64]:
        """Tokens of each prompt, and of what is to follow it."""
        held = (self._cue_lengths, self._word_lengths) if chosen.cued else (self._prompt_lengths, self._answer_lengths)
        return held[0][chosen.questions], held[1][chosen.questions]

    def _passage_chunks(self, chosen: Chosen) -> tuple[tuple[tuple[Tensor, Tensor], ...], int, Tensor | None]:
        if self._passages is None:
            return (), 0, None
        lengths = self._passage_lengths[chosen.documents]
        pieces: list[Int64] = []
        with_gradient = 0
        for kept in (True, False):
            own = np.flatnonzero(chosen.kept == kept)
            own = own[np.argsort(lengths[own], kind="stable")]
            cut = [one for one in np.array_split(own, min(self._chunks, max(1, len(own)))) if len(one)]
            pieces += cut
            with_gradient += len(cut) if kept else 0
        chunks = tuple(self._cut(self._passages, self._sent(chosen.documents[one]), lengths[one]) for one in pieces)
        return chunks, with_gradient, self._sent(np.argsort(np.concatenate(pieces)))

    def _cut(self, matrix: Tensor, rows: Tensor, lengths: Int64) -> tuple[Tensor, Tensor]:
        """Rows of a token matrix up to their longest, and their mask, both int64."""
        longest = _padded(int(lengths.max()), matrix.shape[1])
        places = torch.arange(longest, device=self.device)
        return matrix[rows, :longest].long(), (places < self._sent(lengths)[:, None]).long()

    def _sent(self, values: NDArray[np.int64]) -> Tensor:
        """To the device without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def _matrix(lists: Ragged, longest: int | None, pad_id: int, device: torch.device) -> Tensor:
    """int32 [n, longest], right-padded; lists that are longer are cut."""
    width = int(lists.lengths.max(initial=1)) if longest is None else longest
    lengths = np.minimum(lists.lengths, width)
    made = np.full((len(lengths), width), pad_id, dtype=np.int32)
    places = spread(np.arange(len(lengths)) * width, lengths)
    made.reshape(-1)[places] = lists.values[spread(lists.starts, lengths)]
    return torch.from_numpy(made).to(device)


def _taken(lists: Ragged, rows: Int64) -> Ragged:
    """The lists ``rows``, which may repeat."""
    lengths = lists.lengths[rows]
    return Ragged(lists.values[spread(lists.starts[rows], lengths)], np.cumsum(lengths) - lengths, lengths)


def _joined(first: Ragged, second: Ragged) -> Ragged:
    """Each list of ``first`` with that of ``second`` behind it."""
    lengths = first.lengths + second.lengths
    starts = np.cumsum(lengths) - lengths
    values = np.empty(int(lengths.sum()), dtype=np.int32)
    values[spread(starts, first.lengths)] = first.values[spread(first.starts, first.lengths)]
    values[spread(starts + first.lengths, second.lengths)] = second.values[spread(second.starts, second.lengths)]
    return Ragged(values, starts, lengths)


def _padded(length: int, most: int) -> int:
    return min(most, -(-length // _PAD_TO) * _PAD_TO)
