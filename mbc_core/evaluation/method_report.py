"""From outcomes of methods to a result of JSON values and to Markdown tables, with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mbc_core.errors import UsageError
from mbc_core.evaluation.bank_bytes import paper_bytes
from mbc_core.evaluation.method_run import Outcome, Protocol, asked_places
from mbc_core.evaluation.methods import MethodSet
from mbc_core.evaluation.metrics import Interval
from mbc_core.evaluation.paired import Resampled

_MIB = 1 << 20
ADDRESS_WIDTH = 384
"""Width of the default encoder's embeddings, which address codes split into T parts."""


@dataclass(frozen=True, slots=True)
class Controls:
    """Names of the rows that a method is held against; None: it has no such control.

    Attributes:
        closed: the closed book that was trained equally.
        shuffled: the same model over a bank of other documents.
    """

    closed: str | None = None
    shuffled: str | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """How many entries a bank of the set has, counted three ways.

    Attributes:
        documents: each document once.
        passages: a document longer than the encoder reads is several; what this project stores.
        questions: one entry a question row, as the paper's released code stores.
        stored: measured bytes a passage of a bank's tables, by T.
    """

    documents: int
    passages: int
    questions: int
    stored: Mapping[int, float]

    @classmethod
    def of(cls, data: MethodSet, stored: Mapping[int, float] | None = None) -> Counted:
        """The counts of a set."""
        return cls(len(data.documents), len(data.prepared), len(data.prepared.questions), stored or {})


def make_report(
    data: MethodSet,
    outcomes: Sequence[Outcome],
    controls: Mapping[str, Controls],
    counted: Counted,
    protocol: Protocol,
    *,
    width: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything measured on one set, as JSON values.

    Args:
        outcomes: methods that answered the same questions.
        controls: method name → what it is held against; rows that did not answer are passed over.
        width: of the language model, for MAC's bytes on the same backbone.
        seed: of the bootstrap.

    Raises:
        UsageError: no method answered, or two have one name.
    """
    names = [one.name for one in outcomes]
    if not outcomes or len(set(names)) != len(names):
        raise UsageError("the methods cannot be told apart", value=names, fix="give at least one, each with its name")
    f1 = Resampled.of(np.stack([one.f1 for one in outcomes]), seed=seed)
    em = Resampled.of(np.stack([one.em for one in outcomes]), seed=seed)
    place = {name: number for number, name in enumerate(names)}
    rows = [_row(one, number, em, f1, controls.get(one.name, Controls()), place) for number, one in enumerate(outcomes)]
    first = asked_places(data, protocol, protocol.first) if protocol.first else []
    return {
        "set": data.name,
        "digest": data.digest,
        "documents": counted.documents,
        "passages": counted.passages,
        "questions": len(outcomes[0].f1),
        "protocol": asdict(protocol),
        "rows": rows,
        "retention": _retention(outcomes, controls, place, seed),
        "retention_questions": len(first),
        "bytes": bytes_rows(counted, sorted({one.size.slots for one in outcomes if one.size.slots} | {12, 24}), width),
    }


def bytes_rows(counted: Counted, slots: Sequence[int], width: int, codewords: int = 512) -> list[dict[str, Any]]:
    """MAC's floats and the paper's bank at every T and way of counting, for K = ``codewords``.

    Args:
        width: of the language model; the learned codebook's d_c too. Address codes split an embedding of 384 numbers,
            so theirs is 384 / T; their entries take the same.
    """
    rows = []
    for count in slots:
        stored = counted.stored.get(count)
        kinds = [("passage", counted.passages, "learned", width, stored)]
        if ADDRESS_WIDTH % count == 0:
            kinds.append(("passage", counted.passages, "address", ADDRESS_WIDTH // count, stored))
        kinds.append(("document", counted.documents, "learned", width, None))
        kinds.append(("question row", counted.questions, "learned", width, None))
        for entry, entries, codes, code_width, each in kinds:
            found = paper_bytes(
                entries, count, width, code_width=code_width, codewords=codewords, stored_per_entry=each
            )
            rows.append(
                {
                    "T": count,
                    "codes": codes,
                    "entry": entry,
                    **asdict(found),
                    "share_indices": found.indices,
                    "share_with_codebook": found.with_codebook,
                    "share_all_in": found.all_in,
                    "share_as_the_paper": found.as_the_paper,
                }
            )
    return rows


def _row(
    one: Outcome, number: int, em: Resampled, f1: Resampled, held: Controls, place: Mapping[str, int]
) -> dict[str, Any]:
    compared = {
        kind: {"against": name, **_spread("em", em.difference(number, place[name])),
               **_spread("f1", f1.difference(number, place[name]))}
        for kind, name in _named(held)
        if name in place
    }  # fmt: skip
    return {
        "name": one.name,
        "says": one.says,
        **_spread("em", em.interval(number)),
        "em_prefix": float(one.prefix.mean()),
        **_spread("f1", f1.interval(number)),
        "compared": compared,
        "size": asdict(one.size),
        "milliseconds_question": one.ms_question,
        "milliseconds_question_alone": one.ms_single,
        "milliseconds_document": one.ms_document,
        "peak_bytes": one.peak_bytes,
    }


def _named(held: Controls) -> list[tuple[str, str]]:
    given: dict[str, str | None] = asdict(held)
    return [(kind, name) for kind, name in given.items() if name is not None]


def _retention(
    outcomes: Sequence[Outcome], controls: Mapping[str, Controls], place: Mapping[str, int], seed: int
) -> list[dict[str, Any]]:
    """F1 on the first documents at each stop, absolute, above the equal closed book, and relative to the first stop."""
    rows: list[dict[str, Any]] = []
    for one in outcomes:
        halts = sorted(one.retained)[: 1 if one.size.kind == "none" else None]  # documents change nothing there
        if not halts:
            continue
        name = controls.get(one.name, Controls()).closed
        closed = outcomes[place[name]] if name is not None and name in place else None
        values = [one.retained[halt] for halt in halts]
        if closed is not None and closed.retained:
            values.append(closed.retained[min(closed.retained)])  # documents do not change it
        drawn = Resampled.of(np.stack(values), seed=seed)
        last = len(halts) if len(values) > len(halts) else None
        for number, halt in enumerate(halts):
            rows.append(
                {
                    "name": one.name,
                    "documents": halt,
                    **_spread("f1", drawn.interval(number)),
                    **_spread("above_closed", None if last is None else drawn.difference(number, last)),
                    **_spread("f1_relative", drawn.share(number, 0)),
                }
            )
    return rows


def _spread(name: str, interval: Interval | None) -> dict[str, float | None]:
    """``name``, ``name_low``, ``name_high``."""
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of :func:`make_report` as Markdown."""
    title = (
        f"### {report['set']}: {report['documents']:,} documents ({report['passages']:,} passages), "
        f"{report['questions']:,} questions\n\n95% paired bootstrap intervals over questions. EM is strict; EM* is the "
        "paper's rule (the answer is cut to the reference's length before comparing).\n"
    )
    parts = [title, _method_table(report["rows"]), _says(report["rows"])]
    if report["retention"]:
        parts.append(_retention_table(report))
    parts.append(_bytes_table(report["bytes"]))
    return "\n".join(parts)


def _method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        "method", "EM", "EM*", "F1", "F1 − closed", "F1 − shuffled", "bank", "weights beside", "ms/doc", "ms/question",
        "alone", "peak GPU",
    ]  # fmt: skip
    return table(
        columns,
        [
            [
                row["name"],
                _interval(row, "em"),
                f"{row['em_prefix']:.1f}",
                _interval(row, "f1"),
                _signed(row["compared"].get("closed"), "f1"),
                _signed(row["compared"].get("shuffled"), "f1"),
                _bank(row["size"]),
                _bytes(row["size"]["model"]),
                f"{row['milliseconds_document']:.1f}",
                f"{row['milliseconds_question']:.1f}",
                f"{row['milliseconds_question_alone']:.0f}",
                f"{row['peak_bytes'] / _MIB:,.0f} MiB" if row["peak_bytes"] else "–",
            ]
            for row in rows
        ],
    )


def _says(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"- {row['name']}: {row['says']}.\n" for row in rows)


def _retention_table(report: Mapping[str, Any]) -> str:
    rows = report["retention"]
    head = (
        f"Retention: F1 on {report['retention_questions']:,} questions about the first "
        f"{report['protocol']['first']:,} documents as the stream grows.\n\n"
    )
    return head + table(
        ["method", "documents", "F1", "F1 − closed", "of the first stop"],
        [
            [
                row["name"],
                f"{row['documents']:,}",
                _interval(row, "f1"),
                _signed(row, "above_closed"),
                "–" if row["f1_relative"] is None else f"{row['f1_relative']:.0f}%",
            ]
            for row in rows
        ],
    )


def _bytes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "Bank bytes on one backbone and T. Shares are of MAC's floats: packed indices; with the float32 codebook; "
        "all-in (tables as stored, with keys, times and logs, and the codebook). The last column is the released "
        "code's way to count: 64-bit indices and the codebook.\n\n"
    )
    columns = [
        "T", "codes", "an entry is a", "entries", "MAC", "int64", "packed", "codebook", "indices", "with codebook",
        "all-in", "int64 with codebook",
    ]  # fmt: skip
    return head + table(
        columns,
        [
            [
                row["T"],
                row["codes"],
                row["entry"],
                f"{row['entries']:,}",
                _bytes(row["mac"]),
                f"{row['int64']:,}",
                f"{row['packed']:,}",
                f"{row['codebook']:,}",
                _share(row["share_indices"]),
                _share(row["share_with_codebook"]),
                _share(row["share_all_in"]),
                _share(row["share_as_the_paper"]),
            ]
            for row in rows
        ],
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns; the first is left-aligned."""
    cells = [[str(one) for one in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [
        "| "
        + " | ".join(one.rjust(width) if place else one.ljust(width) for place, (one, width) in enumerate(pairs))
        + " |"
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    rule = "|" + "|".join(f"{'-' * (width + 1)}:" if place else "-" * (width + 2) for place, width in enumerate(widths))
    return "\n".join([lines[0], f"{rule}|", *lines[1:]]) + "\n"


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"


def _signed(row: Mapping[str, Any] | None, name: str) -> str:
    if row is None or row[name] is None:
        return "–"
    return f"{row[name]:+.1f} [{row[f'{name}_low']:+.1f}, {row[f'{name}_high']:+.1f}]"


def _bank(size: Mapping[str, Any]) -> str:
    if size["kind"] == "none":
        return "0"
    each = f" ({size['bank'] / size['entries']:,.1f} each)" if size["entries"] else ""
    return f"{_bytes(size['bank'])} {size['kind']}{each}"


def _bytes(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count >= _MIB else f"{count:,} B"


def _share(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:,.0f}%" if share >= 1 else f"{100 * share:.3g}%"
