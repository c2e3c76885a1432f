"""First step of the nightly proof: a bank grows quarter by quarter, and is asked after each. No language model."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mbc_core.codes import Rotation
from mbc_core.evaluation.bank_view import BankView
from mbc_core.evaluation.cloze import make_cloze
from mbc_core.evaluation.dated_stream import (
    LINES,
    DatedStream,
    Kind,
    StreamDocument,
    StreamQuestion,
    half_of,
    number_quarters,
)
from mbc_core.evaluation.qa_file import QaDocument, QaQuestion, QaSet
from mbc_core.memory import Memory
from mbc_core.passages import split_passages
from pipelines.encoding import LoadedEncoder, acquire, resolve
from pipelines.evaluate import Remembering, RememberingEncoder
from pipelines.ingest import run_ingest
from pipelines.options import IngestSettings, encoder_of, rotation_of
from schemas.document import document_key
from schemas.manifest import PROFILES

PROFILE = "default"
LEAST_DOCUMENTS = 40
"""A quarter of fewer documents joins the one before."""
GATE_CLOZE = 3
"""Further cloze questions a document, at most; with the replay's one they give a quarter's gate its 300."""
SALT = hashlib.blake2b(b"mbc nightly proof", digest_size=16)
_ALL = 1_000_000

Say = Callable[[str], None]


class GrowingBank:
    """One bank, made and extended by the pipeline.

    Args:
        settings: encoder, rotation and codebook to use; the release's own when None.
    """

    def __init__(self, folder: Path, settings: IngestSettings | None = None) -> None:
        given = settings or IngestSettings()
        self._source = Remembering(encoder_of(given, PROFILES[PROFILE], "cpu", given.precision))
        self._given, self._folder, self._runs = given, folder, 0
        self._loaded: LoadedEncoder = acquire(self._source)

    @property
    def encoder(self) -> RememberingEncoder:
        """The encoder that the bank is made with."""
        found: RememberingEncoder = self._loaded.encoder  # type: ignore[assignment]
        return found

    def add(self, documents: Sequence[QaDocument]) -> dict[str, object]:
        """Ingest documents; no questions come with them, so the replay holds cloze questions."""
        self._runs += 1
        source = self._folder / f"documents-{self._runs}.jsonl"
        rows = [{"id": one.doc_id, "text": one.text, "timestamp": one.timestamp} for one in documents]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        settings = replace(
            self._given,
            encoder=self._source,
            profile=PROFILE,
            replay_per_window=_ALL,
            replay_lifetime=math.inf,
            key_salt=SALT.hexdigest(),
            ingest_id=f"quarter-{self._runs}",
        )
        return dict(run_ingest([str(source)], str(self._folder / "bank"), settings))

    def open(self) -> Memory:
        """The bank as it is now."""
        return Memory.open(
            self._folder / "bank",
            self.encoder,
            lexicon=self._loaded.lexicon,
            rotation=Rotation.load(resolve(rotation_of(self._given))),
        )


def prepare(
    qa: QaSet, *, settings: IngestSettings | None = None, least: int = LEAST_DOCUMENTS, say: Say = lambda line: None
) -> DatedStream:
    """Ingest the set's documents quarter by quarter and note what the bank recalls after each.

    Args:
        qa: dated documents with their questions.
        settings: pieces of the pipeline; the release's own when None.
    """
    began = time.monotonic()
    names, numbers = number_quarters([one.timestamp or "" for one in qa.documents], least)
    with tempfile.TemporaryDirectory(prefix="mbc-nightly-") as folder:
        bank = GrowingBank(Path(folder), settings)
        asking = _Asking(qa, numbers, bank)
        recalled, ingested = [], []
        for quarter, name in enumerate(names):
            told = bank.add([one for one, number in zip(qa.documents, numbers, strict=True) if number == quarter])
            recalled.append(asking.ask(quarter))
            ingested.append({key: told[key] for key in ("documents", "passages", "dead_letters")})
            say(f"{name}: {told['documents']} documents, {len(recalled[-1])} questions asked, "
                f"{time.monotonic() - began:.0f} s so far")  # fmt: skip
        return asking.stream(names, recalled, {"qa": qa.digest, "profile": PROFILE, "ingested": ingested})


class _Asking:
    """Questions, rows and what is recalled, as the quarters come."""

    def __init__(self, qa: QaSet, numbers: Sequence[int], bank: GrowingBank) -> None:
        self._qa, self._numbers, self._bank = qa, numbers, bank
        self._questions: list[QaQuestion] = list(qa.questions)
        self._kinds: list[Kind] = ["asked"] * len(qa.questions)
        self._embedded: dict[int, np.ndarray] = {}
        self._row: dict[tuple[int, int], int] = {}
        self._words: list[str] = []
        self._texts: list[str] = []
        self._owners: list[int] = []
        self._true: dict[int, int] = {}
        self._held_out: set[int] = set()
        self._document = {one.doc_id: place for place, one in enumerate(qa.documents)}
        self._of_key = {
            document_key(one.doc_id, SALT.digest()): place for place, one in enumerate(qa.documents)
        }  # fmt: skip

    def ask(self, quarter: int) -> dict[int, tuple[int, ...]]:
        """Ask about all that has come; the gate's further cloze questions in their own quarter only."""
        memory = self._bank.open()
        self._take_replay(memory, quarter)
        asked = [
            number
            for number, one in enumerate(self._questions)
            if self._numbers[one.document] == quarter
            or (self._numbers[one.document] < quarter and self._kinds[number] != "gate")
        ]
        subset = QaSet(self._qa.documents, tuple(self._questions[number] for number in asked), "")
        view = BankView.of(memory, subset, self._bank.encoder.count_pieces)
        row = self._number_rows(view)
        self._embed(asked)
        embeddings = np.stack([self._embedded[number] for number in asked])
        _, found = memory.search(embeddings, LINES, questions=[self._questions[number].question for number in asked])
        for number, right in zip(asked, view.right.tolist(), strict=True):
            if right >= 0:
                self._true.setdefault(number, row[right])
        return {
            number: tuple(row[place] for place in places)
            for number, places in zip(asked, found.tolist(), strict=True)
            if number in self._true
        }

    def stream(
        self, names: Sequence[str], recalled: Sequence[dict[int, tuple[int, ...]]], figures: dict[str, object]
    ) -> DatedStream:
        """Everything as it is written; questions whose document the bank refused are left out."""
        kept = sorted(self._true)
        place = {number: position for position, number in enumerate(kept)}
        documents = tuple(
            StreamDocument(
                one.doc_id,
                self._numbers[number],
                half_of(document_key(one.doc_id, SALT.digest())),
                number in self._held_out,
            )
            for number, one in enumerate(self._qa.documents)
        )
        questions = tuple(
            StreamQuestion(one.question, one.answers, one.document, self._kinds[number], self._true[number])
            for number, one in ((number, self._questions[number]) for number in kept)
        )
        asked = tuple({place[number]: rows for number, rows in one.items()} for one in recalled)
        counts = {kind: sum(one.kind == kind for one in questions) for kind in ("asked", "cloze", "gate")}
        return DatedStream(
            tuple(names), documents, questions, tuple(self._words), tuple(self._texts), tuple(self._owners), asked,
            figures | {"questions": counts, "missing": len(self._questions) - len(kept)},
        )  # fmt: skip

    def _take_replay(self, memory: Memory, quarter: int) -> None:
        """This quarter's cloze questions of the bank's replay, and a few more of the same making."""
        known = {(one.question, one.document) for one in self._questions}
        for row in sorted(memory.bank.replay().to_pylist(), key=lambda row: (row["key"], row["question"])):
            document = self._of_key[row["key"]]
            if row["split"] != "train":
                self._held_out.add(document)
            if self._numbers[document] == quarter and (row["question"], document) not in known:
                known.add((row["question"], document))
                self._add(row["question"], row["answer"], document, "cloze")
        held = {self._of_key[key] for key in set(memory.keys().tolist())}
        for document, number in enumerate(self._numbers):
            if number == quarter and document in held:
                for question, answer in self._further_cloze(document, known):
                    self._add(question, answer, document, "gate")

    def _further_cloze(self, document: int, known: set[tuple[str, int]]) -> list[tuple[str, str]]:
        parts = split_passages(self._qa.documents[document].text, self._bank.encoder.count_pieces)
        encoded = self._bank.encoder.encode(parts)
        made: dict[str, str] = {}
        for seed in range(1, 4 * GATE_CLOZE):
            place = seed % len(parts)
            cloze = make_cloze(parts[place], encoded[place].words, encoded[place].scores, seed)
            if cloze is not None and (cloze[0], document) not in known and len(made) < GATE_CLOZE:
                made.setdefault(*cloze)
        return list(made.items())

    def _add(self, question: str, answer: str, document: int, kind: Kind) -> None:
        self._questions.append(QaQuestion(question, (answer,), document))
        self._kinds.append(kind)

    def _number_rows(self, view: BankView) -> list[int]:
        """The stream's number of each row of the bank; new rows are added."""
        memory = view.memory
        keys, parts = memory.keys().tolist(), memory.passages["passage"].to_pylist()
        fresh = [place for place, one in enumerate(zip(keys, parts, strict=True)) if one not in self._row]
        names = memory.passages["doc_id"].to_pylist()
        for place, words in zip(fresh, memory.words(np.array(fresh, dtype=np.int64)), strict=True):
            self._row[keys[place], parts[place]] = len(self._words)
            self._words.append(words)
            self._texts.append(view.text(place))
            self._owners.append(self._document[names[place]])
        return [self._row[one] for one in zip(keys, parts, strict=True)]

    def _embed(self, numbers: Sequence[int]) -> None:
        missing = [number for number in numbers if number not in self._embedded]
        if missing:
            made = self._bank.encoder.encode_questions([self._questions[number].question for number in missing])
            self._embedded.update(zip(missing, made, strict=True))
