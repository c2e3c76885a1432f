"""A question sheet: what every read shows for every question, ready to be answered.

Making it needs the banks; answering it (:mod:`mbc_core.evaluation.answers`) needs a language model only. So the two
steps may run on two machines: ``mbc eval --write-reads FILE`` where the banks are, ``--from-reads FILE`` on a GPU.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mbc_core.errors import DamagedFile, StorageError

FORMAT = "mbc-question-sheet-1"

Adapter = Literal["own", "closed", "text", "attend", "aggregate"]
"""Which adapter answers: the one under test, one trained equally without memory or on full text, attend's own, or the
paper's model."""


@dataclass(frozen=True, slots=True)
class ReadKind:
    """What a read puts before the question.

    Attributes:
        says: one line for people.
        store: how the passages are kept: ``words`` (the bank's codes), ``text``, ``text-codes``, ``truncated``,
            ``first-words``, ``address`` (codes read as vectors), ``histogram`` (of the whole bank's codes), or None for
            nothing at all.
        places: whose passages: ``found`` by address code, the ``right`` one, ``shuffled``, ``all`` of the bank,
            or ``none``.
        adapter: who answers.
    """

    says: str
    store: str | None
    places: Literal["found", "right", "shuffled", "all", "none"]
    adapter: Adapter = "own"

    @property
    def by_profile(self) -> bool:
        """Whether it differs from profile to profile."""
        return self.store in ("words", "truncated", "first-words")


READS: dict[str, ReadKind] = {
    "closed": ReadKind("the same adapter, memory off", None, "none"),
    "closed-equal": ReadKind("an adapter trained equally without memory", None, "none", "closed"),
    "shuffled": ReadKind("codes of another document at each recalled place", "words", "shuffled"),
    "recall": ReadKind("word codes of the passages found by address code", "words", "found"),
    "first-words": ReadKind("the first words instead of the salient ones, as many codes", "first-words", "found"),
    "truncated": ReadKind("the text's first bytes, as many as the word codes take", "truncated", "found"),
    "text-codes": ReadKind("every word of the text as 16-bit codes", "text-codes", "found"),
    "text": ReadKind("full text of the same passages, the same adapter", "text", "found"),
    "text-equal": ReadKind("full text, an adapter trained equally on full text", "text", "found", "text"),
    "right": ReadKind("word codes of the passage that answers", "words", "right"),
    "right-text": ReadKind("full text of the passage that answers", "text", "right"),
    "right-text-equal": ReadKind("the same, the adapter trained on full text", "text", "right", "text"),
    "attend-closed": ReadKind("attend's adapter, memory off", None, "none", "attend"),
    "attend-shuffled": ReadKind("address codes of another document at each place", "address", "shuffled", "attend"),
    "attend": ReadKind("address codes of the passages found, read as vectors", "address", "found", "attend"),
    "attend-right": ReadKind("address codes of the passage that answers", "address", "right", "attend"),
    "aggregate-shuffled": ReadKind("as many codes, under other codewords", "histogram", "all", "aggregate"),
    "aggregate": ReadKind("address codes of the whole bank at once", "histogram", "all", "aggregate"),
}
"""Every read of ``mbc eval``, in the order of its table."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One read of a list of questions.

    Attributes:
        read: a name in :data:`READS`.
        profile: of the bank; ``text`` or ``-`` where no profile matters.
        k: passages that were asked for; 0 for a closed book.
        questions: places in the sheet's questions.
        lines: for each of them places in the sheet's lines, best first.
        bytes_per_passage: what a store for this read keeps.
        recall_ms: a question, encoding and search.
        documents: how many the stream had brought when it was asked; None outside the retention protocol.
        scores: for each question those that the lines' passages were found with, where each is read in a prompt of
            its own; None where they stand in one.
    """

    read: str
    profile: str
    k: int
    questions: list[int]
    lines: list[list[int]]
    bytes_per_passage: float
    recall_ms: float
    documents: int | None = None
    scores: list[list[float]] | None = None

    def fields(self) -> dict[str, Any]:
        """JSON values; without scores as releases that know none write and read it."""
        told = asdict(self)
        if self.scores is None:
            del told["scores"]
        return told

    @property
    def adapter(self) -> Adapter:
        """Who answers."""
        return READS[self.read].adapter


@dataclass(frozen=True, slots=True)
class Sheet:
    """Questions and everything shown for them.

    Attributes:
        questions, answers: each question with its accepted answers.
        lines: every distinct memory line.
        shown: the reads.
        figures: what the banks told while it was made: recall, sizes, settings; JSON values.
        codes: what lines of addresses are decoded with (:mod:`mbc_core.evaluation.shown_codes`); None without such.
    """

    questions: list[str]
    answers: list[list[str]]
    lines: list[str]
    shown: list[Shown]
    figures: dict[str, Any] = field(default_factory=dict)
    codes: dict[str, Any] | None = None

    def memory(self, shown: Shown) -> list[list[str]]:
        """The memory lines of each of the read's questions."""
        return [[self.lines[place] for place in places] for places in shown.lines]


class Lines:
    """Distinct memory lines, numbered as they come."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def places(self, lines: Iterable[str]) -> list[int]:
        """Number of each line."""
        return [self._places.setdefault(line, len(self._places)) for line in lines]

    def all(self) -> list[str]:
        """The lines by their number."""
        return list(self._places)


def save_sheet(path: Path, sheet: Sheet) -> None:
    """Write gzipped JSON; equal sheets give equal bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    told = {"format": FORMAT, **asdict(sheet), "shown": [one.fields() for one in sheet.shown]}
    if sheet.codes is None:
        del told["codes"]  # as releases without it write and read it
    write_whole(path, gzip.compress(json.dumps(told, ensure_ascii=False).encode(), mtime=0), "question sheet")


def write_whole(path: Path, data: bytes, what: str) -> None:
    """Write a file that is whole or not there, and its folder.

    Args:
        what: the file's kind, for the error's text.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.writing")
        staging.write_bytes(data)
        staging.replace(path)
    except OSError as error:
        raise StorageError(
            f"the {what} cannot be written", value=str(path), cause=str(error), fix="name another file"
        ) from error


def load_sheet(path: Path) -> Sheet:
    """Read :func:`save_sheet`.

    Raises:
        DamagedFile: it is not such a file, points beyond its own lists, or another release wrote it.
    """
    try:
        told = json.loads(gzip.decompress(path.read_bytes()))
        written = told.pop("format")
        if written != FORMAT:
            raise DamagedFile(
                "the question sheet has another format",
                value=written,
                cause=f"this release reads {FORMAT}",
                fix="write it again with this release: `mbc eval --write-reads`",
            )
        sheet = Sheet(**told | {"shown": [Shown(**one) for one in told["shown"]]})
        _require_whole(sheet)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFile(
            "the question sheet cannot be read",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="write it again: `mbc eval --write-reads`",
        ) from error
    return sheet


def _require_whole(sheet: Sheet) -> None:
    if len(sheet.questions) != len(sheet.answers):
        raise ValueError(f"{len(sheet.questions)} questions, {len(sheet.answers)} lists of answers")
    for one in sheet.shown:
        if one.read not in READS or len(one.questions) != len(one.lines):
            raise ValueError(f"the read {one.read!r} is unknown or not whole")
        if one.scores is not None and [len(found) for found in one.scores] != [len(found) for found in one.lines]:
            raise ValueError(f"the read {one.read!r} has other scores than lines")
        if READS[one.read].store in ("address", "histogram") and sheet.codes is None:
            raise ValueError(f"the read {one.read!r} lacks the codebooks")
        if max(one.questions, default=0) >= len(sheet.questions):
            raise ValueError(f"the read {one.read!r} names a question that is not there")
        if max((place for places in one.lines for place in places), default=0) >= max(1, len(sheet.lines)):
            raise ValueError(f"the read {one.read!r} names a line that is not there")
