"""Greedy answers, in batches sorted by length; with a key and value prefix of every layer, if one is given.

Prompts may be tied: those of one question, each with another passage, go on with the same token, the likeliest of the
weighted mean of their distributions (RAG-token, Lewis et al. 2020).

In float32 a question gets the same answer alone and in company; in bfloat16 padding may tip a near tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from mbc_core.errors import UsageError
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prefix_cache import Pairs, prefix_cache
from mbc_core.reader.prompt import PromptFormat

Embed: TypeAlias = Callable[[Sequence[int], Tensor], Tensor]
"""(places of the prompts in a batch, their left-padded ids [batch, longest]) → input embeddings for them."""

NEW_TOKENS = 14
_GPU_TOKENS = 131_072  # a step of generation costs the same launches for ten rows as for a thousand
_CPU_TOKENS = 4_096  # more is no faster on a CPU, and takes gigabytes


def answer_prompts(
    language_model: LanguageModel,
    form: PromptFormat,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = NEW_TOKENS,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    embed: Embed | None = None,
    prefixes: Callable[[Sequence[int]], Pairs] | None = None,
    tied: Sequence[Sequence[float]] | None = None,
) -> list[str]:
    """Greedy continuations of the prompts, cut at end of text or line break.

    Args:
        prompts: token ids of each prompt.
        new_tokens: most tokens an answer may have.
        batch_tokens: most tokens of a batch, padding included; None is what suits the device.
        progress: told how many more answers are done.
        embed: input embeddings of a batch, where ids alone do not say them (soft tokens); None looks the ids up.
        prefixes: places of the prompts in a batch → their prefix (see :func:`greedy`).
        tied: see :func:`greedy`; the prompts of one question are never parted.

    Returns:
        one answer a prompt, or a question if prompts are tied, in the given order.

    Raises:
        UsageError: other weights than prompts.
    """
    if batch_tokens is None:
        batch_tokens = _GPU_TOKENS if language_model.device.type == "cuda" else _CPU_TOKENS
    questions = _tied_places(len(prompts), tied)
    longest = [max(len(prompts[place]) for place in places) for places in questions]
    order = sorted(range(len(questions)), key=longest.__getitem__)
    answers = [""] * len(questions)
    start = 0
    while start < len(order):
        stop, rows = start + 1, len(questions[order[start]])
        while stop < len(order) and (rows + len(questions[order[stop]])) * longest[order[stop]] <= batch_tokens:
            rows += len(questions[order[stop]])
            stop += 1
        chosen = order[start:stop]
        places = [place for one in chosen for place in questions[one]]
        embedded = None if embed is None else partial(embed, places)
        prefix = None if prefixes is None else prefixes(places)
        batch = [prompts[place] for place in places]
        weights = None if tied is None else [tied[one] for one in chosen]
        made = greedy(language_model, batch, form.stop_ids, new_tokens, embedded, prefix, weights)
        for one, ids in zip(chosen, made, strict=True):
            answers[one] = form.text(ids)
        if progress is not None:
            progress(len(chosen))
        start = stop
    return answers


@torch.inference_mode()
def greedy(
    language_model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    new_tokens: int,
    embed: Callable[[Tensor], Tensor] | None = None,
    prefix: Pairs | None = None,
    tied: Sequence[Sequence[float]] | None = None,
) -> list[list[int]]:
    """The likeliest next token, up to ``new_tokens`` times, for one left-padded batch.

    Args:
        embed: left-padded ids → input embeddings of the prompts; None looks the ids up.
        prefix: key and value of each layer, [batch, key-value heads, virtual tokens, head width]: attended by every
            token, before the first; positions start after it.
        tied: for each question the weights (they sum to 1) of its prompts, which follow each other; None: every
            prompt is a question of its own.

    Returns:
        the new ids of each question, its stop id included when it came.

    Raises:
        UsageError: other weights than prompts.
    """
    first = [places[0] for places in _tied_places(len(prompts), tied)]
    ids, mask = _left_padded(prompts, language_model.pad_id, language_model.device)
    stops = torch.tensor(list(stop_ids), device=ids.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
    cache = None
    if prefix is not None:
        cache = prefix_cache(prefix, language_model.model.dtype)
        virtual = prefix[0][0].shape[2]
        mask = torch.cat([mask.new_ones(len(prompts), virtual), mask], dim=1)
        positions = positions + virtual
    steps: list[Tensor] = []
    shown = {"input_ids": ids} if embed is None else {"inputs_embeds": embed(ids)}
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    for _ in range(new_tokens):
        out = language_model.model(
            **shown,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            # A number would slice the last states, and torch's bfloat16 product of a slice copies the whole
            # vocabulary matrix for every row: 60 MB a question. An index gathers them into one piece.
            logits_to_keep=last,
        )
        cache = out.past_key_values
        following = out.logits[:, -1].argmax(-1) if tied is None else _agreed(out.logits[:, -1], tied)
        following = torch.where(done, stops[0], following)
        steps.append(following)
        done = done | torch.isin(following, stops)
        if bool(done.all()):
            break
        shown = {"input_ids": following[:, None]}
        last = torch.zeros_like(last)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [_until_stop(row, stop_ids) for row in torch.stack(steps, 1)[first].tolist()]


def _agreed(logits: Tensor, tied: Sequence[Sequence[float]]) -> Tensor:
    """The token that the prompts of each question go on with, int64 [rows], of logits [rows, V]."""
    counts = torch.tensor([len(weights) for weights in tied])
    owner = torch.arange(len(tied)).repeat_interleave(counts).to(logits.device)
    weights = torch.tensor([one for weights in tied for one in weights], device=logits.device)
    likely = logits.float().softmax(-1) * weights[:, None]
    return likely.new_zeros(len(tied), likely.shape[1]).index_add_(0, owner, likely).argmax(-1)[owner]


def _tied_places(prompts: int, tied: Sequence[Sequence[float]] | None) -> list[list[int]]:
    """Places of each question's prompts."""
    if tied is None:
        return [[place] for place in range(prompts)]
    counts = [len(weights) for weights in tied]
    if sum(counts) != prompts or not all(counts):
        raise UsageError(
            "the prompts cannot be tied",
            value=f"{prompts} prompts, weights of {sum(counts)} in {len(counts)} questions",
            cause="every prompt needs one weight, and every question a prompt",
            fix="give a list of weights a question, as many as it has prompts",
        )
    starts = list(accumulate(counts, initial=0))
    return [list(range(start, start + count)) for start, count in zip(starts, counts, strict=False)]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, both int64 [batch, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, one in enumerate(ids):
        if one in stop_ids:
            return ids[: place + 1]
    return ids
