"""F1 of an adapter on the questions that nobody trains on, question by question."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbc_core.evaluation.metrics import f1
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.set_file import JUDGED, Example

EVALUATED_LINES = 5


def judge_questions(
    examples: Sequence[Example], language_model: LanguageModel, form: PromptFormat, room: int
) -> dict[str, NDArray[np.float64]]:
    """F1 in points of every held-out and canary question, read from the five best lines, as answers are.

    Args:
        examples: those to train on are passed over.
        room: most tokens of a prompt.

    Returns:
        split → float64 [questions of the split], in the order of the examples; all of ``new, old, canary``.
    """
    asked = [one for one in examples if one.split in JUDGED]
    scores = score_examples(asked, language_model, form, room)
    return {
        split: np.array([score for one, score in zip(asked, scores, strict=True) if one.split == split])
        for split in JUDGED
    }


def score_examples(
    examples: Sequence[Example], language_model: LanguageModel, form: PromptFormat, room: int
) -> NDArray[np.float64]:
    """F1 in points of these questions: float64 [n]. The model is left in evaluation mode."""
    language_model.model.eval()
    prompts = [form.build(one.lines[:EVALUATED_LINES], one.question, room).ids for one in examples]
    answers = answer_prompts(language_model, form, prompts)
    return np.array([100 * f1(answer, [one.answer]) for answer, one in zip(answers, examples, strict=True)])


def documents_of(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Split → document of each of its questions, in the order of :func:`judge_questions`."""
    return {split: [one.document for one in examples if one.split == split] for split in JUDGED}
