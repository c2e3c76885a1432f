"""What a question sheet carries so that codes can be read as vectors where no bank is: addresses, codebooks, questions.

A passage is a line of the sheet like any other: the number of its codebook version and its packed address in hex, the
27 bytes that the bank stores. Codebooks, rotation and question vectors are there once.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbc_core.codes import Float32, Rotation, unpack
from mbc_core.errors import DamagedFile
from mbc_core.reader.attend import passage_vectors

if TYPE_CHECKING:
    from mbc_core.memory import Memory

Int64 = NDArray[np.int64]


def address_lines(memory: Memory) -> list[str]:
    """Each row of a bank as a sheet carries it: ``version:hex``."""
    versions = memory.passages["codebook_version"].to_pylist()
    addresses = memory.passages["address"].to_pylist()
    return [f"{version}:{address.hex()}" for version, address in zip(versions, addresses, strict=True)]


@dataclass(frozen=True, eq=False)
class ShownCodes:
    """Decodes the address lines of one sheet.

    Attributes:
        encoder: id of the encoder that made the vectors.
        slots: T.
        rotation: R.
        codebooks: version → E, float32 [K, d_c].
        questions: place of a question in the sheet → its row of ``question_vectors``.
        question_vectors: float32 [q, d], unit norm.
    """

    encoder: str
    slots: int
    rotation: Rotation
    codebooks: dict[int, Float32]
    questions: dict[int, int]
    question_vectors: Float32

    @classmethod
    def of(cls, memory: Memory, places: Sequence[int], question_vectors: Float32) -> ShownCodes:
        """Those of a bank and the questions ``places`` asked of it."""
        versions = sorted(set(memory.passages["codebook_version"].to_pylist()))
        return cls(
            memory.bank.manifest.encoder,
            memory.bank.manifest.slots,
            memory.rotation,
            {version: memory.bank.codebook(version).codewords for version in versions},
            {place: row for row, place in enumerate(places)},
            question_vectors,
        )

    def passages(self, lines: Sequence[str]) -> Float32:
        """x̂ of address lines, float32 [lines, d].

        Raises:
            DamagedFile: a line names a codebook that the sheet lacks, or is no address.
        """
        found = np.zeros((len(lines), self.rotation.width), np.float32)
        by_version: dict[int, list[int]] = {}
        packed = []
        try:
            for place, line in enumerate(lines):
                version, _, address = line.partition(":")
                by_version.setdefault(int(version), []).append(place)
                packed.append(np.frombuffer(bytes.fromhex(address), np.uint8))
            for number, rows in by_version.items():
                codes = unpack(np.stack([packed[row] for row in rows]), self.slots)
                found[rows] = passage_vectors(codes, self.codebooks[number], self.rotation)
        except (ValueError, KeyError) as error:
            raise DamagedFile(
                "a question sheet's address cannot be read",
                value=f"{type(error).__name__}: {error}",
                cause="the sheet is damaged, or lacks a codebook version",
                fix="write it again: `mbc eval --write-reads`",
            ) from error
        return found

    def asked(self, places: Sequence[int]) -> Float32:
        """Vectors of questions by their place in the sheet, float32 [places, d].

        Raises:
            DamagedFile: the sheet does not have one.
        """
        try:
            return self.question_vectors[[self.questions[place] for place in places]]
        except KeyError as error:
            raise DamagedFile(
                "a question sheet lacks a question's vector", value=str(error), fix="write it again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """JSON values; question vectors in half precision."""
        return {
            "encoder": self.encoder,
            "slots": self.slots,
            "rotation": _text(self.rotation.matrix),
            "codebooks": {str(version): _text(words) for version, words in self.codebooks.items()},
            "questions": list(self.questions),
            "question_vectors": _text(self.question_vectors.astype(np.float16)),
        }

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> ShownCodes:
        """Read :meth:`to_json`.

        Raises:
            DamagedFile: it is something else.
        """
        try:
            slots = int(told["slots"])
            flat = _numbers(told["rotation"], np.float32)
            width = round(len(flat) ** 0.5)
            return cls(
                str(told["encoder"]),
                slots,
                Rotation(flat.reshape(width, width)),
                {
                    int(version): _numbers(text, np.float32).reshape(-1, width // slots)
                    for version, text in told["codebooks"].items()
                },
                {int(place): row for row, place in enumerate(told["questions"])},
                _numbers(told["question_vectors"], np.float16).reshape(-1, width).astype(np.float32),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise DamagedFile(
                "the codes of a question sheet cannot be read",
                value=f"{type(error).__name__}: {error}",
                cause="the sheet is damaged",
                fix="write it again: `mbc eval --write-reads`",
            ) from error


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _numbers(text: str, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
