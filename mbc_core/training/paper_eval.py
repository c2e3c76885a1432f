"""What a trained paper model answers from banks of many sizes, beside its controls.

A bank is built from the codes of all passages of a set and read as a histogram. The shuffled bank holds as many
passages of other documents; the permuted one the same counts under other codewords. Small banks hold the passage that
answers and random others: they show where a histogram read stops knowing documents apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.codes import code_size
from mbc_core.evaluation.table import format_row, measured_row
from mbc_core.paper.aggregation import Memory, cell_counts, code_counts, histogram_memory
from mbc_core.paper.model import PaperModel
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.prefix_cache import Pairs
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Int64
from mbc_core.training.paper_batches import OnDevice
from mbc_core.training.paper_data import PaperData, as_lists
from schemas.results import EvalRow

_ENCODE_TOKENS = 65_536
_GPU_TOKENS, _CPU_TOKENS = 32_768, 4_096
_FLOAT_BANK = 64
"""Largest bank that is drawn for each question by itself vector by vector, where K counts do not say everything."""


@dataclass(frozen=True, eq=False)
class CodeSet:
    """One set's passages as the model keeps them.

    Attributes:
        codes: int64 [N, T]; without quantization float32 [N, T, d_c].
        vectors: E, [K, d_c].
        marked: the model has slot marks: codes are counted by slot.
    """

    codes: Tensor
    vectors: Tensor
    marked: bool = False

    @property
    def counted(self) -> bool:
        """Whether the bank is codes, which can be counted."""
        return not self.codes.is_floating_point()

    def memory(self, rows: Tensor | None = None) -> Memory:
        """All passages, or ``rows`` [n] of them, or a bank of its own for each question: ``rows`` [B, n]."""
        codes = self.codes if rows is None else self.codes[rows]
        if not self.counted:
            many = rows is not None and rows.dim() == 2
            return Memory(codes.flatten(1, 2) if many else codes.flatten(0, 1), None, self._slots(rows))
        if rows is None or rows.dim() == 1:
            count = cell_counts if self.marked else code_counts
            return histogram_memory([(self.vectors, count(codes, len(self.vectors)))])
        if self.marked:
            return Memory(self.vectors[codes.flatten(1)], None, self._slots(rows))
        flat = codes.flatten(1)
        counts = torch.zeros(len(flat), len(self.vectors), device=flat.device)
        return Memory(self.vectors, counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype)))

    def _slots(self, rows: Tensor | None) -> Tensor:
        """Of the vectors of all passages, or of one bank of ``rows``."""
        passages = len(self.codes) if rows is None else rows.shape[-1]
        return torch.arange(self.codes.shape[1], device=self.codes.device).repeat(passages)


def code_set(model: PaperModel, on_device: OnDevice, rows: Int64) -> CodeSet:
    """Encode the passages ``rows`` as online adaptation does, or take their address codes."""
    vectors = model.code_vectors().detach()
    if model.amortizer is None:
        return CodeSet(on_device.codes_of(rows), vectors, model.config.slot_marks)
    parts, places = [], []
    for own, ids, mask in on_device.passage_batches(rows, _ENCODE_TOKENS):
        parts.append(model.encode_documents(ids, mask))
        places.append(own)
    order = np.argsort(np.concatenate(places)) if len(rows) else np.zeros(0, np.int64)
    back = np.empty(len(rows), dtype=np.int64)
    back[np.argsort(rows)] = order
    codes = torch.cat(parts)[torch.from_numpy(back).to(on_device.device)]
    return CodeSet(codes, vectors, model.config.slot_marks)


def evaluate_paper(
    model: PaperModel,
    data: PaperData,
    on_device: OnDevice,
    form: PromptFormat,
    *,
    strangers: CodeSet | None = None,
    closed: bool = False,
    banks: Sequence[int] = (1, 16, 256),
    limit: int | None = 500,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[EvalRow]:
    """Answer a set's questions from its whole bank, from banks that cannot know, and from small ones.

    Args:
        data, on_device: the set; all its passages are the bank.
        strangers: passages of other documents, at least as many, for the shuffled bank; None leaves it out.
        closed: the model was trained without memory: only the closed book is asked.
        banks: sizes of small banks that hold the right passage; rows ``bank of n``.
        limit: at most so many questions, drawn by the seed.

    Returns:
        rows; ``k`` is the number of passages in the bank.
    """
    chosen = np.arange(len(data.rows))
    if limit is not None and limit < len(chosen):
        chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), limit, replace=False))
    asker = _Asker(model, data, on_device, form, chosen, seed, say)
    model.eval()
    if closed:
        return [asker.row("closed", 0, lambda places: None, 0.0)]
    own = code_set(model, on_device, np.arange(len(data)))
    config = model.config
    size = float(code_size(config.tokens)) if own.counted else 4.0 * config.tokens * config.code_width
    whole = own.memory()
    rows = [asker.row("aggregate", len(data), lambda places: whole, size)]
    if strangers is not None:
        drawn = np.random.default_rng(seed).permutation(len(strangers.codes))[: len(data)]
        other = strangers.memory(torch.from_numpy(drawn).to(on_device.device))
        rows.append(asker.row("shuffled", len(drawn), lambda places: other, size))
    if own.counted:
        order = np.random.default_rng(seed).permutation(len(own.vectors))
        permuted = replace(own, codes=torch.from_numpy(order).to(on_device.device)[own.codes]).memory()
        rows.append(asker.row("permuted", len(data), lambda places: permuted, size))
    for bank in banks:
        if bank <= len(data) and (bank <= _FLOAT_BANK or (own.counted and not own.marked)):
            small = torch.from_numpy(small_banks(data.rows[chosen], len(data), bank, seed)).to(on_device.device)
            rows.append(asker.row(f"bank of {bank}", bank, lambda places, s=small: own.memory(s[places]), size))  # type: ignore[misc]
    return rows


def answer_tokens(device: torch.device, *, floats: bool) -> int:
    """Prompt tokens answered at once: a bank of floats has its keys and values copied for every question."""
    return _GPU_TOKENS if device.type == "cuda" and not floats else _CPU_TOKENS


def own_vectors(model: PaperModel) -> bool:
    """Whether a small bank is read vector by vector: without quantization, or where slots are told apart."""
    return not model.config.quantize or model.config.slot_marks


def small_banks(right: Int64, passages: int, size: int, seed: int) -> Int64:
    """For each question the passage that answers and ``size - 1`` distinct others: int64 [questions, size]."""
    made = np.empty((len(right), size), dtype=np.int64)
    for number, row in enumerate(right.tolist()):
        others = np.random.default_rng([seed, number]).permutation(passages - 1)[: size - 1]
        made[number] = [row, *np.where(others >= row, others + 1, others)]
    return made


@dataclass(frozen=True, eq=False)
class _Asker:
    model: PaperModel
    data: PaperData
    on_device: OnDevice
    form: PromptFormat
    chosen: NDArray[np.int64]
    seed: int
    say: Callable[[str], None]

    def row(self, read: str, k: int, memory: Callable[[list[int]], Memory | None], size: float) -> EvalRow:
        """One row: ``memory`` gives the bank of the questions at these places of ``chosen``."""
        language_model = self.model.language_model
        spelt = as_lists(self.data.prompts)
        prompts = [spelt[place] for place in self.chosen.tolist()]

        def prefixes(places: Sequence[int]) -> Pairs:
            with torch.no_grad():
                asked = self.on_device.question_inputs(self.chosen[list(places)])
                named = {"embeddings": asked[0]} if len(asked) == 1 else {"ids": asked[0], "mask": asked[1]}
                return self.model.read(self.model.queries(**named), memory(list(places)))

        began = time.perf_counter()
        predictions = answer_prompts(
            language_model, self.form, prompts, prefixes=prefixes,
            batch_tokens=answer_tokens(language_model.device, floats=own_vectors(self.model)),
        )  # fmt: skip
        spent = 1e3 * (time.perf_counter() - began) / max(1, len(prompts))
        accepted = [self.data.accepted[place] for place in self.chosen.tolist()]
        codes = "floats" if not self.model.config.quantize else self.model.config.codes
        row = measured_row(
            read,
            f"{codes} T={self.model.config.tokens}",
            k,
            predictions,
            accepted,
            bytes_per_passage=size,
            prompt_tokens=float(np.mean([len(one) for one in prompts])),
            milliseconds=spent,
            seed=self.seed,
        )
        self.say(format_row(row))
        return row
