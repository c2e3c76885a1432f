"""The methods at both ends of the paper's comparison: no memory at all, and the documents' full text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.errors import UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.answers import MAX_PROMPT, adapted
from mbc_core.evaluation.methods import BankSize, MethodSet, folder_digest
from mbc_core.reader.generate import NEW_TOKENS, answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat


class ClosedBook:
    """The language model with an adapter that was trained equally, but never with a memory; see :class:`Method`.

    Args:
        base: the language model, without adapter.
        adapter: folder of its KV-LoRA; None: the base as it is.
    """

    name = "closed"
    says = "no memory: an adapter trained equally on the same questions, without documents"

    def __init__(self, base: LanguageModel, adapter: Path | None, *, batch_tokens: int | None = None) -> None:
        self._base, self._adapter, self._batch_tokens = base, adapter, batch_tokens
        self.identity = _identity(base, adapter)

    def start(self, data: MethodSet) -> None:
        """Take up the questions."""
        self._data = data

    def adapt(self, documents: Sequence[int]) -> None:
        """Documents pass by."""

    def answer(self, questions: Sequence[int]) -> list[str]:
        """Answer from the weights alone."""
        asked = [self._data.prepared.questions[one] for one in questions]
        return _answer(self._base, self._adapter, [[] for _ in asked], asked, self._batch_tokens)

    def size(self) -> BankSize:
        """Nothing but the adapter."""
        return BankSize("none", model=_stored(self._adapter))

    def close(self) -> None:
        """Nothing was changed."""


class FullText:
    """Keeps every passage's text, finds ``k`` of them by address code and shows them; see :class:`Method`.

    Args:
        adapter: KV-LoRA trained equally on full text.
        rotation, codebook: R and E of the address codes.
        k: passages shown.
    """

    def __init__(
        self,
        base: LanguageModel,
        adapter: Path,
        rotation: Rotation,
        codebook: Codebook,
        *,
        k: int = 5,
        batch_tokens: int | None = None,
    ) -> None:
        if k < 1:
            raise UsageError("k is below 1", value=k, fix="use a k such as 5")
        self.name = f"text@{k}"
        self.says = f"full text of the {k} passages found by address code, an adapter trained equally on full text"
        self._base, self._adapter, self._k, self._batch_tokens = base, adapter, k, batch_tokens
        self._rotation, self._codebook = rotation, codebook
        self.identity = _identity(base, adapter, k, rotation.digest, codebook.digest)

    def start(self, data: MethodSet) -> None:
        """An empty store."""
        self._data, self._rows = data, np.zeros(0, dtype=np.int64)
        self._index: AddressIndex | None = None

    def adapt(self, documents: Sequence[int]) -> None:
        """Keep the texts and code their addresses."""
        self._rows = np.concatenate([self._rows, self._data.rows_of(documents)])
        self._index = AddressIndex(
            self._data.prepared.embeddings[self._rows],
            self._rotation,
            self._codebook.codewords,
            self._rotation.width // self._codebook.width,
            self._base.device,
        )

    def answer(self, questions: Sequence[int]) -> list[str]:
        """Search, show, answer."""
        asked = [self._data.prepared.questions[one] for one in questions]
        texts = self._data.prepared.table["text"]
        lines = [[str(texts[int(row)].as_py()) for row in found] for found in self._found(questions)]
        return _answer(self._base, self._adapter, lines, asked, self._batch_tokens)

    def size(self) -> BankSize:
        """UTF-8 of the passages and their addresses."""
        texts = self._data.prepared.table["text"]
        held = sum(len(str(texts[int(row)].as_py()).encode()) for row in self._rows)
        address = self._index.bytes_per_passage if self._index is not None else 0
        return BankSize(
            "text", entries=len(self._rows), bank=held + address * len(self._rows), model=_stored(self._adapter)
        )

    def close(self) -> None:
        """Nothing was changed."""

    def _found(self, questions: Sequence[int]) -> NDArray[np.int64]:
        """Passage rows int64 [questions, ≤ k], best first."""
        if self._index is None:
            return np.zeros((len(questions), 0), dtype=np.int64)
        return self._rows[self._index.nearest(self._data.prepared.question_embeddings[list(questions)], self._k)]


def _answer(
    base: LanguageModel,
    adapter: Path | None,
    lines: Sequence[Sequence[str]],
    asked: Sequence[str],
    batch_tokens: int | None,
) -> list[str]:
    with adapted(base, adapter) as model:
        form = PromptFormat(model.tokenizer)
        room = min(MAX_PROMPT, model.context - NEW_TOKENS)
        prompts = [form.build(shown, question, room).ids for shown, question in zip(lines, asked, strict=True)]
        return answer_prompts(model, form, prompts, batch_tokens=batch_tokens)


def _identity(base: LanguageModel, adapter: Path | None, *parts: object) -> str:
    told = [base.digest, folder_digest(adapter) if adapter else "", MAX_PROMPT, NEW_TOKENS, *parts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _stored(folder: Path | None) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder is not None else 0
