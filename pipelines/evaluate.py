"""Banks for ``mbc eval``: built through the pipeline from a QA file's documents, the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mbc_core.codes import Rotation
from pipelines.encoding import Encoder, EncoderSource, LoadedEncoder, acquire, resolve, resolve_device
from pipelines.ingest import run_ingest
from pipelines.options import IngestSettings, encoder_of, rotation_of
from schemas.manifest import PROFILES

if TYPE_CHECKING:
    from mbc_core.encoder import EncodedPassage
    from mbc_core.evaluation.qa_file import QaDocument
    from mbc_core.memory import Memory, QuestionEncoder

_SALT = hashlib.blake2b(b"mbc eval", digest_size=16).hexdigest()


@dataclass(frozen=True)
class Remembering:
    """Loads the encoder of ``inner`` so that it encodes each passage once, for however many banks."""

    inner: EncoderSource

    def load(self) -> LoadedEncoder:
        """See :class:`pipelines.encoding.EncoderSource`."""
        loaded = self.inner.load()
        return LoadedEncoder(RememberingEncoder(loaded.encoder), loaded.lexicon)


class RememberingEncoder:
    """An encoder that keeps what it encoded: right, because a passage's codes don't depend on its neighbours."""

    def __init__(self, inner: Encoder) -> None:
        self._inner, self._known = inner, dict[str, "EncodedPassage"]()
        self.encoder_id, self.salience_digest, self.width = inner.encoder_id, inner.salience_digest, inner.width

    def count_pieces(self, text: str) -> int:
        """Word pieces of ``text``."""
        return self._inner.count_pieces(text)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[EncodedPassage]:
        """Embedding, words and scores of each passage."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._inner.encode(unknown, progress), strict=True))
        if progress is not None:
            progress(len(texts) - len(unknown))
        return [self._known[text] for text in texts]

    def encode_questions(self, questions: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [n, width], unit norm."""
        found: npt.NDArray[np.float32] = self._inner.encode_questions(questions)  # type: ignore[attr-defined]
        return found


class PipelineBanks:
    """Builds banks below ``folder``; see :class:`mbc_core.evaluation.protocols.Builder`.

    Args:
        folder: a temporary one.
        device: where the encoder runs.
        settings: the encoder, rotation and codebook to use; the release's own when None.
        say: told what each ingest did.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        settings: IngestSettings | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        given = settings or IngestSettings()
        device = resolve_device(device)
        source = Remembering(encoder_of(given, PROFILES["default"], device, given.precision))
        self._settings = replace(given, encoder=source, device=device, replay_per_window=0, key_salt=_SALT)
        self._folder, self._say, self._runs = folder, say, 0
        self._loaded = acquire(source)

    @property
    def encoder(self) -> RememberingEncoder:
        """The encoder that the banks are made with."""
        found: RememberingEncoder = self._loaded.encoder  # type: ignore[assignment]
        return found

    def add(self, name: str, profile: str, documents: Sequence[QaDocument]) -> None:
        """Run documents through the pipeline into the bank ``name``."""
        self._runs += 1
        source = self._folder / f"{name}-{self._runs}.jsonl"
        rows = [{"id": one.doc_id, "text": one.text, "timestamp": one.timestamp} for one in documents]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        settings = replace(self._settings, profile=profile, ingest_id=f"eval-{self._runs}")
        result = run_ingest([str(source)], str(self._folder / name), settings)
        source.unlink()
        lost = f", {result['dead_letters']} dead letters" if result["dead_letters"] else ""
        self._say(
            f"bank {name} ({profile}): {result['documents']:,} documents, {result['passages']:,} passages in"
            f" {result['seconds']:.1f} s{lost}"
        )

    def open(self, name: str) -> Memory:
        """The bank as it is now."""
        from mbc_core.memory import Memory

        encoder: QuestionEncoder = self.encoder
        return Memory.open(
            self._folder / name,
            encoder,
            lexicon=self._loaded.lexicon,
            rotation=Rotation.load(resolve(rotation_of(self._settings))),
        )
