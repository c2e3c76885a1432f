"""How documents enter the graph: staged batches of a local slice, or sources read by the workers themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from mbc_core.bank import Bank, Status
from pipelines import coders as _coders  # noqa: F401 - registers the elements' coders
from pipelines.plan import rejected_rows
from pipelines.readers import Rejected, read_source
from pipelines.records import DeadLetters, DocumentBatch, Tally, column, staged_rows
from pipelines.refused import forgotten_keys, forgotten_rows
from pipelines.sources import Source
from schemas.document import Document, document_from_bytes

PCollection = beam.PCollection

BATCH_DOCUMENTS = 512
"""Most documents of a batch: enough that the encoder's fixed-shape batches are nearly full."""

BATCH_CHARACTERS = 2 << 20
_REJECTED_AT_ONCE = 100


# ---------------------------------------------------------------------------------------------------- local slices


@dataclass(frozen=True, slots=True)
class StagedBatches:
    """An Arrow IPC file whose record batches are document batches; workers read theirs by number.

    Beside it is a folder where the batches' embeddings wait for the second pass (see ``pipelines.spill``).

    Attributes:
        path: on a disk that every worker sees. batches: how many.
    """

    path: str
    batches: int

    @classmethod
    def write(
        cls, path: Path, documents: pa.RecordBatch, most: int = BATCH_DOCUMENTS, characters: int = BATCH_CHARACTERS
    ) -> StagedBatches:
        """Cut documents into batches of like length, so that little is padded; ``most`` documents each."""
        sizes = np.array([len(text) for text in documents["text"].to_pylist()], np.int64)
        order = np.lexsort((column(documents, "key"), sizes))
        ends = _cut(sizes[order], most, characters)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, documents.schema) as out:
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                out.write_batch(documents.take(pa.array(order[start:end])))
        staged = cls(str(path), len(ends))
        staged.spill_folder.mkdir(exist_ok=True)
        return staged

    @property
    def spill_folder(self) -> Path:
        """For what the slice spills while it runs."""
        return Path(self.path).with_suffix(".spilled")

    def remove(self) -> None:
        """Delete the file and what was spilled beside it."""
        shutil.rmtree(self.spill_folder, ignore_errors=True)
        Path(self.path).unlink()

    def read(self, number: int) -> DocumentBatch:
        """Batch ``number``."""
        with pa.OSFile(self.path, "rb") as stream, pa.ipc.open_file(stream) as file:
            return DocumentBatch(file.get_batch(number))


def _cut(sizes: np.ndarray, most: int, characters: int) -> list[int]:
    ends, held = [], 0
    start = 0
    for place, size in enumerate(sizes.tolist()):
        if place > start and (place - start >= most or held + size > characters):
            ends.append(place)
            start, held = place, 0
        held += size
    return [*ends, len(sizes)] if len(sizes) else []


class ReadStaged(beam.PTransform):
    """Batches of a staged file; only their numbers are shuffled.

    Args:
        staged: the file.
    """

    def __init__(self, staged: StagedBatches) -> None:
        super().__init__()
        self.staged = staged

    def expand(self, pbegin: pvalue.PBegin) -> PCollection[DocumentBatch]:
        """Numbers, spread over the workers, then batches."""
        return (
            pbegin
            | "BatchNumbers" >> beam.Create(range(self.staged.batches)).with_output_types(int)
            | "ReadBatch" >> beam.Map(self.staged.read).with_output_types(DocumentBatch)
        )


# ------------------------------------------------------------------------------------------------ distributed reading


class Read(NamedTuple):
    """Output of :class:`ReadDocuments`."""

    batches: PCollection[DocumentBatch]
    dead_letters: PCollection[DeadLetters]
    tallies: PCollection[Tally]


class ReadDocuments(beam.PTransform):
    """Sources → checked, new documents in batches; the distributed form of the plan pass.

    Workers read one file each, documents meet by key so that the newest of an id wins, and what the bank shows
    already is counted as a duplicate. Texts go through this one shuffle: use it on runners that keep shuffles out
    of memory. Plain twin: :func:`pipelines.plan.make_plan`.

    Args:
        sources: files that every worker can open.
        bank: opened. ingest_id: this run's own commits are not seen as duplicates.
    """

    def __init__(self, sources: Sequence[Source], bank: Bank, ingest_id: str) -> None:
        super().__init__()
        self.sources, self.bank, self.ingest_id = list(sources), bank, ingest_id

    def expand(self, pbegin: pvalue.PBegin) -> Read:
        """Read, meet by key, judge, batch."""
        manifest = self.bank.manifest
        files = pbegin | "Sources" >> beam.Create([(one.path, one.kind) for one in self.sources]).with_output_types(
            tuple[str, str]
        )
        read = files | "ReadSource" >> (
            beam.ParDo(_ReadSourceDoFn(manifest.salt))
            .with_output_types(tuple[int, bytes], dead_letters=DeadLetters, tallies=Tally)
            .with_outputs("dead_letters", "tallies", main="documents")
        )
        newest = (
            read.documents
            | "MeetByKey" >> beam.GroupByKey()
            | "NewestOfId"
            >> beam.ParDo(_NewestDoFn(manifest.salt, manifest.window_seconds))
            .with_output_types(bytes, tallies=Tally)
            .with_outputs("tallies", main="documents")
        )
        judged = newest.documents | "JudgeAndBatch" >> (
            beam.ParDo(_JudgeDoFn(self.bank, self.ingest_id))
            .with_output_types(DocumentBatch, dead_letters=DeadLetters, tallies=Tally)
            .with_outputs("dead_letters", "tallies", main="batches")
        )
        letters = (read.dead_letters, judged.dead_letters) | "ReadDeadLetters" >> beam.Flatten()
        tallies = (read.tallies, newest.tallies, judged.tallies) | "ReadTallies" >> beam.Flatten()
        return Read(judged.batches, letters, tallies)


class _ReadSourceDoFn(beam.DoFn):
    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def process(self, element: tuple[str, str]) -> Iterator[tuple[int, bytes] | pvalue.TaggedOutput]:
        rejected: list[Rejected] = []
        for record in read_source(Source(*element)):
            if isinstance(record, Document):
                yield record.key(self._salt), _to_json(record)
            else:
                rejected.append(record)
            if len(rejected) >= _REJECTED_AT_ONCE:
                yield from self._reject(rejected)
                rejected = []
        yield from self._reject(rejected)

    def _reject(self, rejected: list[Rejected]) -> Iterator[pvalue.TaggedOutput]:
        if rejected:
            letters = DeadLetters(rejected_rows(rejected, self._salt))
            yield pvalue.TaggedOutput("dead_letters", letters)
            # Their counts come with the dead letters; here only that they were seen.
            for tally in letters.tallies(documents_in=True):
                yield pvalue.TaggedOutput("tallies", Tally(tally.window, documents_in=tally.documents_in))


class _NewestDoFn(beam.DoFn):
    """Of the documents with one id the newest; then the greatest content hash, as in ``pipelines.plan.newest``."""

    def __init__(self, salt: bytes, window_seconds: int) -> None:
        self._salt, self._window_seconds = salt, window_seconds

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[bytes | pvalue.TaggedOutput]:
        best: tuple[tuple[int, bytes], bytes] | None = None
        for data in element[1]:
            document = document_from_bytes(data)
            time = np.iinfo(np.int64).min if document.event_time is None else document.event_time
            found = (time, document.content_hash(self._salt)), data
            if best is None:
                best = found
                continue
            loser, best = sorted((best, found))
            yield pvalue.TaggedOutput("tallies", self._replaced(loser[1]))
        if best is not None:
            yield best[1]

    def _replaced(self, data: bytes) -> Tally:
        rows = staged_rows([document_from_bytes(data)], self._salt, self._window_seconds)
        return Tally(rows["window"][0].as_py(), documents_in=1, replaced=1)


class _JudgeDoFn(beam.DoFn):
    """New documents in batches; duplicates of what the bank shows are only counted, forgotten ones are refused."""

    def __init__(self, bank: Bank, ingest_id: str) -> None:
        self._bank, self._ingest_id = bank, ingest_id

    def setup(self) -> None:
        self._visible = self._bank.visible(ignore_ingest=self._ingest_id)

    def start_bundle(self) -> None:
        self._held: list[Document] = []
        self._characters = 0

    def process(self, element: bytes) -> Iterator[DocumentBatch | pvalue.TaggedOutput]:
        self._held.append(document_from_bytes(element))
        self._characters += len(self._held[-1].text)
        if len(self._held) >= BATCH_DOCUMENTS or self._characters >= BATCH_CHARACTERS:
            yield from self._release()

    def finish_bundle(self) -> Iterator[WindowedValue | pvalue.TaggedOutput]:
        window = GlobalWindow()
        for output in self._release():
            tagged = isinstance(output, pvalue.TaggedOutput)
            value = WindowedValue(output.value if tagged else output, window.max_timestamp(), [window])
            yield pvalue.TaggedOutput(output.tag, value) if tagged else value

    def _release(self) -> Iterator[DocumentBatch | pvalue.TaggedOutput]:
        if not self._held:
            return
        manifest = self._bank.manifest
        rows = staged_rows(self._held, manifest.salt, manifest.window_seconds)
        self._held, self._characters = [], 0
        gone = forgotten_keys(column(rows, "key").astype(np.int64), self._visible)
        if gone.any():
            letters = DeadLetters(forgotten_rows(rows["window"].filter(pa.array(gone)).to_pylist()))
            yield pvalue.TaggedOutput("dead_letters", letters)
            for seen in letters.tallies(documents_in=True):
                yield pvalue.TaggedOutput("tallies", Tally(seen.window, documents_in=seen.documents_in))
        new, tallies = drop_duplicates(rows.filter(pa.array(~gone)), self._visible)
        for tally in tallies:
            yield pvalue.TaggedOutput("tallies", tally)
        if new.num_rows:
            yield DocumentBatch(new)


def drop_duplicates(rows: pa.RecordBatch, visible: object) -> tuple[pa.RecordBatch, list[Tally]]:
    """Rows that the bank does not show yet, and the counts of all rows by window.

    Args:
        rows: of ``STAGED``. visible: ``mbc_core.bank.VisibleKeys``.
    """
    hashes = np.frombuffer(b"".join(rows["content_hash"].to_pylist()), np.uint8).reshape(-1, 16)
    duplicate = visible.status(column(rows, "key"), hashes) == Status.DUPLICATE  # type: ignore[attr-defined]
    windows = rows["window"].to_pylist()
    seen: dict[str, list[int]] = {}
    for window, known in zip(windows, duplicate.tolist(), strict=True):
        counts = seen.setdefault(window, [0, 0])
        counts[0] += 1
        counts[1] += known
    tallies = [Tally(window, documents_in=total, duplicates=known) for window, (total, known) in seen.items()]
    return rows.filter(pa.array(~duplicate)), tallies


def _to_json(document: Document) -> bytes:
    time = None if document.event_time is None else np.datetime64(document.event_time, "us").item().isoformat()
    fields = {"id": document.doc_id, "text": document.text, "title": document.title, "uri": document.uri}
    qa = [{"question": question, "answer": answer} for question, answer in document.qa]
    return json.dumps(fields | {"timestamp": time, "qa": qa}, ensure_ascii=False).encode()
