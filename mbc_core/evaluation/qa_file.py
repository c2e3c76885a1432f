"""QA files: one question a row, with the document that answers it; documents are taken once by id, at their first time.

A row of JSON Lines (plain or gzip) has ``id`` or ``doc_id``, ``text``, ``question``, ``answer`` or ``answers``, and,
if the document has a date, ``timestamp``. More fields may be there; :func:`load_qa` can choose rows by them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbc_core.errors import BadDocument, DamagedFile, UsageError
from schemas.document import document_from_mapping

_GZIP = b"\x1f\x8b"
_DOCUMENT_FIELDS = ("id", "doc_id", "text", "timestamp")


@dataclass(frozen=True, slots=True)
class QaDocument:
    """A document of a QA file; ``timestamp`` as the file spells it (ISO 8601), or None."""

    doc_id: str
    text: str
    timestamp: str | None = None


@dataclass(frozen=True, slots=True)
class QaQuestion:
    """A question with its accepted answers; ``document`` is the place of the one that answers."""

    question: str
    answers: tuple[str, ...]
    document: int


@dataclass(frozen=True, slots=True)
class QaSet:
    """Documents in the order in which the file first names them, and questions in the file's order.

    Attributes:
        digest: sha256 (hex) of all documents and questions; says what a figure was measured on.
    """

    documents: tuple[QaDocument, ...]
    questions: tuple[QaQuestion, ...]
    digest: str

    @classmethod
    def of(cls, documents: tuple[QaDocument, ...], questions: tuple[QaQuestion, ...]) -> QaSet:
        """A set with its digest."""
        told = json.dumps(
            [
                [[one.doc_id, one.text, one.timestamp] for one in documents],
                [[one.question, one.answers, one.document] for one in questions],
            ],
            ensure_ascii=False,
        )
        return cls(documents, questions, hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest())

    def first_documents(self, count: int | None) -> QaSet:
        """The first ``count`` documents and the questions about them; all of it for None."""
        if count is None or count >= len(self.documents):
            return self
        return QaSet.of(self.documents[:count], tuple(one for one in self.questions if one.document < count))

    def drawn(self, limit: int | None, seed: int, *, documents: int | None = None) -> list[int]:
        """Places of at most ``limit`` questions, drawn by the seed, ascending.

        Args:
            documents: only questions about the first so many documents; None: about any.
        """
        known = len(self.documents) if documents is None else documents
        places = np.array([place for place, one in enumerate(self.questions) if one.document < known], dtype=np.int64)
        if limit is not None and limit < len(places):
            places = np.sort(np.random.default_rng(seed).choice(places, limit, replace=False))
        return [int(place) for place in places]


def load_qa(path: Path, only: Mapping[str, frozenset[str]] | None = None) -> QaSet:
    """Read a QA file.

    Args:
        only: field → values; rows in which a field has none of its values are passed over.

    Raises:
        UsageError: there is no such file, or no row is left.
        DamagedFile: a row is not what it should be; the message names the line.
    """
    places: dict[str, int] = {}
    documents: list[QaDocument] = []
    questions: list[QaQuestion] = []
    for number, row in _rows(path):
        if any(str(row.get(field)) not in values for field, values in (only or {}).items()):
            continue
        try:
            document = _document(row)
            place = places.setdefault(document.doc_id, len(documents))
            if place == len(documents):
                documents.append(document)
            elif documents[place].text != document.text:
                raise ValueError(f"the document {document.doc_id!r} had another text on an earlier line")
            questions.append(QaQuestion(_question(row), _answers(row), place))
        except (ValueError, BadDocument) as error:
            raise _damaged(path, number, str(error)) from error
    if not questions:
        told = ", ".join(f"{field} = {' or '.join(sorted(values))}" for field, values in (only or {}).items())
        raise UsageError(
            "the QA file offers no question",
            value=str(path),
            cause=f"no row has {told}" if told else "it is empty",
            fix="check --only" if told else "give a file with one question a line",
        )
    return QaSet.of(tuple(documents), tuple(questions))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            "the QA file cannot be read", value=str(path), cause=error.strerror or str(error), fix="check --qa"
        ) from error
    try:
        lines = (gzip.decompress(data) if data.startswith(_GZIP) else data).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, 0, f"the gzip stream is damaged ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, str(error)) from error
        if not isinstance(row, dict):
            raise _damaged(path, number, "it is not a JSON object")
        yield number, row


def _damaged(path: Path, line: int, cause: str) -> DamagedFile:
    return DamagedFile(
        f"line {line} of the QA file cannot be used" if line else "the QA file cannot be used",
        value=str(path),
        cause=cause,
        fix='write {"id": …, "text": …, "question": …, "answer": …} on each line',
    )


def _document(row: Mapping[str, Any]) -> QaDocument:
    """The row's document, checked by the rules of ingest."""
    found = document_from_mapping({name: row.get(name) for name in _DOCUMENT_FIELDS})
    return QaDocument(found.doc_id, found.text, str(row["timestamp"]) if row.get("timestamp") else None)


def _question(row: Mapping[str, Any]) -> str:
    value = row.get("question")
    if not isinstance(value, str) or not value.strip():
        raise ValueError("`question` is missing, empty or not a string")
    return value


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    given = row.get("answers")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    everything = ([row["answer"]] if row.get("answer") is not None else []) + listed
    if not everything or not all(isinstance(one, str) and one.strip() for one in everything):
        raise ValueError("neither `answer` is a string nor `answers` a list of strings, none of them empty")
    return tuple(dict.fromkeys(everything))
