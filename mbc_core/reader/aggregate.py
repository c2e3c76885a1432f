"""The aggregate read, the paper's own: a question reads the whole bank at once, from the histogram of its codes.

No passage is recalled and nothing stands before the question: cross-attention over all code vectors becomes a key and
value prefix of every layer. Cost does not grow with the bank. So no source can be named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.errors import DamagedFile, IncompatibleBank
from mbc_core.paper.aggregation import Memory, histogram_memory
from mbc_core.paper.files import load_paper_model
from mbc_core.paper.model import PaperModel
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prefix_cache import Pairs
from mbc_core.reader.prompt import PromptFormat, prompt_room

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank
    from mbc_core.histogram import Histogram

CARD = "card.json"


class AggregateReader:
    """Answers questions from code histograms with the weights of one folder.

    Args:
        folder: what ``mbc train paper --codes address`` wrote.
        base: the language model it was trained on, without adapter; its KV-LoRA is put on it.

    Attributes:
        slots: T of the banks that it reads.
        model: the paper's model.

    Raises:
        DamagedFile: the folder cannot be read.
        ModelError: it was trained with another language model.
        IncompatibleBank: it reads learned codes, which no bank holds.
    """

    def __init__(self, folder: Path, base: LanguageModel) -> None:
        self._card = read_card(folder)
        self.model: PaperModel = load_paper_model(folder, base).to(base.device)
        if self.model.config.codes != "address":
            raise IncompatibleBank(
                "these weights read learned codes",
                value=str(folder),
                cause="banks hold address codes",
                fix="train weights with `mbc train paper --codes address`",
            )
        self.slots = self.model.config.tokens
        self._form = PromptFormat(base.tokenizer)

    def require_bank(self, encoder: str, rotation: str, slots: int) -> None:
        """Refuse a bank whose codes mean something else.

        Args:
            encoder, rotation: as the bank's manifest spells them. slots: its T.

        Raises:
            IncompatibleBank: another T, encoder or rotation.
        """
        wanted = self._card["data"]
        model = encoder.partition("/")[0].rpartition("@")[2]
        for what, ours, theirs in (
            ("T", self.slots, slots),
            ("encoder", wanted["encoder"], model),
            ("rotation", wanted["rotation"], rotation),
        ):
            if ours != theirs:
                raise IncompatibleBank(
                    f"the bank was made with another {what} than the weights of the aggregate read",
                    value=theirs,
                    cause=f"they were trained for {ours}",
                    fix="read the bank another way, or train weights for it with `mbc train paper --codes address`",
                )

    def memory(self, histogram: Histogram, bank: Bank) -> Memory | None:
        """A bank's codes as what the model reads; None for an empty bank."""
        return self.memory_of({version: bank.codebook(version).codewords for version in histogram.cells}, histogram)

    def memory_of(self, codewords: Mapping[int, NDArray[np.float32]], histogram: Histogram) -> Memory | None:
        """The same from codebooks by version, float32 [K, d_c] each."""
        device = self.model.language_model.device
        counted = histogram.cells if self.model.config.slot_marks else histogram.counts
        held = [(version, counts) for version, counts in sorted(counted.items()) if counts.any()]
        if not held:
            return None
        return histogram_memory(
            [(_tensor(codewords[version], device), _tensor(counts, device)) for version, counts in held]
        )

    def answer(
        self,
        questions: Sequence[str],
        embeddings: NDArray[np.float32],
        memory: Memory | None,
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Greedy answers.

        Args:
            embeddings: of the questions, float32 [n, d], unit norm.
            memory: of :meth:`memory`; None answers without any.

        Raises:
            UsageError: a question is too long.
        """
        language_model = self.model.language_model
        asked = _tensor(embeddings, language_model.device)

        def prefixes(places: Sequence[int]) -> Pairs:
            with torch.no_grad():
                return self.model.read(self.model.queries(embeddings=asked[list(places)]), memory)

        prompts = self.prompts(questions)
        return answer_prompts(
            language_model, self._form, prompts, prefixes=prefixes, batch_tokens=batch_tokens, progress=progress
        )

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """What the language model is shown beside the prefix: the question alone."""
        room = prompt_room(self.model.language_model)
        return [self._form.build([], question, room).ids for question in questions]


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a folder of weights, with the encoder and rotation that it names.

    Raises:
        DamagedFile: it is missing or is no card.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
        card["data"]["encoder"], card["data"]["rotation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(
            "the card of the aggregate read's weights cannot be read",
            value=str(folder / CARD),
            cause=f"{type(error).__name__}: {error}",
            fix="restore the folder, or train the weights again with `mbc train paper`",
        ) from error
    return card


def _tensor(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).to(device)  # a copy: what is frozen elsewhere may not be written
