"""The shuffled bank: every recalled place answers with the codes of another document.

It is the control that a sceptic asks for first: as many lines, of the same kind and length, that know nothing of the
question. What a read scores above it is owed to the documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError

Int64 = NDArray[np.int64]


def shuffled_rows(places: Sequence[Sequence[int]], documents: Int64, right: Int64, seed: int) -> list[list[int]]:
    """For every recalled row another one, of another document and never of the one that answers.

    Args:
        places: recalled rows of each question.
        documents: int64 [rows], the document (any number) of each row.
        right: int64 [questions], the document that answers; -1 when the bank does not hold it.
        seed: of the draw. A question's draw depends on the seed and its place in the list.

    Returns:
        As many rows a question, distinct within it; fewer in a bank too small to offer them.

    Raises:
        UsageError: a bank of one or two documents has nothing to show instead.
    """
    result: list[list[int]] = []
    for number, (recalled, answering) in enumerate(zip(places, right.tolist(), strict=True)):
        order = np.random.default_rng([seed, number]).permutation(len(documents))
        waiting = order[documents[order] != answering].tolist()
        chosen = []
        for row in recalled:
            other = next((one for one in waiting if documents[one] != documents[row]), None)
            if other is not None:
                waiting.remove(other)
                chosen.append(other)
        if recalled and not chosen:
            raise UsageError(
                "the bank is too small to be shuffled",
                value=f"{len(np.unique(documents))} documents",
                cause="every other document is the one recalled or the one that answers",
                fix="leave the read `shuffled` out, or give more documents",
            )
        result.append(chosen)
    return result
