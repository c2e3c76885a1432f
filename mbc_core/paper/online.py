"""Online adaptation of the paper's model: encode, quantize, append. The bank holds codes and nothing else.

One entry a document, by key: a document that comes again replaces its codes, so popular documents weigh no more than
others, and one can be taken out again. The bank names the codebook its codes mean something under, and refuses
another. The histogram is kept while documents come and go, so a question costs the same at any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbc_core.codes import pack, unpack
from mbc_core.errors import IncompatibleBank, UsageError
from mbc_core.paper.aggregation import Memory, cell_counts, code_counts, flat_memory, histogram_memory
from mbc_core.paper.model import PaperModel


class CodeBank:
    """Packed codes of documents, by key, in memory.

    Args:
        codewords: E that the codes refer to, float32 [K, d_c]; a copy is kept.
        tokens: T.
        marked: the model that reads it has slot marks.
    """

    def __init__(self, codewords: Tensor, tokens: int, *, marked: bool = False) -> None:
        self.marked = marked
        self.codewords, self.tokens = codewords.detach().float().clone(), tokens
        self.bits = max(1, (len(codewords) - 1).bit_length())
        self.codebook = codebook_digest(codewords)
        self.cells = torch.zeros((tokens, len(codewords)), dtype=torch.int64, device=codewords.device)
        self._rows: dict[int, NDArray[np.uint8]] = {}

    @classmethod
    def of(cls, model: PaperModel) -> CodeBank:
        """An empty bank under the model's codebook."""
        return cls(model.code_vectors(), model.config.tokens, marked=model.config.slot_marks)

    @property
    def counts(self) -> Tensor:
        """How often each code occurs, int64 [K]."""
        return self.cells.sum(0)

    def add(self, keys: Sequence[int], codes: Tensor, codebook: str) -> int:
        """Append documents; one that is there already is replaced.

        Args:
            keys: of the documents.
            codes: int64 [n, T].
            codebook: digest of the codebook that made them.

        Returns:
            how many documents are new.

        Raises:
            IncompatibleBank: another codebook.
            UsageError: codes of another shape, or beyond the codebook.
        """
        if codebook != self.codebook:
            raise IncompatibleBank(
                "the codes were made under another codebook",
                value=codebook[:12],
                cause=f"this bank's is {self.codebook[:12]}; the model was trained on, or another one was loaded",
                fix="read the bank with the model that wrote it, or encode the documents again",
            )
        if tuple(codes.shape) != (len(keys), self.tokens):
            raise UsageError(
                "codes of another shape",
                value=list(codes.shape),
                cause=f"{len(keys)} documents of {self.tokens} codes are expected",
                fix="pass one row of T codes a key",
            )
        code_counts(codes, len(self.codewords))  # refuses a code beyond the codebook before anything is kept
        before = len(self._rows)
        latest = {int(key): row for row, key in enumerate(keys)}
        self.remove(list(latest))
        chosen = codes[list(latest.values())]
        self._rows |= dict(zip(latest, pack(chosen.cpu().numpy().astype(np.uint16), self.bits), strict=True))
        self.cells += cell_counts(chosen, len(self.codewords))
        return len(self._rows) - before

    def remove(self, keys: Sequence[int]) -> int:
        """Take documents out; returns how many were there."""
        found = [self._rows.pop(key) for key in keys if key in self._rows]
        if found:
            self.cells -= cell_counts(self._unpacked(found), len(self.codewords))
        return len(found)

    def histogram(self) -> Memory:
        """What a question reads: codewords with their counts, O(K) whatever the bank holds (slot marks: O(T·K))."""
        return histogram_memory([(self.codewords, self.cells if self.marked else self.counts)])

    def flat(self) -> Memory:
        """The same, vector by vector: O(N·T)."""
        return flat_memory(self.codewords, self.codes())

    def codes(self) -> Tensor:
        """int64 [N, T], in the order the documents came in."""
        return self._unpacked(list(self._rows.values()))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes; neither keys nor codebook."""
        return sum(row.nbytes for row in self._rows.values())

    def _unpacked(self, rows: Sequence[NDArray[np.uint8]]) -> Tensor:
        if not rows:
            return torch.zeros((0, self.tokens), dtype=torch.int64, device=self.cells.device)
        codes = unpack(np.stack(rows), self.tokens, self.bits).astype(np.int64)
        return torch.from_numpy(codes).to(self.cells.device)


def codebook_digest(codewords: Tensor) -> str:
    """sha256 (hex) of E, float32 [K, d_c]: what a bank stamps its codes with."""
    header = f"mbc-paper-codebook/{'x'.join(map(str, codewords.shape))}/".encode()
    data = codewords.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
    return hashlib.sha256(header + data).hexdigest()


def adapt_online(model: PaperModel, bank: CodeBank, keys: Sequence[int], ids: Tensor, mask: Tensor) -> int:
    """Encode, quantize, append: one forward pass, no gradient, no change to any weight or to the codebook.

    Args:
        keys: of the documents.
        ids, mask: int64 [n, S], the encoder's tokens.

    Returns:
        how many documents are new.

    Raises:
        IncompatibleBank: the bank's codes belong to another codebook.
        UsageError: the model stores no codes (quantization is off, or it reads a bank's address codes).
    """
    if not model.config.quantize:
        raise UsageError(
            "this model stores vectors, not codes",
            value="quantize = false",
            cause="it was trained as MAC, with quantization off",
            fix="keep what PaperModel.encode_documents returns as a Memory",
        )
    return bank.add(keys, model.encode_documents(ids, mask), codebook_digest(model.code_vectors()))
