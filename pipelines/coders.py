"""Deterministic Beam coders for the pipeline's elements: Arrow IPC bytes, one stream for each part of an element.

Equal elements give equal bytes, also when one of them is a slice of a larger batch. The bytes are part of the
update contract of a running pipeline: change them only together with a new class.
"""

from __future__ import annotations

import json
import struct
from dataclasses import astuple
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
from apache_beam.coders import Coder
from apache_beam.coders.typecoders import registry

from pipelines.records import CodeBatch, DeadLetters, DocumentBatch, EncodedBatch, Tally, WindowVectors
from pipelines.spill import SpilledBatch, SpilledVectors

_LENGTH = struct.Struct("<Q")


def to_ipc(rows: pa.RecordBatch) -> bytes:
    """One Arrow IPC stream. Rows are copied first: a slice would carry stray bits of its neighbours along."""
    fresh = rows.take(pa.array(np.arange(rows.num_rows)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, fresh.schema) as writer:
        writer.write_batch(fresh)
    return bytes(sink.getvalue())


def from_ipc(data: bytes | memoryview) -> pa.RecordBatch:
    """Inverse of :func:`to_ipc`; the columns point into ``data``."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_next_batch()


Element = TypeVar("Element", DocumentBatch, EncodedBatch, WindowVectors, CodeBatch, DeadLetters)


class ArrowCoder(Coder, Generic[Element]):
    """Coder of an element class whose ``parts`` are record batches; one subclass each, so that workers find it."""

    element: type[Element]

    def encode(self, value: Element) -> bytes:
        """Length and IPC stream of each part."""
        frames = []
        for name in self.element.parts:
            data = to_ipc(getattr(value, name))
            frames += [_LENGTH.pack(len(data)), data]
        return b"".join(frames)

    def decode(self, encoded: bytes) -> Element:
        """Inverse of :meth:`encode`."""
        view, parts = memoryview(encoded), []
        while view:
            (length,) = _LENGTH.unpack_from(view)
            parts.append(from_ipc(view[_LENGTH.size : _LENGTH.size + length]))
            view = view[_LENGTH.size + length :]
        return self.element(*parts)

    def is_deterministic(self) -> bool:
        """Equal rows, equal bytes."""
        return True

    def to_type_hint(self) -> type[Element]:
        """The element class."""
        return self.element

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class DocumentBatchCoder(ArrowCoder[DocumentBatch]):
    """Coder of :class:`~pipelines.records.DocumentBatch`."""

    element = DocumentBatch


class EncodedBatchCoder(ArrowCoder[EncodedBatch]):
    """Coder of :class:`~pipelines.records.EncodedBatch`."""

    element = EncodedBatch


class WindowVectorsCoder(ArrowCoder[WindowVectors]):
    """Coder of :class:`~pipelines.records.WindowVectors`."""

    element = WindowVectors


class CodeBatchCoder(ArrowCoder[CodeBatch]):
    """Coder of :class:`~pipelines.records.CodeBatch`."""

    element = CodeBatch


class DeadLettersCoder(ArrowCoder[DeadLetters]):
    """Coder of :class:`~pipelines.records.DeadLetters`."""

    element = DeadLetters


class TallyCoder(Coder):
    """Coder of :class:`~pipelines.records.Tally`: JSON with sorted keys."""

    def encode(self, value: Tally) -> bytes:
        """JSON bytes."""
        return value.to_bytes()

    def decode(self, encoded: bytes) -> Tally:
        """Inverse of :meth:`encode`."""
        return Tally.from_bytes(encoded)

    def is_deterministic(self) -> bool:
        """Equal tallies, equal bytes."""
        return True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


Reference = TypeVar("Reference", SpilledBatch, SpilledVectors)


class ReferenceCoder(Coder, Generic[Reference]):
    """Coder of names of files on a common disk: their fields as JSON; one subclass each."""

    element: type[Reference]

    def encode(self, value: Reference) -> bytes:
        """JSON bytes."""
        return json.dumps(astuple(value)).encode()

    def decode(self, encoded: bytes) -> Reference:
        """Inverse of :meth:`encode`."""
        return self.element(*(tuple(one) if isinstance(one, list) else one for one in json.loads(encoded)))

    def is_deterministic(self) -> bool:
        """Equal names, equal bytes."""
        return True

    def to_type_hint(self) -> type[Reference]:
        """The element class."""
        return self.element

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class SpilledBatchCoder(ReferenceCoder[SpilledBatch]):
    """Coder of :class:`~pipelines.spill.SpilledBatch`."""

    element = SpilledBatch


class SpilledVectorsCoder(ReferenceCoder[SpilledVectors]):
    """Coder of :class:`~pipelines.spill.SpilledVectors`."""

    element = SpilledVectors


def register() -> None:
    """Tell Beam's registry which coder each element class takes; importing this module does it."""
    for coder in (DocumentBatchCoder, EncodedBatchCoder, WindowVectorsCoder, CodeBatchCoder, DeadLettersCoder):
        registry.register_coder(coder.element, coder)
    for reference in (SpilledBatchCoder, SpilledVectorsCoder):
        registry.register_coder(reference.element, reference)
    registry.register_coder(Tally, TallyCoder)


register()
