"""A bank as an evaluation sees it: its passages beside their texts, and which of them answers each question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.qa_file import QaSet
from mbc_core.passages import split_passages
from mbc_core.training.data import part_for

if TYPE_CHECKING:
    from mbc_core.encoder import EncodedPassage
    from mbc_core.memory import Memory

Int64 = NDArray[np.int64]


class TextEncoder(Protocol):
    """What an evaluation needs of an encoder beside :class:`mbc_core.memory.QuestionEncoder`."""

    @property
    def count_pieces(self) -> Callable[[str], int]:
        """Word pieces of a text: where documents are cut into passages."""

    @property
    def encode(self) -> Callable[[Sequence[str]], Sequence[EncodedPassage]]:
        """Embedding, words and scores of each passage."""

    @property
    def encode_questions(self) -> Callable[[Sequence[str]], NDArray[np.float32]]:
        """float32 [n, d], unit norm."""


@dataclass(frozen=True, eq=False)
class BankView:
    """The rows of a bank (its passages, in the order of ``memory``) and the questions of a QA set.

    Attributes:
        memory: the open bank.
        texts: of each row; None where neither the QA file nor the bank has it.
        documents: int64 [rows], a number for each row's document.
        sizes: int64 [rows], bytes of its word codes.
        right: int64 [questions], the row that answers; -1 when the bank does not hold it.
        right_document: int64 [questions], its document's number; -1 likewise.
    """

    memory: Memory
    texts: Sequence[str | None]
    documents: Int64
    sizes: Int64
    right: Int64
    right_document: Int64

    @classmethod
    def of(cls, memory: Memory, qa: QaSet, count_pieces: Callable[[str], int]) -> BankView:
        """Join a bank with a QA set by document id.

        Args:
            count_pieces: the encoder's, which cut the documents into passages.
        """
        names = memory.passages["doc_id"].to_pylist()
        numbers = memory.passages["passage"].to_pylist()
        parts = _parts(memory, qa, set(names), count_pieces)
        keys, documents = np.unique(memory.keys(), return_inverse=True)
        row_of = {place: row for row, place in enumerate(zip(names, numbers, strict=True))}
        right = [_right_row(qa, question, parts, row_of) for question in range(len(qa.questions))]
        rows = np.array(right, dtype=np.int64)
        sizes = pc.binary_length(memory.passages["words"]).to_numpy().astype(np.int64)
        owners = documents.astype(np.int64)
        owner_of_right = np.where(rows >= 0, owners[rows], -1) if len(keys) else np.full(len(rows), -1)
        return cls(
            memory,
            [parts[name][number] if name in parts and number < len(parts[name]) else None
             for name, number in zip(names, numbers, strict=True)],
            owners,
            sizes,
            rows,
            owner_of_right.astype(np.int64),
        )  # fmt: skip

    @property
    def profile(self) -> str:
        """Name of the bank's profile."""
        return self.memory.bank.manifest.profile

    @property
    def slots(self) -> int:
        """T, address codes a passage."""
        return self.memory.bank.manifest.slots

    @property
    def has_words(self) -> bool:
        """Whether the profile stores word codes."""
        return self.memory.bank.manifest.words > 0

    def text(self, row: int) -> str:
        """The text of a row.

        Raises:
            UsageError: nobody has it.
        """
        found = self.texts[row]
        if found is None:
            raise UsageError(
                "the text of a recalled passage is not known",
                value=self.memory.passages["doc_id"][row].as_py(),
                cause="the bank holds documents beyond the QA file's, and was made without --keep-text",
                fix="leave out the reads of full text (--reads recall,shuffled,closed,right), or leave out --bank",
            )
        return found


def _parts(memory: Memory, qa: QaSet, wanted: set[str], count_pieces: Callable[[str], int]) -> Mapping[str, list[str]]:
    """Document id → its passages, from the QA set or else from the texts that the bank keeps."""
    texts = {one.doc_id: one.text for one in qa.documents if one.doc_id in wanted}
    if wanted - set(texts):
        texts = _kept_texts(memory, wanted - set(texts)) | texts
    return {name: split_passages(text, count_pieces) for name, text in texts.items()}


def _kept_texts(memory: Memory, wanted: set[str]) -> dict[str, str]:
    kept = {
        str(row["doc_id"]): row["text_zstd"]
        for row in memory.bank.documents().values()
        if row["doc_id"] in wanted and row["text_zstd"] is not None
    }
    if not kept:
        return {}
    import zstandard

    unpack = zstandard.ZstdDecompressor()
    return {name: unpack.decompress(stored).decode() for name, stored in kept.items() if isinstance(stored, bytes)}


def _right_row(qa: QaSet, place: int, parts: Mapping[str, list[str]], row_of: Mapping[tuple[str, int], int]) -> int:
    """The passage that answers: of its document's, the one that holds an answer and shares most words."""
    question = qa.questions[place]
    name = qa.documents[question.document].doc_id
    if name not in parts:
        return -1
    return row_of.get((name, part_for(question.question, question.answers, parts[name])), -1)
