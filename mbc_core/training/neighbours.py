"""Neighbour search by codes on torch tensors, for training loops that live on an accelerator.

The bank's own search is ``mbc_core.recall``; this one needs no FAISS and stays on the device.
"""

from __future__ import annotations

import torch

from mbc_core.codes import LENGTH_WEIGHT
from mbc_core.errors import UsageError

_CHUNK_SCORES = 1 << 26
"""Most scores held at once: 256 MiB of float32."""


def code_scores(
    question_slots: torch.Tensor,
    codes: torch.Tensor,
    codewords: torch.Tensor,
    *,
    length_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """score(q, doc) = Σ_t (R·q)_t · E[c_t] + β·(1 - |x̂|²) for every question and passage, as the bank's search has it.

    Args:
        question_slots: R·q split into slots, float [q, T, d_c].
        codes: integer [n, T], on the same device.
        codewords: E, float [K, d_c].
        length_weights: u of a query map, float [T · d_c], when ``question_slots`` went through it; its offset, the
            same for all, is left out.

    Returns:
        [q, n], dtype of ``question_slots``.

    Raises:
        UsageError: shapes that do not fit.
    """
    _check(question_slots, codes, codewords)
    passages, credit = _decoded(codes, codewords, question_slots.dtype, length_weights)
    scores = torch.empty(len(question_slots), len(codes), dtype=question_slots.dtype, device=question_slots.device)
    rows = max(1, _CHUNK_SCORES // max(1, len(codes)))
    for start in range(0, len(question_slots), rows):
        scores[start : start + rows] = question_slots[start : start + rows].flatten(1) @ passages.T + credit
    return scores


def nearest_by_code(
    question_slots: torch.Tensor,
    codes: torch.Tensor,
    codewords: torch.Tensor,
    k: int,
    *,
    exclude: torch.Tensor | None = None,
    length_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` best passages of each question by :func:`code_scores`, without holding all scores at once.

    Args:
        exclude: integer [q]: one passage per question that is not returned, such as the true one when
            distractors are wanted; -1 excludes none.
        length_weights: as in :func:`code_scores`.

    Returns:
        (scores [q, k], rows int64 [q, k]), best first.

    Raises:
        UsageError: shapes that do not fit, or fewer passages than ``k``.
    """
    _check(question_slots, codes, codewords)
    if not 1 <= k <= len(codes) - (exclude is not None):
        raise UsageError(
            "k is not between 1 and the number of passages",
            value=k,
            cause=f"there are {len(codes)} passages",
            fix="ask for fewer neighbours",
        )
    passages, credit = _decoded(codes, codewords, question_slots.dtype, length_weights)
    best, where = [], []
    rows = max(1, _CHUNK_SCORES // len(codes))
    for start in range(0, len(question_slots), rows):
        scores = question_slots[start : start + rows].flatten(1) @ passages.T + credit
        if exclude is not None:
            left_out = exclude[start : start + rows].long()
            named = (left_out >= 0).nonzero().squeeze(1)
            scores[named, left_out[named]] = -torch.inf
        top = scores.topk(k, dim=1)
        best.append(top.values)
        where.append(top.indices)
    return torch.cat(best), torch.cat(where)


def _decoded(
    codes: torch.Tensor, codewords: torch.Tensor, dtype: torch.dtype, length_weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n, T] → (x̂ [n, T · d_c], what its length adds to the score [n]).

    A product with decoded rows beats T look-ups on a device made for products.
    """
    rows = codes.long()
    decoded = codewords[rows].flatten(1)
    if length_weights is None:
        lengths = (codewords.float() ** 2).sum(dim=1)[rows].sum(dim=1)
    else:
        lengths = (decoded.float() ** 2) @ length_weights.float()
    return decoded.to(dtype), (LENGTH_WEIGHT * (1 - lengths)).to(dtype)


def _check(question_slots: torch.Tensor, codes: torch.Tensor, codewords: torch.Tensor) -> None:
    fits = (
        question_slots.ndim == 3
        and codes.ndim == 2
        and codewords.ndim == 2
        and question_slots.shape[1:] == (codes.shape[1], codewords.shape[1])
        and not codes.is_floating_point()
    )
    if not fits:
        raise UsageError(
            "questions, codes and codewords do not fit together",
            value=f"{list(question_slots.shape)}, {list(codes.shape)} {codes.dtype}, {list(codewords.shape)}",
            cause="[q, T, d_c], integer [n, T] and [K, d_c] are expected",
            fix="make the slots with the T and the codebook the codes were made with",
        )
