"""The tables that `mbc eval` prints for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mbc_core.cli.output import table
from mbc_core.evaluation.sheet import READS

_PAPERS_RULE = "EM*: the paper's rule (the answer is cut to the reference's length before comparing); EM is strict."


def show_eval(result: Mapping[str, Any], console: Console) -> None:
    """Rows, comparisons, recall, bytes, retention, notes."""
    _rows(result["rows"], console)
    _compared(result["rows"], console)
    _recall(result["recall"], console)
    _bytes(result["bytes"], result["texts"], console)
    _retention(result["retention"], console)
    for line in result["notes"]:
        console.print(f"Note: {line}", markup=False)


def _rows(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not rows:
        return
    shown = [
        [
            row["name"],
            f"{row['em']:.1f} [{row['em_low']:.1f}, {row['em_high']:.1f}]",
            f"{row['em_prefix']:.1f}",
            f"{row['f1']:.1f} [{row['f1_low']:.1f}, {row['f1_high']:.1f}]",
            f"{row['bytes_per_passage']:.1f}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['passages_shown']:.1f}",
            f"{row['milliseconds_recall']:.1f} + {row['milliseconds_generate']:.1f}",
        ]
        for row in rows
    ]
    title = f"{rows[0]['questions']:,} questions; 95% paired bootstrap intervals over questions"
    columns = ["read", "EM", "EM*", "F1", "B/passage", "tokens", "shown", "ms recall + generate"]
    console.print(table(title, columns, shown))
    console.print(_PAPERS_RULE, markup=False)
    for read in dict.fromkeys(row["read"] for row in rows):
        console.print(f"  {read}: {READS[read].says}", markup=False)


def _compared(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    shown = [
        [
            row["name"],
            one["against"],
            _signed(one, "em"),
            _signed(one, "f1"),
            "–"
            if one["f1_share"] is None
            else f"{one['f1_share']:.1f}% [{one['f1_share_low']:.1f}, {one['f1_share_high']:.1f}]",
        ]
        for row in rows
        for one in row["compared"]
    ]
    if shown:
        columns = ["read", "against", "EM difference", "F1 difference", "share of its F1"]
        console.print(table("\nPaired differences", columns, shown))


def _recall(figures: Sequence[Mapping[str, Any]], console: Console) -> None:
    shown = [
        [
            f"T = {one['T']}, {one['bytes']} B{again}",
            f"R@{row['k']}",
            f"{row['by_code']:.1f} [{row['by_code_low']:.1f}, {row['by_code_high']:.1f}]",
            "–" if row["by_float"] is None else f"{row['by_float']:.1f}",
            "–" if row["share"] is None else f"{row['share']:.1f}% [{row['share_low']:.1f}, {row['share_high']:.1f}]",
        ]
        for one in figures
        for again, at in (("", one["at"]), (" + words", one["at_reranked"]))
        for row in at
    ]
    if shown:
        title = f"\nThe right passage among the first k, of {figures[0]['passages']:,} passages"
        columns = ["address codes", "", "by code", "by float embedding", "codes, share of float"]
        console.print(table(title, columns, shown))


def _bytes(banks: Sequence[Mapping[str, Any]], texts: Mapping[str, Any] | None, console: Console) -> None:
    rows: list[list[object]] = []
    for one in banks:
        per = one["codebooks"] / max(1, one["passages"])
        rows += [
            [f"{one['profile']}: address", f"{one['address']:.1f}"],
            [f"{one['profile']}: word codes", f"{one['words']:.1f}"],
            [f"{one['profile']}: codes table as stored (with keys, times, logs)", f"{one['codes_table']:.1f}"],
            [f"{one['profile']}: all in (codes and documents tables)", f"{one['all_in']:.1f}"],
            [f"{one['profile']}: codebook files, {one['codebooks']:,} B in all", f"{per:.1f}"],
        ]
    if texts is not None:
        rows += [
            ["the text, UTF-8", f"{texts['text']:.1f}"],
            ["the text, zstd -19, each alone", f"{texts['zstd']:.1f}"],
            [
                f"the same with a dictionary of {texts['dictionary']:,} B trained on these texts (not counted)",
                f"{texts['zstd_dictionary']:.1f}",
            ],
        ]
        if texts["codes"] is not None:
            rows.append(["every word as a 16-bit code", f"{texts['codes']:.1f}"])
    if rows:
        console.print(table("\nBytes a passage, measured on this set", ["", "bytes"], rows))


def _retention(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not rows:
        return
    shown = [
        [
            row["documents"],
            f"{row['f1']:.1f} [{row['f1_low']:.1f}, {row['f1_high']:.1f}]",
            "–" if row["shuffled_f1"] is None else f"{row['shuffled_f1']:.1f}",
            _signed(row, "above_closed"),
            _share(row, "relative"),
            _share(row, "f1_relative"),
        ]
        for row in rows
    ]
    first = rows[0]
    title = (
        f"\nRetention: {first['questions']:,} questions about the first {first['documents']:,} documents;"
        f" closed book ({first['closed']}) F1 {first['closed_f1']:.1f}"
    )
    columns = ["documents", "F1", "shuffled", "above closed", "of the first, above closed", "of the first, F1"]
    console.print(table(title, columns, shown))


def _signed(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:+.1f} [{row[f'{name}_low']:+.1f}, {row[f'{name}_high']:+.1f}]"


def _share(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:.0f}% [{row[f'{name}_low']:.0f}, {row[f'{name}_high']:.0f}]"
