"""Nightly adaptation replayed over a dated stream: which questions a step sees, and what stands before them.

Every arm of the comparison is trained by the same rules: as many steps of as many questions at the same rates, drawn
by the same seed, each quarter from the arm's own last adapter. Arms differ in what stands before a question (the words
the bank recalled, the full text of the same places, nothing) and in whether old quarters are mixed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from mbc_core.errors import UsageError
from mbc_core.evaluation.dated_stream import DatedStream
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Composed, MicroBatch, Ragged, micro_batches, prefetched
from mbc_core.training.loop import Clock, Schedule, Trainer

Memory = Literal["words", "text", "none"]
K = 5
"""Rows that stand before a question when it is scored."""
TEXT_TOKENS = 384
"""A whole passage has up to about 350 tokens; as the rival trained on text was shown."""
_SIZES = {"words": (1, 3, 5, 8), "text": (1, 3, 5), "none": (0,)}
_SHUFFLED = 0.5
_POOL = 8


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of the comparison.

    Attributes:
        memory: what stands before a question; also says which adapter it starts from.
        learns: it is adapted each quarter.
        replay: old quarters' questions are mixed in.
        gated: a candidate that the gate refuses is dropped.
        says: for people.
    """

    memory: Memory
    learns: bool
    replay: bool
    gated: bool
    says: str


ARMS: dict[str, Arm] = {
    "frozen": Arm("words", False, False, False, "the shipped adapter, never adapted"),
    "nightly": Arm("words", True, True, False, "adapted each quarter, old quarters mixed in"),
    "no-replay": Arm("words", True, False, False, "adapted each quarter to its own questions alone"),
    "gated": Arm("words", True, True, True, "nightly, but only candidates that pass the gate go live"),
    "closed": Arm("none", True, True, False, "no memory: trained equally without, adapted on the same questions"),
    "text": Arm("text", True, True, False, "full text of the same places: trained equally on text, adapted equally"),
    "frozen-closed": Arm("none", False, False, False, "the closed book, never adapted"),
    "frozen-text": Arm("text", False, False, False, "the full-text reader, never adapted"),
}


@dataclass(frozen=True, slots=True)
class Choices:
    """What is tuned, on the first quarters alone; every arm uses the same.

    Attributes:
        steps, batch, lr: of one quarter's adaptation.
        old_share: of a step's questions, from older quarters (arms with replay, once there are any).
        cloze_share: cloze questions among new and old alike.
        as_read: share shown the first five rows in the bank's order, as questions are read; the others 1, 3, 5 or 8
            rows, half of them in the bank's order.
        no_memory: share without any row.
    """

    steps: int = 40
    batch: int = 64
    lr: float = 3e-4
    old_share: float = 0.5
    cloze_share: float = 0.25
    as_read: float = 0.5
    no_memory: float = 0.04

    def to_json(self) -> dict[str, Any]:
        """As files keep it."""
        return asdict(self)


class Spelling:
    """Token ids of everything an arm's prompts are made of, each piece encoded once.

    Args:
        memory: rows are spelled by their words or their text, or not at all.
        room: most tokens of a prompt; rows go first, the last ones, never the question.
    """

    def __init__(self, stream: DatedStream, form: PromptFormat, memory: Memory, room: int) -> None:
        self.form, self.memory, self.room = form, memory, room
        shown = {"words": stream.words, "text": stream.texts, "none": ("",) * len(stream.words)}[memory]
        plain = [" ".join(one.split()) if memory == "text" else one for one in shown]
        cut = TEXT_TOKENS if memory == "text" else room
        encoded = form.encode_many([f" {one}" for one in plain])
        self.lines = [
            [*ids[:cut], *form.newline] if one.strip() else [] for one, ids in zip(plain, encoded, strict=True)
        ]
        asked = [f"Question: {' '.join(one.question.split())}\nAnswer:" for one in stream.questions]
        self.questions = form.encode_many(asked)
        answers = [" " + " ".join(one.answers[0].split()) for one in stream.questions]
        self.answers = [[*ids, *form.end] for ids in form.encode_many(answers)]

    def prompt(self, question: int, rows: Sequence[int], room: int | None = None) -> list[int]:
        """As :meth:`mbc_core.reader.prompt.PromptFormat.build` makes it of the same lines."""
        asked = self.questions[question]
        left = (self.room if room is None else room) - len(self.form.start) - len(asked)
        ids = list(self.form.start)
        for row in rows if self.memory != "none" else ():
            line = self.lines[row]
            if len(line) > left:
                break
            ids += line
            left -= len(line)
        return [*ids, *asked]


def plan(stream: DatedStream, quarter: int, half: int, arm: Arm, choices: Choices, seed: int) -> list[list[int]]:
    """The questions of every step of one quarter's adaptation.

    Only questions about documents of ``half`` that the replay does not hold out; of each pool (new or old, asked or
    cloze) every question comes once before any comes again. Arms of equal ``replay`` get equal plans.
    """
    rng = np.random.default_rng([seed, quarter, half])
    older = list(range(quarter)) if arm.replay else []
    pools = {
        (old, cloze): stream.select(older if old else [quarter], ["cloze" if cloze else "asked"],
                                    half=half, held_out=False)
        for old in (False, True) for cloze in (False, True)
    }  # fmt: skip
    turns = {name: _Turns(pool, rng) for name, pool in pools.items()}
    steps = []
    for _ in range(choices.steps):
        old = rng.random(choices.batch) < choices.old_share
        cloze = rng.random(choices.batch) < choices.cloze_share
        steps.append([_next(turns, bool(one), bool(other)) for one, other in zip(old, cloze, strict=True)])
    return steps


class _Turns:
    """A pool's questions, in a new order each round."""

    def __init__(self, pool: Sequence[int], rng: np.random.Generator) -> None:
        self.pool, self._rng = list(pool), np.random.default_rng(rng.integers(2**32))
        self._waiting: list[int] = []

    def next(self) -> int:
        if not self._waiting:
            self._waiting = [self.pool[place] for place in self._rng.permutation(len(self.pool))]
        return self._waiting.pop()


def _next(turns: dict[tuple[bool, bool], _Turns], old: bool, cloze: bool) -> int:
    """From the pool that was drawn, else from the nearest that has questions."""
    for name in ((old, cloze), (old, not cloze), (not old, cloze), (not old, not cloze)):
        if turns[name].pool:
            return turns[name].next()
    raise UsageError(
        "there is no question to adapt to",
        value=f"{len(turns)} empty pools",
        cause="no document of this half and quarter offers one that is not held out",
        fix="give a stream with more documents a quarter",
    )


def shown_rows(
    recalled: Sequence[int], true: int, memory: Memory, choices: Choices, rng: np.random.Generator
) -> list[int]:
    """Rows before one training question, the one that answers always among them; none for a few, and closed books."""
    draws = rng.random(3)
    size = int(rng.choice(_SIZES[memory]))
    if draws[0] < choices.no_memory or memory == "none":
        return []
    as_read = draws[1] < choices.as_read
    rows = list(recalled[: K if as_read else size])
    if true not in rows:
        rows[-1:] = [true]
    if not as_read and draws[2] < _SHUFFLED:
        rng.shuffle(rows)
    return rows


def compose(
    stream: DatedStream, spelling: Spelling, quarter: int, questions: Sequence[int], choices: Choices,
    rng: np.random.Generator,
) -> Composed:  # fmt: skip
    """Prompts with answers for one step, from what the bank recalled after ``quarter``."""
    prompts, answers = [], []
    for question in questions:
        answer = spelling.answers[question]
        rows = shown_rows(
            stream.rows(quarter, question), stream.questions[question].true, spelling.memory, choices, rng
        )
        prompts.append([*spelling.prompt(question, rows, spelling.room - len(answer)), *answer])
        answers.append(len(answer))
    return Composed(Ragged.of(prompts), np.array(answers, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Told:
    """One quarter's adaptation: steps, seconds from first to last step, first and last loss read back (nats)."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float


def adapt_quarter(
    stream: DatedStream, spelling: Spelling, language_model: LanguageModel, quarter: int, half: int, arm: Arm,
    choices: Choices, *, seed: int = 0, batch_tokens: int = 16_384, say: Callable[[str], None] = lambda line: None,
) -> Told:  # fmt: skip
    """Train the adapter that ``language_model`` carries on one quarter's questions; it holds the result afterwards."""
    steps = plan(stream, quarter, half, arm, choices, seed)
    pad = language_model.pad_id

    def make(number: int) -> list[list[MicroBatch]]:
        made = []
        for place in range(number * _POOL, min((number + 1) * _POOL, len(steps))):
            rng = np.random.default_rng([seed, quarter, half, place, 3])
            composed = compose(stream, spelling, quarter, steps[place], choices, rng)
            made.append(micro_batches(composed, pad, batch_tokens, choices.batch, (seed, quarter, place)))
        return made

    began = time.monotonic()
    trainer = Trainer(language_model, Schedule(choices.steps, None, choices.lr), seed=seed)
    clock = Clock(trainer)
    losses: list[float] = []
    for _, pool in prefetched(make, 0):
        losses += [loss for loss in (trainer.step(batches) for batches in pool) if loss == loss]
        clock.tick()
        if trainer.progress.step >= choices.steps:
            break
    trainer.finish()
    seconds = time.monotonic() - began
    say(f"{choices.steps} steps in {seconds:.1f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return Told(trainer.progress.step, seconds, losses[0], losses[-1])
