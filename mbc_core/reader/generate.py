"""Greedy answers, in batches sorted by length; with a key and value prefix of every layer, if one is given.

In float32 a question gets the same answer alone and in company; in bfloat16 padding may tip a near tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

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
) -> list[str]:
    """Greedy continuations of the prompts, cut at end of text or line break.

    Args:
        prompts: token ids of each prompt.
        new_tokens: most tokens an answer may have.
        batch_tokens: most tokens of a batch, padding included; None is what suits the device.
        progress: told how many more prompts are done.
        embed: input embeddings of a batch, where ids alone do not say them (soft tokens); None looks the ids up.
        prefixes: places of the prompts in a batch → their prefix (see :func:`greedy`).

    Returns:
        one answer a prompt, in the given order.
    """
    if batch_tokens is None:
        batch_tokens = _GPU_TOKENS if language_model.device.type == "cuda" else _CPU_TOKENS
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers = [""] * len(prompts)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(prompts[order[stop]]) <= batch_tokens:
            stop += 1
        places = order[start:stop]
        embedded = None if embed is None else partial(embed, places)
        prefix = None if prefixes is None else prefixes(places)
        batch = [prompts[place] for place in places]
        made = greedy(language_model, batch, form.stop_ids, new_tokens, embedded, prefix)
        for place, ids in zip(places, made, strict=True):
            answers[place] = form.text(ids)
        if progress is not None:
            progress(len(places))
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
) -> list[list[int]]:
    """The likeliest next token, up to ``new_tokens`` times, for one left-padded batch.

    Args:
        embed: left-padded ids → input embeddings of the prompts; None looks the ids up.
        prefix: key and value of each layer, [batch, key-value heads, virtual tokens, head width]: attended by every
            token, before the first; positions start after it.

    Returns:
        the new ids of each prompt, its stop id included when it came.
    """
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
        following = out.logits[:, -1].argmax(-1)
        following = torch.where(done, stops[0], following)
        steps.append(following)
        done = done | torch.isin(following, stops)
        if bool(done.all()):
            break
        shown = {"input_ids": following[:, None]}
        last = torch.zeros_like(last)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [_until_stop(row, stop_ids) for row in torch.stack(steps, 1).tolist()]


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
