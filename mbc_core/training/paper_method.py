"""A trained paper model in the protocol of continual-adaptation methods: encode, quantize, append; read everything.

Passages become T codes each (MAC: T float vectors) as documents arrive, without gradient; a question reads all of
them at once. The shuffled control appends as many passages of other documents instead: a histogram has no order, so
permuting the bank itself would change nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mbc_core.codes import Rotation, quantize, to_slots
from mbc_core.encoder import PassageEncoder
from mbc_core.errors import UsageError
from mbc_core.evaluation.methods import BankSize, MethodSet
from mbc_core.paper.aggregation import Memory
from mbc_core.paper.files import CONFIG_FILE, WEIGHTS_FILE, load_paper_model
from mbc_core.paper.model import PaperModel
from mbc_core.reader.generate import answer_prompts
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prefix_cache import Pairs
from mbc_core.reader.prompt import PromptFormat, prompt_room
from mbc_core.training.paper_card import card_of
from mbc_core.training.paper_eval import CodeSet, answer_tokens
from mbc_core.training.paper_files import sentence_encoder
from mbc_core.training.prepared import Prepared

_BITS = 9
_PASSAGES_AT_ONCE = 256
Read = Literal["bank", "strangers", "none"]


class PaperMethod:
    """One folder of `mbc train paper`; see :class:`mbc_core.evaluation.methods.Method`.

    Args:
        base: the language model it was trained on, without adapter.
        folder: weights, configuration and card.
        name: row label.
        shuffled: append passages of ``data.strangers`` instead of the documents.
        encoder_folder: the sentence encoder; learned codes and questions read from tokens need it.
        rotation: of address codes; the release's own when None.

    Raises:
        UsageError: an encoder is needed and not given.
        DamagedFile, ModelError: the folder cannot be read, or belongs to another language model.
    """

    def __init__(
        self,
        base: LanguageModel,
        folder: Path,
        *,
        name: str,
        shuffled: bool = False,
        encoder_folder: Path | None = None,
        rotation: Rotation | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        closed = bool(card_of(folder).get("run", {}).get("closed"))
        self.read: Read = "none" if closed else "strangers" if shuffled else "bank"
        self.name = name
        self.says = _SAYS[self.read]
        self._base, self._folder, self._rotation = base, folder, rotation
        self._encoder_folder, self._batch_tokens = encoder_folder, batch_tokens
        self._model: PaperModel | None = None
        told = [(folder / CONFIG_FILE).read_text("utf-8"), self.read, base.digest]  # it names weights and encoders
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def model(self) -> PaperModel:
        """The model, loaded when it is first needed; KV-LoRA stays on the base until :meth:`close`."""
        if self._model is None:
            config = json.loads((self._folder / CONFIG_FILE).read_text())["config"]
            encoders = []
            if config["question"] == "tokens" or config["codes"] == "learned":
                encoders = [sentence_encoder(self._encoders_folder, self._base.device) for _ in range(2)]
            named = dict(zip(("encoder", "question_encoder"), encoders, strict=False))
            self._model = load_paper_model(self._folder, self._base, **named).to(self._base.device)
        return self._model

    @property
    def _encoders_folder(self) -> Path:
        if self._encoder_folder is None:
            raise UsageError(
                "the paper model needs its sentence encoder",
                value=str(self._folder),
                cause="its codes or its questions are made from tokens",
                fix="name the encoder's folder",
            )
        return self._encoder_folder

    def start(self, data: MethodSet) -> None:
        """An empty bank."""
        if self.read == "strangers" and data.strangers is None:
            raise UsageError(
                "the shuffled bank needs other documents", value=data.name, fix="give the set its strangers"
            )
        self._data, self._entries = data, 0
        self._held: list[Tensor] = []

    def adapt(self, documents: Sequence[int]) -> None:
        """Append the documents' codes, or those of as many strangers."""
        rows = self._data.rows_of(documents)
        source = self._data.prepared
        if self.read == "strangers" and self._data.strangers is not None:  # `start` sees to it
            source = self._data.strangers
            rows = np.arange(self._entries, self._entries + len(rows)) % len(source)
        self._entries += len(rows)
        if self.read != "none" and len(rows):
            self._held.append(self._codes(source, rows))

    def answer(self, questions: Sequence[int]) -> list[str]:
        """Answer from the whole bank."""
        model, prepared = self.model, self._data.prepared
        memory = self._memory()
        form = PromptFormat(self._base.tokenizer)
        room = prompt_room(self._base)
        asked = [prepared.questions[one] for one in questions]
        chosen = np.array(list(questions), dtype=np.int64)

        def prefixes(places: Sequence[int]) -> Pairs:
            with torch.no_grad():
                named = self._asked(chosen[list(places)], [asked[place] for place in places])
                return model.read(model.queries(**named), memory)

        return answer_prompts(
            model.language_model,
            form,
            [form.build([], question, room).ids for question in asked],
            batch_tokens=self._batch_tokens or answer_tokens(self._base.device, floats=not model.config.quantize),
            prefixes=prefixes,
        )

    def size(self) -> BankSize:
        """Indices packed at 9 bits, or float vectors."""
        config, entries = self.model.config, self._entries
        stored = (self._folder / WEIGHTS_FILE).stat().st_size
        if self.read == "none":
            return BankSize("none", model=stored)
        codes = config.tokens * entries
        if not config.quantize:
            return BankSize(
                "floats", config.tokens, config.code_width, 0, entries, 4 * codes * config.code_width, stored
            )
        packed = (_BITS * codes + 7) // 8
        return BankSize("codes", config.tokens, config.code_width, config.codewords, entries, packed, stored)

    def close(self) -> None:
        """Take KV-LoRA off the base."""
        if self._model is not None and self._model.config.kv_lora:
            self._model.language_model.model.unload()
            if hasattr(self._base.model, "peft_config"):
                del self._base.model.peft_config  # else the next adapter is taken for a second one
        self._model = None
        self._held = []
        gc.collect()

    def _memory(self) -> Memory | None:
        if not self._held:
            return None
        return CodeSet(torch.cat(self._held), self.model.code_vectors().detach(), self.model.config.slot_marks).memory()

    def _codes(self, source: Prepared, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        """What the bank keeps of passages: codes int64 [n, T], or vectors float32 [n, T, d_c]."""
        model = self.model
        if model.amortizer is None:
            slots = to_slots(source.embeddings[rows], self._turned, model.config.tokens)
            words = model.code_vectors().detach().float().cpu().numpy()
            return torch.from_numpy(quantize(slots, words).astype(np.int64)).to(self._base.device)
        texts = [str(source.table["text"][int(row)].as_py()) for row in rows]
        tokens = [one.ids for one in self._tokens.tokenize(texts)]
        order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
        parts: list[Tensor] = []
        for start in range(0, len(order), _PASSAGES_AT_ONCE):
            parts.append(
                model.encode_documents(*self._padded([tokens[one] for one in order[start:][:_PASSAGES_AT_ONCE]]))
            )
        return torch.cat(parts)[torch.tensor(np.argsort(order), device=self._base.device)]

    def _asked(self, chosen: np.ndarray[tuple[int], np.dtype[np.int64]], texts: Sequence[str]) -> dict[str, Tensor]:
        if self.model.config.question == "embedding":
            return {
                "embeddings": torch.from_numpy(self._data.prepared.question_embeddings[chosen]).to(self._base.device)
            }
        ids, mask = self._padded(self._tokens.question_tokens(texts))
        return {"ids": ids, "mask": mask}

    def _padded(self, lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, both int64 [n, longest], on the model's device."""
        longest = max(len(one) for one in lists)
        ids, mask = (np.zeros((len(lists), longest), dtype=np.int64) for _ in range(2))
        for row, one in enumerate(lists):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        return torch.from_numpy(ids).to(self._base.device), torch.from_numpy(mask).to(self._base.device)

    @property
    def _turned(self) -> Rotation:
        if self._rotation is None:
            from mbc_core import defaults

            self._rotation = defaults.rotation()
        return self._rotation

    @property
    def _tokens(self) -> PassageEncoder:
        """The sentence encoder's tokenizer."""
        if not hasattr(self, "_tokenizing"):
            self._tokenizing = PassageEncoder.load(self._encoders_folder, None, precision="float32")
        return self._tokenizing


_SAYS: dict[Read, str] = {
    "bank": "every passage's codes at once, read by the question's cross-attention into a key and value prefix",
    "strangers": "the same model over as many passages of other documents",
    "none": "the paper's model trained equally without memory: the same parts, an empty bank",
}
