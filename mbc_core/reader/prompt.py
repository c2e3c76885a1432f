"""The prompt: one line of words per recalled passage, best first, then the question.

A prompt is composed from token ids of whole pieces (a line, the question), in training and in answering alike, so
both see the same ids whatever the tokenizer does at seams. When room is short, passages go, least score first; the
question is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mbc_core.errors import UsageError
from mbc_core.reader.language_model import HfTokenizer, LanguageModel

MAX_PROMPT_TOKENS = 1024
_LINES_KEPT = 8_192  # an evaluation shows the same few thousand lines to every question, read after read


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids ready for the model, and how many of the given lines (the first ones) they hold."""

    ids: list[int]
    lines: int


def prompt_room(language_model: LanguageModel, new_tokens: int = 14) -> int:
    """Most tokens of a prompt: what the model's context leaves beside the answer, up to ``MAX_PROMPT_TOKENS``."""
    return min(MAX_PROMPT_TOKENS, language_model.context - new_tokens)


class PromptFormat:
    """How one tokenizer spells memory lines, questions and answers.

    Attributes:
        start: ids every sequence begins with (none for most models, BOS for some).
        newline: ids that end a memory line.
        stop_ids: ids that end an answer: every special token, and newline.
    """

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self.tokenizer = tokenizer
        self.start: list[int] = list(tokenizer("", add_special_tokens=True)["input_ids"])
        self.newline = self._encode("\n")
        eos = tokenizer.eos_token_id
        self.end = [int(eos)] if eos is not None else self.newline[-1:]
        # Any special token ends an answer: releases of transformers name different ones as a GGUF's end of text.
        self.stop_ids = sorted({*self.end, *tokenizer.all_special_ids, self.newline[-1]})
        self._line = lru_cache(_LINES_KEPT)(self._encode_line)

    def line(self, words: str) -> list[int]:
        """A memory line: a space, the words, a newline. Nothing for a passage without words."""
        return list(self._line(words))

    def question(self, question: str) -> list[int]:
        """``Question: …`` on one line, then ``Answer:``."""
        return self._encode(f"Question: {' '.join(question.split())}\nAnswer:")

    def answer(self, answer: str) -> list[int]:
        """The target of training: a space, the answer, end of text."""
        return [*self._encode(" " + " ".join(answer.split())), *self.end]

    def build(self, memory: Sequence[str], question: str, max_tokens: int = MAX_PROMPT_TOKENS) -> Prompt:
        """Compose a prompt of at most ``max_tokens`` tokens.

        Args:
            memory: words of the recalled passages, best first; may be empty.

        Raises:
            UsageError: the question alone is longer than ``max_tokens``.
        """
        asked = self.question(question)
        room = max_tokens - len(self.start) - len(asked)
        if room < 0:
            raise UsageError(
                "the question is too long",
                value=f"{len(asked)} tokens",
                cause=f"the prompt may have {max_tokens} tokens, and a question is never cut",
                fix="ask a shorter question or allow more tokens",
            )
        ids = list(self.start)
        used = 0
        for words in memory:
            line = self._line(words)
            if len(line) > room:
                break
            ids += line
            room -= len(line)
            used += 1
        return Prompt(ids + asked, used)

    def text(self, ids: Sequence[int]) -> str:
        """Generated ids → the answer: up to the first stop id or line break, without outer spaces."""
        kept: list[int] = []
        for one in ids:
            if one in self.stop_ids:
                break
            kept.append(int(one))
        lines = self._decode(kept).strip().splitlines()
        return lines[0].strip() if lines else ""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many pieces at once, without special tokens (fast tokenizers use every core)."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return encoded

    def _encode_line(self, words: str) -> tuple[int, ...]:
        return (*self._encode(" " + words), *self.newline) if words.strip() else ()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
