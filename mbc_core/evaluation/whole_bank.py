"""A whole bank as one line of a question sheet: its code histogram, which the aggregate read takes for passages.

The control is the same counts under other codewords: as many codes, spread as unevenly, that stand for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbc_core import defaults
from mbc_core.errors import DamagedFile
from mbc_core.evaluation.sheet import READS, Sheet
from mbc_core.histogram import Histogram
from mbc_core.paper.files import trained_on
from mbc_core.reader.aggregate import AggregateReader

if TYPE_CHECKING:
    from mbc_core.evaluation.shown_codes import ShownCodes
    from mbc_core.memory import Memory


def histogram_line(memory: Memory, shuffle: int | None = None) -> str:
    """The histogram of an open bank as text.

    Args:
        shuffle: a seed: deal the counts of each codebook version out to other codewords.
    """
    from mbc_core.bank.histogram import histogram_of  # not where a sheet is answered: that machine may lack Delta

    found = histogram_of(memory.bank, memory.passages)
    counts = {}
    for version, held in sorted(found.cells.items()):
        codewords = held.shape[1]
        order = (
            np.arange(codewords)
            if shuffle is None
            else np.random.default_rng([shuffle, version]).permutation(codewords)
        )
        counts[str(version)] = held[:, order].tolist()
    return json.dumps({"passages": found.passages, "counts": counts})


def histogram_from(line: str) -> Histogram:
    """Read :func:`histogram_line`.

    Raises:
        DamagedFile: it is something else.
    """
    try:
        told = json.loads(line)
        counts = {int(version): np.array(held, dtype=np.int64) for version, held in told["counts"].items()}
        if any(held.ndim != 2 or held.min(initial=0) < 0 for held in counts.values()):
            raise ValueError("counts are lists of numbers from 0, one list a slot")
        return Histogram(counts, int(told["passages"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(
            "a question sheet's histogram cannot be read",
            value=f"{type(error).__name__}: {error}",
            cause="the sheet is damaged",
            fix="write it again: `mbc eval --write-reads`",
        ) from error


def paper_folder(sheet: Sheet, base_digest: str, given: Path | None, reads: Sequence[str]) -> Path | None:
    """Weights for the sheet's reads of whole banks: given, or shipped for its T; None when there are none to answer
    with and nobody asked for them by name.

    Args:
        base_digest: of the language model; shipped weights of another are left out.
        reads: those asked for by name.

    Raises:
        ModelError: named, and this installation has none for the sheet's T.
    """
    if sheet.codes is None or not any(READS[one.read].adapter == "aggregate" for one in sheet.shown):
        return None
    slots = int(sheet.codes.get("slots", 0))
    named = any(READS[read].adapter == "aggregate" for read in reads)
    if given is not None or named or not defaults.has_paper_weights(slots):
        return given or (defaults.paper_weights(slots) if named else None)
    found = defaults.paper_weights(slots)
    return found if trained_on(found) == base_digest else None


def answer_whole_bank(
    reader: AggregateReader,
    codes: ShownCodes,
    lines: Sequence[Sequence[str]],
    asked: Sequence[str],
    places: Sequence[int],
) -> list[str]:
    """Answers to questions, all of which read the one line.

    Args:
        codes: the sheet's codebooks and question vectors.
        lines: of each question; all the same.
        asked, places: the questions and their places in the sheet.

    Raises:
        DamagedFile: the sheet lacks a codebook or a question's vector.
        IncompatibleBank: the bank's codes mean something else than what the weights read.
    """
    reader.require_bank(codes.encoder, codes.rotation.digest, codes.slots)
    histogram = histogram_from(lines[0][0])
    missing = sorted(set(histogram.cells) - set(codes.codebooks))
    if missing:
        raise DamagedFile("a question sheet lacks codebook versions", value=missing, fix="write it again")
    memory = reader.memory_of(codes.codebooks, histogram)
    return reader.answer(asked, codes.asked(places), memory)
