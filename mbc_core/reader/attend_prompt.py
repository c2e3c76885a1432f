"""Prompts of the attend read: where a memory line would stand, soft tokens and a line break; and their answers.

Several passages whose scores are known get a prompt each, see :mod:`mbc_core.reader.attend_mixture`; without scores
they stand in one prompt, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mbc_core.codes import Float32
from mbc_core.errors import UsageError
from mbc_core.reader.attend import AttendProjector
from mbc_core.reader.attend_mixture import passage_weights
from mbc_core.reader.generate import NEW_TOKENS, Embed, answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import MAX_PROMPT_TOKENS, Prompt, PromptFormat

_AT_ONCE = 512  # passages: a distribution over the dictionary each


def attend_prompt(
    form: PromptFormat, passages: int, question: str, soft_tokens: int, pad_id: int, max_tokens: int = MAX_PROMPT_TOKENS
) -> Prompt:
    """Ids of a prompt with room for the soft tokens of ``passages`` passages, best first.

    Args:
        soft_tokens: a passage.
        pad_id: id that stands where a soft token will be put; it is never read.

    Returns:
        the prompt; ``lines`` says how many passages it holds, the last ones going first when room is short.

    Raises:
        UsageError: the question alone is longer than ``max_tokens``.
    """
    asked = form.build([], question, max_tokens).ids  # refuses a question that is too long
    line = soft_tokens + len(form.newline)
    held = min(passages, (max_tokens - len(asked)) // line)
    start = len(form.start)
    return Prompt([*asked[:start], *([*[pad_id] * soft_tokens, *form.newline] * held), *asked[start:]], held)


def soft_places(form: PromptFormat, prompt: Prompt, soft_tokens: int) -> list[int]:
    """Place of the first soft token of each passage in a prompt's ids."""
    line = soft_tokens + len(form.newline)
    return [len(form.start) + number * line for number in range(prompt.lines)]


def put(embedded: Tensor, soft: Tensor, first: Tensor) -> Tensor:
    """Input embeddings [batch, longest, width] with soft tokens in their places.

    Args:
        soft: [lines, soft_tokens, width].
        first: int64 [lines], each line's first place in the flattened batch.
    """
    places = first[:, None] + torch.arange(soft.shape[1], device=first.device)
    flat = embedded.flatten(0, 1)
    return flat.index_copy(0, places.flatten(), soft.flatten(0, 1).to(flat.dtype)).view_as(embedded)


def soft_embedding(
    language_model: LanguageModel, form: PromptFormat, prompts: Sequence[Prompt], soft: Sequence[Tensor]
) -> Embed:
    """What :func:`mbc_core.reader.generate.answer_prompts` needs to show soft tokens.

    Args:
        soft: for each prompt its soft tokens, best passage first, [≥ prompt.lines, soft_tokens, width].
    """
    look_up = language_model.model.get_input_embeddings()

    def embed(places: Sequence[int], ids: Tensor) -> Tensor:
        embedded: Tensor = look_up(ids)
        longest = ids.shape[1]
        shown = [(row, place) for row, place in enumerate(places) if prompts[place].lines]
        if not shown:
            return embedded
        first = [
            row * longest + longest - len(prompts[place].ids) + at
            for row, place in shown
            for at in soft_places(form, prompts[place], soft[place].shape[1])
        ]
        tokens = torch.cat([soft[place][: prompts[place].lines] for _, place in shown])
        return put(embedded, tokens.to(ids.device), torch.tensor(first, device=ids.device))

    return embed


@torch.inference_mode()
def read_vectors(
    projector: AttendProjector, passages: Sequence[Float32], questions: Float32, embeddings: Tensor
) -> list[Tensor]:
    """Soft tokens of each question's passages.

    Args:
        passages: for each question x̂ of its passages, best first, float32 [k, d].
        questions: q, float32 [n, d], unit norm.
        embeddings: of the language model's vocabulary, [V, lm_width].

    Returns:
        for each question [k, soft_tokens, lm_width], on the device of ``embeddings``.

    Raises:
        UsageError: vectors of another width than the projector's.
    """
    widths = {one.shape[-1] for one in passages}
    if len(passages) != len(questions) or any(one.shape[1:] != (projector.config.width,) for one in passages):
        raise UsageError(
            "the vectors do not fit the attend projector",
            value=f"{len(passages)} lists, {len(questions)} questions, widths {widths}",
            cause=f"vectors of width {projector.config.width} are expected, a list a question",
            fix="use the encoder that the projector was trained for",
        )
    counts, device = [len(one) for one in passages], embeddings.device
    if not sum(counts):
        empty = torch.zeros(0, projector.config.soft_tokens, projector.config.lm_width, device=device)
        return [empty for _ in counts]
    projector = projector.to(device).eval()
    stacked = torch.from_numpy(np.concatenate(passages).astype(np.float32)).to(device)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    asked = torch.from_numpy(np.asarray(questions, dtype=np.float32)).to(device)
    soft = [
        projector(stacked[start : start + _AT_ONCE], asked[owner[start : start + _AT_ONCE]], embeddings)
        for start in range(0, len(owner), _AT_ONCE)
    ]
    return list(torch.split(torch.cat(soft), counts))


def answer_attend(
    language_model: LanguageModel,
    projector: AttendProjector,
    form: PromptFormat,
    passages: Sequence[Float32],
    questions: Sequence[str],
    question_vectors: Float32,
    scores: Sequence[Sequence[float]] | None = None,
    *,
    max_tokens: int = MAX_PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str], list[Prompt]]:
    """Greedy answers to questions with the vectors of their passages before them.

    Args:
        passages, question_vectors: as :func:`read_vectors` takes them.
        scores: for each question those of its passages; each passage is then read in a prompt of its own. None:
            all stand in one prompt. One passage or none is read the same either way.
        max_tokens: of a prompt; passages go, the last ones first, never the question.

    Returns:
        the answers, and what was read for each question: the ids of its prompts one after the other.

    Raises:
        UsageError: vectors of another width, other scores than passages, or a question that is too long.
    """
    soft = read_vectors(projector, passages, question_vectors, language_model.model.get_input_embeddings().weight)
    tied = _tied(passages, scores)
    shown = [list(torch.split(found, 1)) if tied is not None and len(found) else [found] for found in soft]
    size, pad = projector.config.soft_tokens, language_model.pad_id
    prompts = [
        [attend_prompt(form, len(lines), question, size, pad, max_tokens) for lines in own]
        for own, question in zip(shown, questions, strict=True)
    ]
    every = [one for own in prompts for one in own]
    answers = answer_prompts(
        language_model,
        form,
        [one.ids for one in every],
        new_tokens=new_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
        embed=soft_embedding(language_model, form, every, [lines for own in shown for lines in own]),
        tied=tied,
    )
    return answers, [Prompt([i for one in own for i in one.ids], sum(one.lines for one in own)) for own in prompts]


def _tied(passages: Sequence[Float32], scores: Sequence[Sequence[float]] | None) -> list[list[float]] | None:
    """Weights of each question's prompts; None where no question has several."""
    if scores is None or all(len(found) <= 1 for found in passages):
        return None
    counts = [len(found) for found in passages]
    if [len(one) for one in scores] != counts:
        raise UsageError(
            "the scores do not fit the passages",
            value=f"{[len(one) for one in scores][:8]} scores, {counts[:8]} passages",
            cause="every passage needs the score that it was found with",
            fix="give a list of scores a question, in the order of its passages",
        )
    return [passage_weights(one) or [1.0] for one in scores]
