"""The file between the two steps of adaptation: what a bank recalls for its questions, and where that came from.

Gzipped JSON Lines, the header first. Writing and reading need neither a bank nor torch, so that the second step runs
on any machine; everything the gate and the candidate's card tell of the bank is in the header.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from mbc_core.errors import DamagedFile

FORMAT = 1
_FORMAT_KEY = "mbc_training_set"

Split = Literal["train", "new", "old", "canary"]
SPLITS: tuple[Split, ...] = get_args(Split)
JUDGED: tuple[Split, ...] = ("new", "old", "canary")
"""Splits that nobody trains on."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question with what the bank recalls for it.

    Attributes:
        question, answer: from the bank's replay, or of its canary set.
        split: ``train``; held out, about a ``new`` or an ``old`` document; or ``canary``.
        lines: words of the recalled passages, best first.
        true: place in ``lines`` of the document that answers; None when it was not recalled.
        true_line: words of that document's best passage; empty when it was not even among the first 64.
        document: hex digits of its document's key: questions that share it are one cluster. Empty: one of its own.
        window: of its document.
    """

    question: str
    answer: str
    split: Split
    lines: tuple[str, ...]
    true: int | None
    true_line: str
    document: str = ""
    window: str = ""


Rows = Mapping[str, Mapping[str, int]]
"""Split → window → number of questions."""


@dataclass(frozen=True, slots=True)
class SetHeader:
    """Where a training set came from.

    Attributes:
        bank: first 16 hex digits of sha256 of its manifest; tells banks apart without naming their place.
        as_of: the instant whose bank was asked, ISO 8601 in UTC; empty for a set of no bank.
        profile, encoder: of the bank's manifest.
        codebook_versions: that the recalled passages' codes were made with.
        passages: how many were searched.
        offered, replay: questions that the bank's replay offered, and those that are in the set.
        live: base model's digest → its live adapter then, ``version`` and ``weights_sha256``.
        since: documents added later count as new, ISO 8601; None: judged by event time.
        new_share: of the training questions, how many were wanted from new documents.
        canary: name of the bank's canary file; empty without.
        seed, lines: how the questions were drawn, and how many passages were recalled for each.
        code_version: of the code that wrote the set.
    """

    bank: str = ""
    as_of: str = ""
    profile: str = ""
    encoder: str = ""
    codebook_versions: tuple[int, ...] = ()
    passages: int = 0
    offered: Rows = field(default_factory=dict)
    replay: Rows = field(default_factory=dict)
    live: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    since: str | None = None
    new_share: float = 0.5
    canary: str = ""
    seed: int = 0
    lines: int = 8
    code_version: str = ""


@dataclass(frozen=True)
class TrainingSet:
    """Examples with their header."""

    header: SetHeader
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, examples: Iterable[Example], header: SetHeader | None = None) -> TrainingSet:
        """A set; the header says how many questions of which window are in it."""
        found = tuple(examples)
        told = asdict(header or SetHeader()) | {"replay": rows_by_window((one.split, one.window) for one in found)}
        return cls(SetHeader(**told | {"codebook_versions": tuple(told["codebook_versions"])}), found)

    def of_split(self, split: Split) -> tuple[Example, ...]:
        """The examples of one split, in the set's order."""
        return tuple(one for one in self.examples if one.split == split)

    @property
    def counts(self) -> dict[str, int]:
        """Split → number of examples; all four splits."""
        found = Counter(one.split for one in self.examples)
        return {split: found[split] for split in SPLITS}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the examples, the header left out: what a candidate was trained and judged on."""
        return hashlib.sha256("".join(map(_line, self.examples)).encode()).hexdigest()


def rows_by_window(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """(split, window) of each question → split → window → count, both sorted."""
    found: dict[str, Counter[str]] = {}
    for split, window in pairs:
        found.setdefault(split, Counter())[window] += 1
    return {split: dict(sorted(found[split].items())) for split in sorted(found)}


def save_set(path: Path, training_set: TrainingSet) -> None:
    """Write a set; equal sets give equal bytes. The file appears whole or not at all."""
    header = {_FORMAT_KEY: FORMAT, "digest": training_set.digest, **asdict(training_set.header)}
    text = json.dumps(header, ensure_ascii=False, sort_keys=True) + "\n" + "".join(map(_line, training_set.examples))
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.writing")
    staging.write_bytes(gzip.compress(text.encode(), mtime=0))
    staging.replace(path)


def load_set(path: Path) -> TrainingSet:
    """Read what :func:`save_set` wrote.

    Raises:
        DamagedFile: it is not such a file, was written by another format, or does not match its digest.
    """
    try:
        first, *rest = gzip.decompress(path.read_bytes()).decode().split("\n")
        told = json.loads(first)
        if told.pop(_FORMAT_KEY) != FORMAT:
            raise ValueError("another format of training sets")
        digest = told.pop("digest")
        header = SetHeader(**told | {"codebook_versions": tuple(told["codebook_versions"])})
        found = TrainingSet(header, tuple(_example(line) for line in rest if line))
        if found.digest != digest:
            raise ValueError("the rows do not match the digest in the header")
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise DamagedFile(
            "the training set cannot be read",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="make it again from the bank: mbc adapt --bank URI --write-set FILE",
        ) from error
    return found


def _line(example: Example) -> str:
    return json.dumps(asdict(example), ensure_ascii=False) + "\n"


def _example(line: str) -> Example:
    row = json.loads(line)
    if row["split"] not in SPLITS:
        raise ValueError(f"no such split: {row['split']!r}")
    return Example(**row | {"lines": tuple(row["lines"])})
