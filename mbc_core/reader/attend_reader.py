"""The attend read as a bank's reader uses it: its own adapter on the base model's weights, and the projector."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mbc_core.codes import Float32
from mbc_core.reader.attend import PROJECTOR_FILE, load_projector
from mbc_core.reader.attend_prompt import answer_attend
from mbc_core.reader.kv_lora import load_adapter
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat, prompt_room


def shared_copy(base: LanguageModel) -> LanguageModel:
    """A model of its own modules on the very same weights: an adapter put on one is not on the other."""
    kept = {id(one): one for one in [*base.model.parameters(), *base.model.buffers()]}
    return replace(base, model=copy.deepcopy(base.model, kept))


class AttendReader:
    """Answers from passages' vectors.

    Args:
        base: the language model, without adapter; it is left as it is.
        folder: what ``mbc train attend`` wrote.
        encoder: id of the encoder that made the bank.

    Raises:
        ModelError: there are no such weights, or they were trained for another language model.
        IncompatibleBank: they read the vectors of another encoder.
        DamagedFile: they cannot be read.
    """

    def __init__(self, base: LanguageModel, folder: Path, encoder: str) -> None:
        self.projector = load_projector(folder / PROJECTOR_FILE, base_digest=base.digest, encoder=encoder).projector
        model, _ = load_adapter(shared_copy(base).model, folder, base_digest=base.digest)
        self.language_model = replace(base, model=model.eval())
        self._form = PromptFormat(base.tokenizer)

    def answer(
        self,
        passages: Sequence[Float32],
        questions: Sequence[str],
        vectors: Float32,
        scores: Sequence[Sequence[float]] | None = None,
    ) -> list[str]:
        """Answers to questions with the vectors of their passages, best first, before them.

        Args:
            passages: for each question x̂ of its passages, float32 [k, d].
            vectors: q, float32 [n, d], unit norm.
            scores: that the passages were found with, see :func:`mbc_core.reader.attend_prompt.answer_attend`.
        """
        room = prompt_room(self.language_model)
        answers, _ = answer_attend(
            self.language_model, self.projector, self._form, passages, questions, vectors, scores, max_tokens=room
        )
        return answers
