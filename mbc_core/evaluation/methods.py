"""The common protocol of continual-adaptation methods: documents come in order, questions are asked about them.

Everything that the paper compares fits it: a bank of codes or of floats, fine-tuning on the documents, full text, and
no memory at all. A method sees the documents one after the other and never again; the runner
(:mod:`mbc_core.evaluation.method_run`) takes the time, scores the answers and keeps them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.training.prepared import Prepared, load_prepared

Int64 = NDArray[np.int64]
Kind = Literal["codes", "floats", "text", "weights", "none"]


@dataclass(frozen=True, slots=True)
class BankSize:
    """What a method keeps of the documents, in bytes.

    Attributes:
        kind: codebook indices, float vectors, the text itself, changed weights of the language model, or nothing.
        slots, width, codewords: T, d_c and K; 0 where a method has none.
        entries: rows of the bank, one a passage.
        bank: the whole bank: indices packed at 9 bits, float32 vectors, UTF-8 text, or the weights that changed.
        model: weights beside the base language model that are needed to write and read it; they don't grow.
    """

    kind: Kind
    slots: int = 0
    width: int = 0
    codewords: int = 0
    entries: int = 0
    bank: int = 0
    model: int = 0


@dataclass(frozen=True, eq=False)
class MethodSet:
    """Documents in the order of their arrival, and questions about them.

    Attributes:
        name: for people.
        prepared: passages (a document longer than the encoder reads is several) and questions, as
            ``mbc train prepare`` writes them.
        documents: passage rows of each document, int64, consecutive.
        strangers: passages of other documents, for the control that reads a bank that cannot know the answer.
        digest: sha256 (hex) of texts, questions and answers.
    """

    name: str
    prepared: Prepared
    documents: list[Int64]
    strangers: Prepared | None
    digest: str

    @classmethod
    def of(cls, name: str, prepared: Prepared, strangers: Prepared | None = None) -> MethodSet:
        """A set with its documents, told apart by passage id (``x``, ``x#1``, ``x#2`` are one document), and digest.

        Raises:
            UsageError: the set has no questions, or the strangers hold passages of its own documents.
        """
        if not prepared.questions:
            raise UsageError("the set has no questions", value=name, fix="give a prepared set with questions")
        names = [document_of(one) for one in prepared.table["passage_id"].to_pylist()]
        starts = [place for place, one in enumerate(names) if place == 0 or names[place - 1] != one]
        documents = [np.asarray(part, dtype=np.int64) for part in np.split(np.arange(len(names)), starts[1:])]
        texts = prepared.table["text"].to_pylist()
        if strangers is not None:
            shared = set(texts) & set(strangers.table["text"].to_pylist())
            if shared:
                raise UsageError(
                    "the other documents are not others",
                    value=f"{len(shared)} passages are in both sets",
                    cause="the shuffled bank must not hold what is asked about",
                    fix="name a prepared set of other documents",
                )
        told = json.dumps([texts, prepared.questions, prepared.answers, prepared.rows.tolist()], ensure_ascii=False)
        digest = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(name, prepared, documents, strangers, digest)

    def first(self, count: int | None) -> MethodSet:
        """The first ``count`` documents and the questions about them; all of it for None."""
        if count is None or count >= len(self.documents):
            return self
        return MethodSet.of(self.name, self.prepared.take(self.rows_of(range(count))), self.strangers)

    def asked_about(self, count: int | None = None) -> list[int]:
        """Places of the questions about the first ``count`` documents (all for None), ascending."""
        rows = len(self.prepared) if count is None else sum(len(one) for one in self.documents[:count])
        return [int(one) for one in np.flatnonzero(self.prepared.rows < rows)]

    def rows_of(self, documents: Sequence[int]) -> Int64:
        """Passage rows of the given documents, in order."""
        parts = [self.documents[one] for one in documents]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class Method(Protocol):
    """One way to keep up with documents.

    Attributes:
        name: row label, unique in a table.
        says: one line for people.
        identity: sha256 (hex) of everything the answers depend on beside the set: weights and settings.
    """

    name: str
    says: str
    identity: str

    def start(self, data: MethodSet) -> None:
        """Forget every document and take up ``data``."""

    def adapt(self, documents: Sequence[int]) -> None:
        """Take in more documents, by their numbers in ``data.documents``."""

    def answer(self, questions: Sequence[int]) -> list[str]:
        """Answer questions, by their places in ``data.prepared.questions``, from the documents taken in so far."""

    def size(self) -> BankSize:
        """What is kept of the documents taken in so far."""

    def close(self) -> None:
        """Leave the base language model as it was found."""


def load_method_set(name: str, folder: Path, strangers: Path | None = None) -> MethodSet:
    """A prepared folder as a stream of documents.

    Raises:
        DamagedFile: a folder cannot be read.
        UsageError: see :meth:`MethodSet.of`.
    """
    return MethodSet.of(name, load_prepared(folder), None if strangers is None else load_prepared(strangers))


def document_of(passage_id: str) -> str:
    """The document that a passage was cut from.

    >>> document_of("squad:ab"), document_of("squad:ab#2"), document_of("c#")
    ('squad:ab', 'squad:ab', 'c#')
    """
    name, mark, number = passage_id.rpartition("#")
    return name if mark and number.isdigit() else passage_id


def folder_digest(folder: Path) -> str:
    """sha256 (hex) of the weights and configurations in a folder, by name; cards and curves are left out."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config*.json")]):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
