"""The canary set: questions that are kept beside a bank and asked of every candidate adapter, always the same ones.

Each row carries the memory lines its question is asked with, so that the set measures the adapter alone: neither a
grown bank nor another codebook changes it. Sets are files ``canary/<number>-<digest>.jsonl.gz``, written once; the
newest counts. Rows of forgotten documents are left out at once, and `mbc forget` writes the set anew without them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbc_core.errors import DamagedFile, MbcError, UsageError
from mbc_core.training.replay_set import LINES, document_name, recalled_examples
from mbc_core.training.set_file import Example
from schemas.document import document_key

if TYPE_CHECKING:
    from datetime import datetime

    from mbc_core.bank import Bank
    from mbc_core.bank.tombstones import Tombstones
    from mbc_core.encoder import PassageEncoder
    from mbc_core.evaluation.qa_file import QaSet
    from mbc_core.lexicon import Lexicon
    from mbc_core.memory import Memory

FOLDER = "canary"
MOST, FEWEST = 300, 50
"""Questions of a set that is drawn from replay; with fewer than the second none is drawn."""

_NAME = re.compile(rf"{FOLDER}/(\d{{4,}})-([0-9a-f]{{16}})\.jsonl\.gz")
_ONE_IN = 4


@dataclass(frozen=True, slots=True)
class CanaryRow:
    """One question.

    Attributes:
        question, answer: as they are asked and scored.
        lines: words of passages, best first. line_documents: key of the document of each line.
        true: place of the line that answers; None when it is not among them.
        document: key of the document that answers.
    """

    question: str
    answer: str
    lines: tuple[str, ...]
    line_documents: tuple[int, ...]
    true: int | None
    document: int

    def example(self) -> Example:
        """As training sets hold it."""
        line = "" if self.true is None else self.lines[self.true]
        return Example(
            self.question, self.answer, "canary", self.lines, self.true, line, document_name(self.document), FOLDER
        )


@dataclass(frozen=True)
class Canary:
    """A set as it counts now; ``name`` is its file's."""

    name: str
    rows: tuple[CanaryRow, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """Its rows as training sets hold them."""
        return tuple(one.example() for one in self.rows)


def load_canary(bank: Bank) -> Canary | None:
    """The bank's newest set, without rows of forgotten documents; None when the bank has none.

    Raises:
        DamagedFile: the file does not match its digest.
    """
    files = canary_files(bank)
    if not files:
        return None
    stones = bank.tombstones()
    rows = [row for row in read_canary(bank, files[-1]) if not _is_forgotten(row, stones)]
    return Canary(files[-1].removeprefix(f"{FOLDER}/"), tuple(rows))


def canary_files(bank: Bank) -> list[str]:
    """Paths of all sets, oldest first."""
    found = [one.path for one in bank.storage.list(FOLDER) if _NAME.fullmatch(one.path)]
    return sorted(found, key=lambda path: (_number(path), path))


def save_canary(bank: Bank, rows: Sequence[CanaryRow]) -> str:
    """Write a set beside the earlier ones; from now on it counts. The newest set written again stays one file.

    Returns:
        Its path within the bank.

    Raises:
        UsageError: there are no rows.
        StorageError: the store is full or may not be written.
    """
    if not rows:
        raise UsageError("the canary set is empty", value=0, fix="give at least one question with its answer")
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    data = gzip.compress(text.encode(), mtime=0)
    digest, files = hashlib.sha256(data).hexdigest()[:16], canary_files(bank)
    if files and digest in files[-1]:
        return files[-1]
    path = f"{FOLDER}/{1 + max(map(_number, files), default=0):04d}-{digest}.jsonl.gz"
    bank.storage.write_new(path, data)
    return path


def read_canary(bank: Bank, path: str) -> list[CanaryRow]:
    """All rows of one file, its digest checked.

    Raises:
        DamagedFile: it does not match the digest in its name, or cannot be read.
    """
    named = _NAME.fullmatch(path)
    data = bank.storage.read_bytes(path)
    try:
        if named is None or hashlib.sha256(data).hexdigest()[:16] != named[2]:
            raise ValueError("it does not match the digest in its name")
        return [_row(line) for line in gzip.decompress(data).decode().splitlines() if line]
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise DamagedFile(
            f"the canary set {bank.storage.locate(path)} cannot be read",
            cause=f"it was cut short or edited ({error})",
            fix="restore it from a copy, or set another: mbc adapters canary --bank URI --qa FILE",
        ) from error


def problems(bank: Bank) -> list[str]:
    """Faults of all sets, a line each; for ``mbc inspect --verify``."""
    found = []
    for path in canary_files(bank):
        try:
            read_canary(bank, path)
        except MbcError as error:
            found.append(str(error))
    return found


def without_forgotten(bank: Bank, stones: Tombstones) -> int:
    """Write the newest set anew without rows that hold anything of a forgotten document; delete every file that does.

    Returns:
        How many rows of the newest set were left out.
    """
    files, gone = canary_files(bank), 0
    for place, path in enumerate(files):
        rows = read_canary(bank, path)
        kept = [row for row in rows if not _is_forgotten(row, stones)]
        if len(kept) == len(rows):
            continue
        if place == len(files) - 1:
            gone = len(rows) - len(kept)
            if kept:
                save_canary(bank, kept)
        bank.storage.delete(path)
    return gone


# ------------------------------------------------------------------------------------------------------- making a set


def draw_from_replay(memory: Memory, as_of: datetime | None = None, most: int = MOST) -> list[CanaryRow]:
    """Rows for a set from the bank's own held-out questions: a quarter of their documents, drawn by key.

    Returns:
        no row when that gives fewer than :data:`FEWEST`.
    """
    from mbc_core.memory import microseconds

    rows = [row for row in memory.bank.replay(microseconds(as_of)).to_pylist() if row["split"] != "train"]
    drawn = sorted((row for row in rows if _draw(row["key"]) % _ONE_IN == 0), key=_order)[:most]
    if len(drawn) < FEWEST:
        return []
    questions = [row["question"] for row in drawn]
    _, found = memory.search(memory.encoder.encode_questions(questions), LINES, questions=questions)
    asked = recalled_examples(memory, [(row, "canary") for row in drawn], LINES)
    keys = memory.keys()
    return [
        CanaryRow(one.question, one.answer, one.lines, tuple(keys[places].tolist()), one.true, row["key"])
        for one, row, places in zip(asked, drawn, found, strict=True)
    ]


def draw_from_qa(bank: Bank, qa: QaSet, encoder: PassageEncoder, lexicon: Lexicon) -> list[CanaryRow]:
    """Rows for a set from questions that somebody trusts: each is asked with the nearest passages of the same file.

    The passages' words are chosen and coded as the bank does it; the bank itself is not asked.
    """
    from mbc_core.passages import split_passages
    from mbc_core.words import choose_words

    cut = [split_passages(one.text, encoder.count_pieces) for one in qa.documents]
    owner = np.repeat(np.arange(len(cut)), [len(passages) for passages in cut])
    encoded = encoder.encode([passage for passages in cut for passage in passages])
    matrix = np.stack([one.embedding for one in encoded])
    words = [
        lexicon.read(lexicon.pack(choose_words(one.words, one.scores, bank.manifest.words, lexicon).tolist()))
        for one in encoded
    ]
    salt = bank.manifest.salt
    keys = [document_key(one.doc_id, salt) for one in qa.documents]
    asked = encoder.encode_questions([one.question for one in qa.questions])
    rows = []
    for question, embedding in zip(qa.questions, asked, strict=True):
        places = np.argsort(-(matrix @ embedding), kind="stable")[:LINES].tolist()
        own = [number for number, place in enumerate(places) if owner[place] == question.document]
        rows.append(
            CanaryRow(
                question.question,
                question.answers[0],
                tuple(words[place] for place in places),
                tuple(keys[owner[place]] for place in places),
                own[0] if own else None,
                keys[question.document],
            )
        )
    return rows


def set_from_qa(bank: Bank, path: Path, *, device: str = "cpu") -> tuple[str, int]:
    """Read a QA file and make it the bank's canary set; returns (path of the set, questions).

    Raises:
        UsageError: the file offers no question, or the bank has no word codes.
    """
    from mbc_core import defaults
    from mbc_core.evaluation.qa_file import load_qa

    lexicon = defaults.lexicon_for(bank.manifest)
    if lexicon is None:
        raise UsageError(
            "the bank has no word codes to read",
            value=f"profile {bank.manifest.profile}",
            cause="this profile stores addresses only, so no adapter reads it",
            fix="ingest with --profile default, compact or rich",
        )
    rows = draw_from_qa(bank, load_qa(path), defaults.encoder_for(bank.manifest, device=device), lexicon)
    return save_canary(bank, rows), len(rows)


def _number(path: str) -> int:
    return int(path.removeprefix(f"{FOLDER}/").split("-")[0])


def _row(line: str) -> CanaryRow:
    told = json.loads(line)
    return CanaryRow(**told | {name: tuple(told[name]) for name in ("lines", "line_documents")})


def _is_forgotten(row: CanaryRow, stones: Tombstones) -> bool:
    keys = np.array([row.document, *row.line_documents], dtype=np.int64)
    return bool(stones.forgotten(keys).any())


def _draw(key: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"canary\x00{key}".encode(), digest_size=8).digest(), "little")


def _order(row: dict[str, object]) -> tuple[int, str]:
    return _draw(int(str(row["key"]))), str(row["question"])
