"""A QA set about the small towns, banks of it, and a builder that needs no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mbc_core.bank import Bank
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from mbc_core.memory import Memory
from tests.mbc_core.tiny_reader import (
    BagOfWords,
    Doc,
    add_documents,
    documents,
    lexicon,
    make_bank,
    pieces,
)

WORDS = {"paper": 0, "compact": 12, "default": 24, "rich": 41}


def qa_set(count: int = 12) -> QaSet:
    """One question a town; the second of two accepted answers never occurs."""
    docs = documents(count)
    return QaSet.of(
        tuple(QaDocument(one.doc_id, one.text, one.timestamp) for one in docs),
        tuple(QaQuestion(one.question, (one.answer, "another"), place) for place, one in enumerate(docs)),
    )


def as_docs(given: Sequence[QaDocument]) -> list[Doc]:
    return [Doc(one.doc_id, one.text, one.timestamp) for one in given]


def open_bank(where: Path | Bank) -> Memory:
    return Memory.open(where, BagOfWords(), lexicon=lexicon(), rotation=pieces()[0])


def memory_of(folder: Path, qa: QaSet, profile: str = "default") -> Memory:
    return open_bank(make_bank(folder, as_docs(qa.documents), words=WORDS[profile], profile=profile))


class TinyBuilder:
    """Adds documents as the core does, and remembers what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.encoder, self.told = folder, BagOfWords(), []

    def add(self, name: str, profile: str, documents: Sequence[QaDocument]) -> None:
        self.told.append((name, profile, [one.doc_id for one in documents]))
        if not (self.folder / name).exists():
            make_bank(self.folder / name, as_docs(documents), words=WORDS[profile], profile=profile)
        else:
            add_documents(Bank.open(self.folder / name), as_docs(documents), f"run-{len(self.told)}")

    def open(self, name: str) -> Memory:
        return open_bank(self.folder / name)
