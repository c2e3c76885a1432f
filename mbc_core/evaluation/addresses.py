"""Passages by their address codes alone, on any device: training's distractors and evaluation's recall.

The bank itself searches with FAISS over packed codes (:mod:`mbc_core.recall`); the scores are the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.codes import Rotation, code_size, quantize, to_slots
from mbc_core.query_map import QueryMap
from mbc_core.training.neighbours import nearest_by_code


class AddressIndex:
    """Address codes of n passages, searched exhaustively.

    Args:
        embeddings: float32 [n, d], unit norm.
        rotation, codewords, slots: R, E (float32 [K, d_c]) and T.
        device: where the search runs.
        query_map: made for R and T; None: the plain score.

    Raises:
        IncompatibleBank: the map belongs to another rotation or T.
    """

    def __init__(
        self,
        embeddings: NDArray[np.float32],
        rotation: Rotation,
        codewords: NDArray[np.float32],
        slots: int,
        device: torch.device | str = "cpu",
        query_map: QueryMap | None = None,
    ) -> None:
        if query_map is not None:
            query_map.require(rotation, slots)
        self._map = query_map
        self._weights = None if query_map is None else torch.from_numpy(query_map.length_weights).to(device)
        self.rotation, self.slots, self.device = rotation, slots, device
        codes = quantize(to_slots(embeddings, rotation, slots), codewords)
        self._codes = torch.from_numpy(codes.astype(np.int64)).to(device)
        self._codewords = torch.from_numpy(codewords).to(device)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def bytes_per_passage(self) -> int:
        """Packed size of one address."""
        return code_size(self.slots)

    def codes(self) -> NDArray[np.uint16]:
        """c of every passage, uint16 [n, T]."""
        found: NDArray[np.uint16] = self._codes.cpu().numpy().astype(np.uint16)
        return found

    def nearest(self, questions: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """The passages that score best for each question.

        Args:
            questions: float32 [q, d], unit norm.

        Returns:
            rows int64 [q, min(k, n)], best first.
        """
        return self.nearest_scored(questions, k)[1]

    def nearest_scored(self, questions: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As :meth:`nearest`, with the scores before the rows: float32 [q, min(k, n)]."""
        k = min(k, len(self))
        if not len(questions):
            return np.zeros((0, k), dtype=np.float32), np.zeros((0, k), dtype=np.int64)
        asked = to_slots(questions, self.rotation, self.slots)
        if self._map is not None:
            asked = self._map.apply(asked)
        turned = torch.from_numpy(asked).to(self.device)
        scores, rows = nearest_by_code(turned, self._codes, self._codewords, k, length_weights=self._weights)
        return scores.float().cpu().numpy(), rows.cpu().numpy()
