"""An encoder that remembers: what one run encoded, the next reads from a file outside the repository.

For benchmarks of everything but the encoder, on corpora that repeat. What it gives back is the real encoder's output;
how fast it gives it back is not, and whoever prints a figure says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mbc_core.encoder import EncodedPassage
from pipelines.encoding import Encoder, EncoderSource, LoadedEncoder

_ROWS_AT_ONCE = 2_048
_SCHEMA = pa.schema(
    [
        pa.field("text", pa.binary(), nullable=False),
        pa.field("embedding", pa.binary(), nullable=False),
        pa.field("words", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.binary(), nullable=False),
    ]
)


class MemoEncoder:
    """Remembers every passage's and question's encoding by its text, and counts what it is asked for.

    Args:
        encoder: the real one.
        path: Parquet file of an earlier :meth:`save`, read when it is there; None remembers and saves nothing.

    Attributes:
        encoded: passages that the real encoder had to encode. asked: all that it was asked for.
    """

    def __init__(self, encoder: Encoder, path: Path | None = None) -> None:
        self.encoder_id, self.salience_digest, self.width = encoder.encoder_id, encoder.salience_digest, encoder.width
        self.encoded = self.asked = 0
        self._encoder, self._path = encoder, path
        self._known: dict[bytes, EncodedPassage] = {}
        if path is not None and path.exists():
            self._load(path)

    def count_pieces(self, text: str) -> int:
        """The real encoder's count; not remembered."""
        return self._encoder.count_pieces(text)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[EncodedPassage]:
        """See :class:`pipelines.encoding.Encoder`."""
        names = [_name(text) for text in texts]
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in self._known}
        self.asked, self.encoded = self.asked + len(texts), self.encoded + len(missing)
        if self._path is None:
            return list(self._encoder.encode(texts, progress))
        self._known.update(zip(missing, self._encoder.encode(list(missing.values())) if missing else (), strict=True))
        if progress is not None:
            progress(len(texts))
        return [self._known[name] for name in names]

    def encode_questions(self, questions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings, float32 [n, width]."""
        names = [_name(f"question {text}") for text in questions]
        missing = {name: text for name, text in zip(names, questions, strict=True) if name not in self._known}
        if missing:
            for name, vector in zip(missing, self._encoder.encode_questions(list(missing.values())), strict=True):  # type: ignore[attr-defined]
                self._known[name] = EncodedPassage(vector, (), np.zeros(0, np.float32))
        return np.stack([self._known[name].embedding for name in names])

    def save(self) -> None:
        """Write all that is known to the file."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        known = list(self._known.items())
        with pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as out:
            for start in range(0, len(known), _ROWS_AT_ONCE):
                out.write_batch(_rows(known[start : start + _ROWS_AT_ONCE]))
        partial.replace(self._path)

    def _load(self, path: Path) -> None:
        words: dict[str, str] = {}  # one object a distinct word: the memory stays small
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, use_threads=False):
                for row in batch.to_pylist():
                    self._known[row["text"]] = EncodedPassage(
                        np.frombuffer(row["embedding"], np.float32),
                        tuple(words.setdefault(one, one) for one in row["words"]),
                        np.frombuffer(row["scores"], np.float32),
                    )


@dataclass(frozen=True, slots=True)
class MemoSource:
    """Loads ``source``'s encoder and what is remembered of it.

    Attributes:
        source: the real encoder's. path: Parquet file of :meth:`MemoEncoder.save`; None only counts.
    """

    source: EncoderSource
    path: str | None

    def load(self) -> LoadedEncoder:
        """See :class:`pipelines.encoding.EncoderSource`."""
        loaded = self.source.load()
        return LoadedEncoder(
            MemoEncoder(loaded.encoder, None if self.path is None else Path(self.path)), loaded.lexicon
        )


def _rows(known: Iterable[tuple[bytes, EncodedPassage]]) -> pa.RecordBatch:
    rows = [
        {"text": name, "embedding": one.embedding.tobytes(), "words": list(one.words), "scores": one.scores.tobytes()}
        for name, one in known
    ]
    return pa.RecordBatch.from_pylist(rows, _SCHEMA)


def _name(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
