"""The prompts of an adaptation: questions with the memory lines that the bank gave, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Composed, MicroBatch, Ragged, micro_batches
from mbc_core.training.judge import EVALUATED_LINES
from mbc_core.training.set_file import Example

_MEMORY_SIZES = (1, 3, 5, 8)
NO_MEMORY = 0.04
_ENDS_SEEN = 8
_SHUFFLED = 0.5


@dataclass
class AdaptBatches:
    """The batches of one run.

    Attributes:
        training, dev: questions to train on, and held back.
        form, room: how prompts are spelt, and the most tokens of one with its answer.
        pad_id, batch, batch_tokens: as :func:`mbc_core.training.batches.micro_batches` takes them.
    """

    training: Sequence[Example]
    dev: Sequence[Example]
    form: PromptFormat
    room: int
    pad_id: int
    batch: int
    batch_tokens: int
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def step(self, number: int, seed: int, no_memory: float = NO_MEMORY) -> list[MicroBatch]:
        """The batches of step ``number``, the same whatever steps were asked for before."""
        rng = np.random.default_rng([seed, number])
        chosen = [self.training[place] for place in self._places(number, seed)]
        composed = compose(chosen, self.form, self.room, rng, no_memory)
        return micro_batches(composed, self.pad_id, self.batch_tokens, self.batch, (seed, number, 1))

    def shown_dev(self, no_memory: float = NO_MEMORY) -> list[Example]:
        """The held-back questions as they are asked: without memory for a closed book."""
        return [replace(one, lines=()) if no_memory >= 1 else one for one in self.dev]

    def dev_batches(self, no_memory: float = NO_MEMORY) -> list[MicroBatch]:
        """Held-back questions with the five best lines, as answers read them, and their answers."""
        shown = self.shown_dev(no_memory)
        memory = [list(one.lines[:EVALUATED_LINES]) for one in shown]
        composed = _composed(shown, memory, self.form, self.room)
        return micro_batches(composed, self.pad_id, self.batch_tokens, len(shown), (0,))

    def _places(self, number: int, seed: int) -> list[int]:
        """Every question once before any comes again: the epochs' permutations in a row, cut into steps."""
        count = len(self.training)
        wanted = range(number * self.batch, (number + 1) * self.batch)
        return [self._order(place // count, seed)[place % count] for place in wanted]

    def _order(self, epoch: int, seed: int) -> list[int]:
        if epoch not in self._orders:
            order = np.random.default_rng([seed, epoch, 2]).permutation(len(self.training)).tolist()
            self._orders = {one: kept for one, kept in self._orders.items() if one >= epoch - 1} | {epoch: order}
        return self._orders[epoch]


def compose(
    examples: Sequence[Example],
    form: PromptFormat,
    room: int,
    rng: np.random.Generator,
    no_memory: float = NO_MEMORY,
) -> Composed:
    """Prompts as the bank gives them, with the true document among their lines, and a few without memory."""
    return _composed(examples, [_lines(one, rng, no_memory) for one in examples], form, room)


def learned_end(language_model: LanguageModel, form: PromptFormat, examples: Sequence[Example]) -> list[int]:
    """The token with which an adapted model ends its answers.

    Releases of transformers name different tokens as a GGUF's end of text. Teaching an adapter another one than it
    was first trained with would cost it many steps, and its answers.

    Args:
        examples: the first few are looked at.

    Returns:
        the one likeliest of ``form.stop_ids`` after the true answers.
    """
    total = torch.zeros(len(form.stop_ids))
    for one in examples[:_ENDS_SEEN]:
        answered = form.answer(one.answer)[: -len(form.end)]
        ids = [*form.build([one.true_line], one.question).ids, *answered]
        with torch.no_grad():
            logits = language_model.model(input_ids=torch.tensor([ids], device=language_model.device)).logits[0, -1]
        total += torch.log_softmax(logits.float(), -1)[form.stop_ids].cpu()
    return [form.stop_ids[int(total.argmax())]]


def _composed(examples: Sequence[Example], memory: Sequence[Sequence[str]], form: PromptFormat, room: int) -> Composed:
    prompts, answers = [], []
    for one, lines in zip(examples, memory, strict=True):
        answer = form.answer(one.answer)
        prompt = form.build(lines, one.question, room - len(answer)).ids
        prompts.append([*prompt, *answer])
        answers.append(len(answer))
    return Composed(Ragged.of(prompts), np.array(answers, dtype=np.int64))


def _lines(one: Example, rng: np.random.Generator, no_memory: float) -> list[str]:
    """1, 3, 5 or 8 lines in the bank's order or shuffled; the true line replaces the last when it is missing."""
    if rng.random() < no_memory:
        return []
    count = int(rng.choice(_MEMORY_SIZES))
    lines = list(one.lines[:count])
    if one.true is None or one.true >= len(lines):
        lines[-1:] = [one.true_line]
    if rng.random() < _SHUFFLED:
        rng.shuffle(lines)
    return lines
