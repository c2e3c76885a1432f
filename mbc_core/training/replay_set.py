"""First step of adaptation: what the bank recalls for its own questions, as a file of text.

The second step (:mod:`mbc_core.training.adapt`) needs only this file, torch and peft, so it can run where no bank is:
on a machine with a GPU, say.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mbc_core.errors import DamagedFile, UsageError

if TYPE_CHECKING:  # the second step reads examples where no bank can be opened
    from mbc_core.memory import Memory

Split = Literal["train", "new", "old"]
TRAIN, HELD_OUT, LINES = 2048, 64, 8
_SEARCHED = 64
_NEW_SHARE = 3  # without an earlier adaptation, the newest third of the questions counts as new


@dataclass(frozen=True, slots=True)
class Example:
    """A question with what the bank recalls for it.

    Attributes:
        question, answer: from the bank's replay.
        split: ``train``; or held out, about a ``new`` or an ``old`` document.
        lines: words of the recalled passages, best first.
        true: place in ``lines`` of the document that answers; None when it was not recalled.
        true_line: words of that document's best passage; empty when it was not even among the first 64.
    """

    question: str
    answer: str
    split: Split
    lines: tuple[str, ...]
    true: int | None
    true_line: str


def build_training_set(
    memory: Memory,
    *,
    train: int = TRAIN,
    held_out: int = HELD_OUT,
    lines: int = LINES,
    since: datetime | None = None,
    seed: int = 0,
) -> list[Example]:
    """Ask the bank its replay questions and note what it recalls.

    Args:
        train: most questions to train on, drawn by the seed.
        held_out: most held-out questions, half of them about new documents.
        lines: recalled passages a question.
        since: documents added later count as new; None, or when none was: the newest third, by event time.

    Raises:
        UsageError: the bank has no word codes, or no replay questions.
    """
    rows = memory.bank.replay().to_pylist()
    if not memory.bank.manifest.words or not rows:
        raise UsageError(
            "the bank offers nothing to adapt to",
            value=f"{len(rows)} replay questions, profile {memory.bank.manifest.profile}",
            cause="it holds no documents yet, none of them gave a question, or its profile has no word codes",
            fix="ingest documents first, with the profile default, compact or rich",
        )
    chosen = _choose(rows, train, held_out, since, seed)
    questions = [row["question"] for row, _ in chosen]
    _, found = memory.search(memory.encoder.encode_questions(questions), _SEARCHED, questions=questions)
    keys = memory.keys()
    examples = []
    for (row, split), places in zip(chosen, found, strict=True):
        words = memory.words(places[:lines])
        own = np.flatnonzero(keys[places] == row["key"])
        first = int(own[0]) if len(own) else None
        true_line = (
            "" if first is None else words[first] if first < lines else memory.words(places[first : first + 1])[0]
        )
        true = first if first is not None and first < lines else None
        examples.append(Example(row["question"], row["answer"], split, tuple(words), true, true_line))
    return examples


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write gzipped JSON Lines; equal examples give equal bytes."""
    text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in examples)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load_examples(path: Path) -> list[Example]:
    """Read :func:`save_examples`.

    Raises:
        DamagedFile: it is not such a file.
    """
    try:
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        return [Example(**row | {"lines": tuple(row["lines"])}) for row in rows]
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DamagedFile(
            "the training set cannot be read",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="make it again from the bank",
        ) from error


def _choose(
    rows: list[dict[str, Any]], train: int, held_out: int, since: datetime | None, seed: int
) -> list[tuple[dict[str, Any], Split]]:
    """Draw questions of each split by a seeded hash, the same whatever order the bank gives them in."""
    ordered = sorted(rows, key=lambda row: _draw(row, seed))
    kept: list[tuple[dict[str, Any], Split]] = [(row, "train") for row in ordered if row["split"] == "train"][:train]
    held = [row for row in ordered if row["split"] != "train"]
    is_new = _newness(held, since)
    new = [row for row, fresh in zip(held, is_new, strict=True) if fresh][: -(-held_out // 2)]
    old = [row for row, fresh in zip(held, is_new, strict=True) if not fresh][: held_out // 2]
    return [*kept, *((row, "new") for row in new), *((row, "old") for row in old)]


def _newness(rows: list[dict[str, Any]], since: datetime | None) -> list[bool]:
    if since is not None and any(row["added_at"] > since for row in rows):
        return [row["added_at"] > since for row in rows]
    times = [(row["event_time"] or row["added_at"]).timestamp() for row in rows]
    if not times:
        return []
    edge = sorted(times)[len(times) - max(1, len(times) // _NEW_SHARE)]
    return [moment >= edge for moment in times]


def _draw(row: dict[str, Any], seed: int) -> bytes:
    told = f"{seed}\x00{row['key']}\x00{row['question']}".encode()
    return hashlib.blake2b(told, digest_size=8).digest()
