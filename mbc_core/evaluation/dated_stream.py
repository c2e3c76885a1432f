"""A dated stream of documents and questions, cut into quarters, with what a growing bank recalled after each of them.

It is the border of the two steps of the nightly proof: the first needs banks and no language model, the second a
language model and no bank. A passage's words never change once they are stored, so each row's words and text are
written once and every quarter only names rows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.evaluation.sheet import write_whole

FORMAT = "mbc-dated-stream-1"
LINES = 8
"""Recalled rows that are kept a question."""

Kind = Literal["asked", "cloze", "gate"]
"""``asked``: of the file; ``cloze``: of the pipeline's replay; ``gate``: more cloze, for their own quarter's gate."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StreamDocument:
    """A document of the stream.

    Attributes:
        quarter: number of its quarter, from 0.
        half: 0 or 1, by its key: one half is adapted to, the other scored.
        held_out: the pipeline's replay keeps it from training; its questions serve the gate.
    """

    doc_id: str
    quarter: int
    half: int
    held_out: bool


@dataclass(frozen=True, slots=True)
class StreamQuestion:
    """A question about one document; ``true`` is the row of the passage that answers."""

    question: str
    answers: tuple[str, ...]
    document: int
    kind: Kind
    true: int


@dataclass(frozen=True, slots=True)
class DatedStream:
    """The stream as the second step reads it.

    Attributes:
        quarters: names, such as ``2024Q3``.
        words, texts: of every row (passage) the bank ever held.
        owners: document of each row.
        recalled: for each quarter, question → its best rows as the bank stood after that quarter, best first.
        figures: how it was made; JSON values.
    """

    quarters: tuple[str, ...]
    documents: tuple[StreamDocument, ...]
    questions: tuple[StreamQuestion, ...]
    words: tuple[str, ...]
    texts: tuple[str, ...]
    owners: tuple[int, ...]
    recalled: tuple[Mapping[int, tuple[int, ...]], ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def select(
        self,
        quarters: Sequence[int],
        kinds: Sequence[Kind] = ("asked",),
        *,
        half: int | None = None,
        held_out: bool | None = None,
    ) -> list[int]:
        """Numbers of the questions about documents of ``quarters``, ascending.

        Args:
            half, held_out: of their documents; None: either.
        """
        wanted = set(quarters)
        chosen = []
        for number, one in enumerate(self.questions):
            document = self.documents[one.document]
            if (
                one.kind in kinds
                and document.quarter in wanted
                and half in (None, document.half)
                and held_out in (None, document.held_out)
            ):
                chosen.append(number)
        return chosen

    def rows(self, quarter: int, question: int) -> tuple[int, ...]:
        """What the bank recalled for a question after a quarter, best first.

        Raises:
            UsageError: it was not asked then.
        """
        found = self.recalled[quarter].get(question)
        if found is None:
            raise UsageError(
                "the question was not asked after this quarter",
                value=f"{self.quarters[quarter]}, question {question}",
                cause="its document had not come yet, or it serves the gate of its own quarter only",
                fix="ask about quarters that have come",
            )
        return found

    def held(self, quarter: int) -> tuple[Int64, Int64]:
        """Rows that the bank holds after ``quarter``, and the document of each; both int64 [rows]."""
        owners = np.array(self.owners, dtype=np.int64)
        came = np.array([one.quarter for one in self.documents], dtype=np.int64)
        rows = np.flatnonzero(came[owners] <= quarter)
        return rows, owners[rows]


def quarter_of(timestamp: str) -> str:
    """The calendar quarter of an ISO 8601 date.

    >>> quarter_of("2024-07-02"), quarter_of("2026-06-30T12:00:00Z")
    ('2024Q3', '2026Q2')

    Raises:
        UsageError: it starts with no year and month.
    """
    year, _, rest = timestamp.partition("-")
    month = rest[:2]
    if not (len(year) == 4 and year.isdigit() and month.isdigit() and 1 <= int(month) <= 12):
        raise UsageError(
            "a document has no date", value=timestamp, cause="it is not ISO 8601", fix="write dates like 2024-07-02"
        )
    return f"{year}Q{(int(month) + 2) // 3}"


def number_quarters(timestamps: Sequence[str], least: int) -> tuple[list[str], list[int]]:
    """Names of the quarters in order of time, and the number of each document's.

    A quarter of fewer than ``least`` documents joins the one before it (the first one the one after), so that no
    figure rests on a handful: ``2026Q2+`` holds 2026Q2 and what came after.

    >>> number_quarters(["2024-02-01", "2024-01-05", "2024-05-01", "2024-05-02", "2024-07-01"], 2)
    (['2024Q1', '2024Q2+'], [0, 0, 1, 1, 1])
    """
    named = [quarter_of(one) for one in timestamps]
    names = sorted(set(named))
    counts = [sum(one == name for one in named) for name in names]
    groups: list[list[str]] = []
    filled = 0
    for name, count in zip(names, counts, strict=True):
        if groups and (count < least or filled < least):
            groups[-1].append(name)
            filled += count
        else:
            groups.append([name])
            filled = count
    number = {name: place for place, group in enumerate(groups) for name in group}
    return [group[0] + ("+" if len(group) > 1 else "") for group in groups], [number[one] for one in named]


def half_of(key: int) -> int:
    """0 or 1 by a document's key: a hash, so both halves are alike and a document's questions stay together."""
    return key & 1


def save_stream(path: Path, stream: DatedStream) -> None:
    """Write gzipped JSON; equal streams give equal bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    told = asdict(stream) | {"format": FORMAT}
    told["recalled"] = [{"questions": list(one), "rows": list(one.values())} for one in stream.recalled]
    data = gzip.compress(json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)
    write_whole(path, data, "dated stream")


def load_stream(path: Path) -> DatedStream:
    """Read :func:`save_stream`.

    Raises:
        DamagedFile: it is not such a file, or names rows, documents or questions that it does not hold.
    """
    try:
        told = json.loads(gzip.decompress(path.read_bytes()))
        if told.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        stream = DatedStream(
            tuple(told["quarters"]),
            tuple(StreamDocument(**one) for one in told["documents"]),
            tuple(StreamQuestion(**one | {"answers": tuple(one["answers"])}) for one in told["questions"]),
            tuple(told["words"]),
            tuple(told["texts"]),
            tuple(told["owners"]),
            tuple(
                {question: tuple(rows) for question, rows in zip(one["questions"], one["rows"], strict=True)}
                for one in told["recalled"]
            ),
            told["figures"],
        )
        _require_whole(stream)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFile(
            "the dated stream cannot be read",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="make it again: `python -m tests.bench.bench_nightly prepare`",
        ) from error
    return stream


def _require_whole(stream: DatedStream) -> None:
    rows, documents, questions = len(stream.words), len(stream.documents), len(stream.questions)
    if not len(stream.texts) == len(stream.owners) == rows or len(stream.recalled) != len(stream.quarters):
        raise ValueError("its lists have different lengths")
    named = [one.true for one in stream.questions] + [row for one in stream.recalled for r in one.values() for row in r]
    if named and not 0 <= min(named) <= max(named) < rows:
        raise ValueError("it names a row that it does not hold")
    owners = [one.document for one in stream.questions] + list(stream.owners)
    if owners and not 0 <= min(owners) <= max(owners) < documents:
        raise ValueError("it names a document that it does not hold")
    if any(not 0 <= one < questions for asked in stream.recalled for one in asked):
        raise ValueError("it names a question that it does not hold")
