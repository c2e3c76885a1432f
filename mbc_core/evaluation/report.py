"""From answered reads to the rows that ``mbc eval`` prints, with paired bootstrap intervals, and to retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from mbc_core.errors import UsageError
from mbc_core.evaluation.answers import Answered, label
from mbc_core.evaluation.metrics import Interval
from mbc_core.evaluation.paired import Resampled
from mbc_core.evaluation.sheet import READS, Sheet, Shown
from schemas.results import Compared, EvalResult, MeasuredRow, RetentionRow

_DEFAULT_AGAINST = (("closed-equal", "closed"), ("text-equal", "text"))


def make_result(sheet: Sheet, answered: Sequence[Answered], against: Sequence[str] = (), seed: int = 0) -> EvalResult:
    """Everything that ``mbc eval --json`` prints.

    Args:
        answered: what :func:`mbc_core.evaluation.answers.answer_sheet` gave for ``sheet``.
        against: reads (or names of rows) that every row is compared with; the closed book and full text when empty,
            each with the equally trained adapter if it answered.
        seed: of the bootstrap.

    Raises:
        UsageError: a row to compare with is not there.
    """
    final = [one for one in answered if one.shown.documents is None]
    figures = sheet.figures
    return {
        "rows": measured_rows(final, against, seed),
        "recall": figures.get("recall", []),
        "bytes": figures.get("bytes", []),
        "texts": figures.get("texts"),
        "retention": retention([one for one in answered if one.shown.documents is not None], seed),
        "settings": dict(figures.get("settings", {})),
        "notes": list(figures.get("notes", [])),
    }


def measured_rows(answered: Sequence[Answered], against: Sequence[str] = (), seed: int = 0) -> list[MeasuredRow]:
    """One row a read; all reads have the same questions.

    Raises:
        UsageError: a row to compare with is not there.
    """
    if not answered:
        return []
    em = Resampled.of(np.stack([one.em for one in answered]), seed=seed)
    f1 = Resampled.of(np.stack([one.f1 for one in answered]), seed=seed)
    shown = [one.shown for one in answered]
    wanted = _chosen(shown, against)
    rows: list[MeasuredRow] = []
    for place, one in enumerate(answered):
        others = [_reference(shown, name, one.shown.k) for name in wanted]
        compared = [
            _compared(label(shown[other]), em.difference(place, other), f1.difference(place, other),
                      f1.share(place, other))
            for other in dict.fromkeys(others)
            if other != place
        ]  # fmt: skip
        rows.append(_row(one, em.interval(place), f1.interval(place), compared))
    return rows


def retention(answered: Sequence[Answered], seed: int = 0) -> list[RetentionRow]:
    """F1 on the first documents' questions at every checkpoint of the stream, above the closed book.

    The closed book is the equally trained one's if it answered, else the same adapter's.
    """
    by_read: dict[str, list[Answered]] = {}
    for one in answered:
        by_read.setdefault(one.shown.read, []).append(one)
    recalled, shuffled = by_read.get("recall", []), by_read.get("shuffled", [])
    closed = by_read.get("closed-equal") or by_read.get("closed")
    if not recalled or not closed:
        return []
    reads = [*recalled, *shuffled, closed[0]]
    drawn = Resampled.of(np.stack([one.f1 for one in reads]), seed=seed)
    last = len(reads) - 1
    control = {one.shown.documents: len(recalled) + place for place, one in enumerate(shuffled)}
    rows: list[RetentionRow] = []
    for place, one in enumerate(recalled):
        beside = control.get(one.shown.documents)
        above_shuffled = None if beside is None else drawn.difference(place, beside)
        row = {
            "documents": one.shown.documents or 0,
            "questions": len(one.f1),
            **_spread("f1", drawn.interval(place)),
            "shuffled_f1": None if beside is None else drawn.interval(beside).mean,
            "closed": label(closed[0].shown).split(" ")[0],
            "closed_f1": drawn.interval(last).mean,
            **_spread("above_closed", drawn.difference(place, last)),
            **_spread("above_shuffled", above_shuffled),
            **_spread("relative", drawn.ratio((place, last), (0, last))),
            **_spread("f1_relative", drawn.share(place, 0)),
        }
        rows.append(cast("RetentionRow", row))
    return rows


def _spread(name: str, interval: Interval | None) -> dict[str, float | None]:
    """``name``, ``name_low``, ``name_high``."""
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _row(one: Answered, em: Interval, f1: Interval, compared: list[Compared]) -> MeasuredRow:
    shown = one.shown
    return {
        "name": label(shown),
        "read": shown.read,
        "profile": shown.profile,
        "k": shown.k,
        "adapter": shown.adapter,
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "em_prefix": float(one.prefix.mean()),
        "f1": f1.mean,
        "f1_low": f1.low,
        "f1_high": f1.high,
        "questions": len(one.f1),
        "bytes_per_passage": shown.bytes_per_passage,
        "prompt_tokens": one.prompt_tokens,
        "passages_shown": one.passages,
        "milliseconds": shown.recall_ms + one.generate_ms,
        "milliseconds_recall": shown.recall_ms,
        "milliseconds_generate": one.generate_ms,
        "compared": compared,
    }


def _compared(name: str, em: Interval, f1: Interval, share: Interval | None) -> Compared:
    return {
        "against": name,
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "f1": f1.mean,
        "f1_low": f1.low,
        "f1_high": f1.high,
        "f1_share": None if share is None else share.mean,
        "f1_share_low": None if share is None else share.low,
        "f1_share_high": None if share is None else share.high,
    }


def _chosen(shown: Sequence[Shown], against: Sequence[str]) -> list[str]:
    """Reads or names of rows to compare with."""
    reads = {one.read for one in shown}
    if not against:
        return [next(name for name in pair if name in reads) for pair in _DEFAULT_AGAINST if reads & set(pair)]
    names = {label(one) for one in shown}
    unknown = [name for name in against if name not in reads | names]
    if unknown:
        raise UsageError(
            "there is no such row to compare with",
            value=unknown,
            cause="this read was not asked" if set(unknown) <= set(READS) else "it is misspelt, or was not asked",
            fix=f"choose among {', '.join(sorted(reads | names))}",
        )
    return list(against)


def _reference(shown: Sequence[Shown], name: str, k: int) -> int:
    """Place of the row ``name``; of a read's several rows, the one of the same k, else the first."""
    exact = [place for place, one in enumerate(shown) if label(one) == name]
    if exact:
        return exact[0]
    same = [place for place, one in enumerate(shown) if one.read == name]
    return next((place for place in same if shown[place].k == k), same[0])
