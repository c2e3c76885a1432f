"""The public transforms: encode → quantize → codebook-update → write, usable in anybody's own pipeline.

    encoded = documents | Encode(encoder, EncodeRule(words=24))
    codebooks = encoded.batches | UpdateCodebook(store, rotation, slots=24)
    codes = encoded.batches | Quantize(codebooks, rotation, slots=24)
    {"codes": codes, "dead_letters": encoded.dead_letters, "tallies": codebooks.tallies} | WriteCodes(bank, slice_id)

Each is a thin carrier around its plain twin in ``pipelines.plain``. Labels and coders are the update contract of a
running pipeline: rename nothing here without a new transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.metrics import Metrics

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from pipelines import coders as _coders  # noqa: F401 - registers the elements' coders
from pipelines.codebook_store import CodebookStore
from pipelines.encoding import EncoderSource, acquire
from pipelines.plain import EncodeRule, assign_codebooks, encode_or_reject, quantize_batch
from pipelines.progress import ENCODED
from pipelines.records import CodeBatch, DeadLetters, DocumentBatch, EncodedBatch, Tally, WindowVectors
from pipelines.sink import WriteCodes
from pipelines.spill import SpilledBatch, SpilledVectors

__all__ = ["Codebooks", "Encode", "Encoded", "Quantize", "UpdateCodebook", "WriteCodes"]

PCollection = beam.PCollection
_NAMESPACE = "mbc"


class Encoded(NamedTuple):
    """Output of :class:`Encode`."""

    batches: PCollection[EncodedBatch]
    dead_letters: PCollection[DeadLetters]


class Codebooks(NamedTuple):
    """Output of :class:`UpdateCodebook`, and side input of :class:`Quantize`.

    Attributes:
        choices: (window, version). versions: (version, ``Codebook.to_bytes()``) of every version that is used.
        tallies: the choice and the waiting statistics of each window, for the ledger.
    """

    choices: PCollection[tuple[str, int]]
    versions: PCollection[tuple[int, bytes]]
    tallies: PCollection[Tally]


class Encode(beam.PTransform):
    """Documents → passages with embeddings and word codes; what cannot be encoded → dead letters.

    Plain twin: :func:`pipelines.plain.encode_documents`.

    Args:
        encoder: loaded once in each process, whatever the number of threads and bundles.
        rule: what is kept of a document.

    Example:
        ``encoded = documents | Encode(EncoderSpec(), EncodeRule(words=0))``
    """

    def __init__(self, encoder: EncoderSource, rule: EncodeRule) -> None:
        super().__init__()
        self.encoder, self.rule = encoder, rule

    def expand(self, pcoll: PCollection[DocumentBatch]) -> Encoded:
        """One DoFn with two outputs."""
        outputs = pcoll | "EncodeBatch" >> (
            beam.ParDo(_EncodeDoFn(self.encoder, self.rule))
            .with_output_types(EncodedBatch, dead_letters=DeadLetters)
            .with_outputs("dead_letters", main="batches")
        )
        return Encoded(outputs.batches, outputs.dead_letters)


class _EncodeDoFn(beam.DoFn):
    def __init__(self, encoder: EncoderSource, rule: EncodeRule) -> None:
        self._encoder, self._rule = encoder, rule
        self._documents = Metrics.counter(_NAMESPACE, "documents_encoded")
        self._passages = Metrics.counter(_NAMESPACE, "passages_encoded")

    def setup(self) -> None:
        self._loaded = acquire(self._encoder)

    def process(self, element: DocumentBatch) -> Iterator[EncodedBatch | pvalue.TaggedOutput]:
        characters = sum(len(text) for text in element.documents["text"].to_pylist())
        counted = _Fraction(len(element), max(1, characters // 700))
        batch, letters = encode_or_reject(self._loaded, element, self._rule, counted)
        counted.finish()
        self._documents.inc(len(element))
        if batch is not None:
            self._passages.inc(batch.passages.num_rows)
            yield batch
        if letters is not None:
            yield pvalue.TaggedOutput("dead_letters", letters)


class _Fraction:
    """Turns passages done into documents done, for the progress bar: exact at the end of the batch."""

    def __init__(self, documents: int, passages: int) -> None:
        self._documents, self._share, self._told = documents, documents / passages, 0.0

    def __call__(self, passages: int) -> None:
        step = min(passages * self._share, self._documents - self._told)
        self._told += step
        ENCODED.add(step)

    def finish(self) -> None:
        ENCODED.add(self._documents - self._told)


class UpdateCodebook(beam.PTransform):
    """Encoded batches → the codebook version of each window, and new versions where enough vectors have gathered.

    The batch form of invariant 3: one worker walks the windows in order, each with the newest version built from
    windows at least two before it. Statistics are exact sums, so bundles and retries change no bit.
    Plain twin: :func:`pipelines.plain.assign_codebooks`.

    Args:
        store: where the chain comes from and new versions go.
        rotation: R. slots: T.
        continues: the window that goes on in the next slice, if there is one.

    Example:
        ``codebooks = encoded.batches | UpdateCodebook(MemoryCodebooks([book.to_bytes()]), rotation, slots=24)``
    """

    def __init__(self, store: CodebookStore, rotation: Rotation, slots: int, continues: str | None = None) -> None:
        super().__init__()
        self.store, self.rotation, self.slots, self.continues = store, rotation, slots, continues

    def expand(self, pcoll: PCollection[EncodedBatch | SpilledBatch]) -> Codebooks:
        """Vectors by window as a side input of one walk."""
        kind = SpilledVectors if pcoll.element_type is SpilledBatch else WindowVectors
        vectors = pcoll | "VectorsByWindow" >> beam.FlatMap(_vectors_by_window).with_output_types(tuple[str, kind])
        windows = vectors | "Windows" >> beam.Keys()
        walk = beam.ParDo(
            _WalkDoFn(self.store, self.rotation, self.slots, self.continues),
            pvalue.AsIter(windows),
            pvalue.AsMultiMap(vectors),
        )
        outputs = (
            pcoll.pipeline
            | "WalkOnce" >> beam.Impulse()
            | "WalkWindows"
            >> walk.with_output_types(tuple[str, int], versions=tuple[int, bytes], tallies=Tally).with_outputs(
                "versions", "tallies", main="choices"
            )
        )
        return Codebooks(outputs.choices, outputs.versions, outputs.tallies)


def _vectors_by_window(batch: EncodedBatch | SpilledBatch) -> Iterator[tuple[str, WindowVectors | SpilledVectors]]:
    return batch.by_window()


class _WalkDoFn(beam.DoFn):
    def __init__(self, store: CodebookStore, rotation: Rotation, slots: int, continues: str | None) -> None:
        self._store, self._rotation, self._slots, self._continues = store, rotation, slots, continues

    def process(
        self, _: bytes, windows: Iterable[str], vectors: Mapping[str, Iterable[WindowVectors | SpilledVectors]]
    ) -> Iterator[tuple[str, int] | pvalue.TaggedOutput]:
        found = assign_codebooks(
            self._store.chain(),
            windows,
            lambda window: (one.load() for one in vectors[window]),
            self._rotation,
            self._slots,
            continues=self._continues,
            recorded=self._store.recorded(),
        )
        for update in found.published:
            self._store.publish(update)
        for version, book in found.codebooks.items():
            yield pvalue.TaggedOutput("versions", (int(version), book.to_bytes()))
        for window, version in found.versions.items():
            kept = found.statistics.get(window)
            path = None if kept is None else self._store.keep(window, kept)
            yield window, int(version)
            yield pvalue.TaggedOutput("tallies", Tally(window, codebook_version=int(version), statistics=path))


class Quantize(beam.PTransform):
    """Encoded batches → code rows: packed addresses, each naming the codebook version of its window.

    Plain twin: :func:`pipelines.plain.quantize_batch`.

    Args:
        codebooks: what :class:`UpdateCodebook` decided, or one codebook for everything.
        rotation: R. slots: T.

    Example:
        ``codes = encoded.batches | Quantize(codebook, rotation, slots=24)``
    """

    def __init__(self, codebooks: Codebooks | Codebook, rotation: Rotation, slots: int) -> None:
        super().__init__()
        self.codebooks, self.rotation, self.slots = codebooks, rotation, slots

    def expand(self, pcoll: PCollection[EncodedBatch | SpilledBatch]) -> PCollection[CodeBatch]:
        """One DoFn with the codebooks as side inputs."""
        if isinstance(self.codebooks, Codebook):
            fixed = _FixedCodebook(self.codebooks)
            work = beam.ParDo(_QuantizeDoFn(self.rotation, self.slots, fixed))
        else:
            choices, versions = pvalue.AsDict(self.codebooks.choices), pvalue.AsDict(self.codebooks.versions)
            work = beam.ParDo(_QuantizeDoFn(self.rotation, self.slots, None), choices, versions)
        return pcoll | "QuantizeBatch" >> work.with_output_types(CodeBatch)


class _FixedCodebook:
    """The same codebook for every window; pickles as safetensors bytes."""

    def __init__(self, codebook: Codebook) -> None:
        self._data = codebook.to_bytes()

    def load(self) -> Callable[[str], Codebook]:
        book = Codebook.from_bytes(self._data, "memory")
        return lambda window: book


class _QuantizeDoFn(beam.DoFn):
    def __init__(self, rotation: Rotation, slots: int, fixed: _FixedCodebook | None) -> None:
        self._rotation, self._slots, self._fixed = rotation, slots, fixed

    def setup(self) -> None:
        self._books: dict[int, Codebook] = {}
        self._book_of = None if self._fixed is None else self._fixed.load()

    def process(
        self,
        element: EncodedBatch | SpilledBatch,
        choices: Mapping[str, int] | None = None,
        versions: Mapping[int, bytes] | None = None,
    ) -> Iterator[CodeBatch]:
        book_of = self._book_of or (lambda window: self._book((choices or {})[window], versions or {}))
        yield quantize_batch(element.load(), book_of, self._rotation, self._slots)

    def _book(self, version: int, versions: Mapping[int, bytes]) -> Codebook:
        if version not in self._books:  # versions never change, so a worker may keep them
            self._books[version] = Codebook.from_bytes(versions[version], f"codebook version {version}")
        return self._books[version]
