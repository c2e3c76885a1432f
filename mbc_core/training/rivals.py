"""The fair rivals: adapters trained equally on full text, or without any memory.

Equal means the same base, data, loop, optimizer, steps and samples a step; only what stands before the question
differs, and that is all in the :class:`~mbc_core.training.samples.Mixture`.
"""

from __future__ import annotations

from dataclasses import replace

from mbc_core.errors import UsageError
from mbc_core.evaluation.reads import Read
from mbc_core.training.samples import Mixture

MEMORIES = ("words", "text", "none")
"""``words``: the telegraphic lines of a bank (with a tenth of full text); ``text``: full text; ``none``: nothing."""

SAYS = {
    "words": "telegraphic memory lines of 12 to 64 word codes",
    "text": "1, 3 or 5 whole passages of full text: the rival that keeps the text, trained equally",
    "none": "the question alone: the closed book, trained equally without memory",
}

_TEXT_TOKENS = 384  # a passage of 254 word pieces has up to about 350 tokens of a language model
_ROOM_BESIDE = 192  # question and answer

TEXT_READS = (
    Read("closed", 0, None),
    Read("text", 5, None),
    Read("text", 1, None),
    Read("right_text", 1, None),
)
CLOSED_READS = (Read("closed", 0, None),)


def mixture_of(memory: str) -> Mixture:
    """What samples are made of when an adapter is trained on ``memory``.

    Raises:
        UsageError: an unknown kind.
    """
    plain = Mixture()
    if memory == "words":
        return plain
    if memory == "text":
        return replace(
            plain,
            full_text=1 - plain.no_memory,
            passages=(1, 3, 5),
            weights=(plain.weights[0], plain.weights[1], plain.weights[2] + plain.weights[3]),  # 8 counts as 5
            text_tokens=_TEXT_TOKENS,
            max_tokens=5 * _TEXT_TOKENS + _ROOM_BESIDE,
        )
    if memory == "none":
        return replace(plain, no_memory=1.0, full_text=0.0)
    raise UsageError(
        "there is no such memory to train on",
        value=memory,
        cause="a misspelt name",
        fix=f"use one of {', '.join(MEMORIES)}",
    )


def memory_of(mixture: Mixture) -> str:
    """The kind of memory that most of a mixture's samples show."""
    if mixture.no_memory > 0.5:
        return "none"
    return "text" if mixture.full_text > 0.5 else "words"
