"""Which encoder a pipeline uses, as a small value that travels to the workers and is loaded once a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from apache_beam.utils.shared import Shared

from mbc_core.errors import ModelError

if TYPE_CHECKING:
    from mbc_core.encoder import EncodedPassage
    from mbc_core.lexicon import Lexicon

SHIPPED = "weights:"
"""Prefix of a reference to a file of ``mbc_core.weights``; resolved on the worker, wherever that is installed."""

MINILM = "asset:minilm"
"""The default encoder, from this machine's cache of assets."""

# One handle for the process, not one a pipeline: the model stays loaded from slice to slice.
_LOADED = Shared()  # type: ignore[no-untyped-call]


class Encoder(Protocol):
    """What the pipeline asks of an encoder; ``mbc_core.encoder.PassageEncoder`` is one."""

    encoder_id: str
    salience_digest: str
    width: int

    def count_pieces(self, text: str) -> int:
        """Word pieces of ``text``."""
        ...

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Sequence[EncodedPassage]:
        """Embedding, words and scores of each passage, whatever its neighbours."""
        ...


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """An encoder in memory, and the lexicon that turns its words into codes (None: no word codes)."""

    encoder: Encoder
    lexicon: Lexicon | None


class EncoderSource(Protocol):
    """A picklable value that can load an encoder; equal values load equal encoders."""

    def load(self) -> LoadedEncoder:
        """Load it; slow."""
        ...


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The project's own encoder.

    Attributes:
        model: folder of the model, or ``asset:minilm``.
        salience, lexicon: files, ``weights:<name>`` references, or None for a bank without word codes.
        precision: ``auto``, ``float32`` or ``bfloat16``. device: a torch device.
    """

    model: str = MINILM
    salience: str | None = None
    lexicon: str | None = None
    precision: str = "auto"
    device: str = "cpu"

    def load(self) -> LoadedEncoder:
        """Load model, head and lexicon.

        Raises:
            ModelError, DamagedFile, AssetError: a piece is missing or damaged.
        """
        from mbc_core.encoder import PassageEncoder
        from mbc_core.lexicon import Lexicon

        encoder = PassageEncoder.load(
            resolve(self.model),
            None if self.salience is None else resolve(self.salience),
            precision=self.precision,  # type: ignore[arg-type]  # checked there, with a message for people
            device=self.device,
        )
        return LoadedEncoder(encoder, None if self.lexicon is None else Lexicon.load(resolve(self.lexicon)))


def resolve(reference: str) -> Path:
    """``weights:name``, ``asset:minilm`` or a path → a path on this machine.

    Raises:
        ModelError: there is no such file, or this installation lacks it.
        AssetError: the model cannot be fetched.
    """
    from mbc_core import defaults
    from mbc_core.assets import ASSETS, ensure

    if reference.startswith(SHIPPED):
        return defaults.shipped(reference.removeprefix(SHIPPED))
    if reference == MINILM:
        return ensure("minilm") / ASSETS["minilm"].inside
    path = Path(reference)
    if not path.exists():
        raise ModelError(
            "a model or weight file is not there",
            value=reference,
            cause="a misspelt path",
            fix="check the path, or leave the option out to use the release's own",
        )
    return path


def acquire(source: EncoderSource) -> LoadedEncoder:
    """The encoder of ``source``, loaded at most once in this process as long as the source stays the same."""
    loaded: LoadedEncoder = _LOADED.acquire(source.load, tag=repr(source))
    return loaded


def resolve_device(device: str) -> str:
    """``auto`` → ``cuda`` where there is one, else ``cpu``."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def stack(vectors: Sequence[npt.NDArray[np.float32]], width: int) -> npt.NDArray[np.float32]:
    """Embeddings of passages → float32 [n, width], also for none."""
    return np.stack(vectors).astype(np.float32, copy=False) if vectors else np.zeros((0, width), np.float32)
