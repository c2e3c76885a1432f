"""Prints the nightly proof's table, goals and gate decisions, and writes them as JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mbc_core.evaluation.line_plot import Panel, lines_svg
from mbc_core.evaluation.metrics import Interval
from mbc_core.evaluation.nightly_table import Results, goals, last_half, load_results, new_change, table_rows
from mbc_core.training.nightly import ARMS


def report(folder: Path) -> str:
    """Text for people; ``report.json`` and ``report.svg`` are written into ``folder``."""
    results = load_results(folder)
    rows = table_rows(results)
    parts = [_head(results), _table(rows), _changes(results), _controls(results), _gates(results), _goals(results)]
    told = {
        "made_of": dict(results.made_of), "device": results.device, "halves": dict(results.halves), "rows": rows,
        "goals": [asdict(one) for one in goals(results)], "changes": _change_rows(results),
        "shuffled": _shuffled(results),
        "gates": {arm: [dict(one.gates) for one in evaluated] for arm, evaluated in results.arms.items()},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    (folder / "report.svg").write_text(plot(results), "utf-8")
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(results: Results) -> str:
    """F1 on the new quarter and on all earlier ones, per arm, over quarters."""
    rows = table_rows(results)
    panels = []
    for part, title in (("new", "each quarter's own questions"), ("old", "questions of all earlier quarters")):
        series: dict[str, list[float | None]] = {}
        for arm in _ordered(results):
            found = {row["quarter"]: row[f"{part}_f1"] for row in rows if row["arm"] == arm}
            series[arm] = [found.get(name) for name in results.quarters]
        panels.append(Panel(title, "F1", series))
    return lines_svg(panels, results.quarters)


def _ordered(results: Results) -> list[str]:
    return [arm for arm in ARMS if arm in results.arms]


def _head(results: Results) -> str:
    halves = {arm: "+".join(found) for arm, found in results.halves.items()}
    arms = [f"  {arm:<14}{ARMS[arm].says} (halves {halves[arm]})" for arm in _ordered(results)]
    return "\n".join([f"{results.device}, choices {results.made_of['choices']}", *arms])


def _table(rows: list[dict[str, Any]]) -> str:
    order = {arm: place for place, arm in enumerate(ARMS)}
    lines = ["quarter   arm            new: n    EM    F1    old: n    EM    F1   adapted in"]
    for row in sorted(rows, key=lambda row: (row["quarter"], order[row["arm"]])):
        seconds = "" if row["adapt_seconds"] is None else f"{row['adapt_seconds']:8.1f} s"
        lines.append(
            f"{row['quarter']:<9} {row['arm']:<14}{_n(row['new_questions'])}{_f(row['new_em'])}{_f(row['new_f1'])}"
            f"   {_n(row['old_questions'])}{_f(row['old_em'])}{_f(row['old_f1'])} {seconds}"
        )
    return "\n".join(lines)


def _change_rows(results: Results) -> list[dict[str, Any]]:
    """``nightly`` against every other arm, on new questions of the last half and on old ones at the end."""
    found = []
    for arm in _ordered(results):
        quarters = last_half(results, "nightly", arm)
        if arm == "nightly" or not quarters:
            continue
        new, end = new_change(results, "nightly", arm), quarters[-1]
        old = results.change(results.old("nightly", end), results.old(arm, end)) if end else None
        found.append({"against": arm, "new": new and asdict(new), "old": old and asdict(old)})
    return found


def _changes(results: Results) -> str:
    rows = _change_rows(results)
    if not rows:
        return ""
    lines = ["nightly against … (F1, 95% interval by document)   new, last half            old, at the end"]
    for row in rows:
        new, old = (_interval(row[part]) for part in ("new", "old"))
        lines.append(f"  {row['against']:<48} {new:<25} {old}")
    return "\n".join(lines)


def _shuffled(results: Results) -> dict[str, dict[str, float]]:
    found = {}
    for arm, evaluated in results.arms.items():
        if evaluated and evaluated[-1].shuffled:
            one = evaluated[-1]
            found[arm] = {
                "f1": round(float(np.mean([one.f1[question] for question in one.shuffled])), 2),
                "shuffled_f1": round(float(np.mean(list(one.shuffled.values()))), 2),
            }
    return found


def _controls(results: Results) -> str:
    found = _shuffled(results)
    lines = [
        f"  {arm:<14}F1 {one['f1']:.1f}, from a shuffled bank {one['shuffled_f1']:.1f}" for arm, one in found.items()
    ]
    return "\n".join(["all questions, last quarter", *lines]) if found else ""


def _gates(results: Results) -> str:
    lines = [
        f"  {results.quarters[quarter]:<9}{arm:<10}half {half}: {told['reason']}: {told['sentence']}"
        for arm in _ordered(results)
        for quarter, one in enumerate(results.arms[arm])
        for half, told in one.gates.items()
    ]
    return "\n".join(["gate decisions (90% intervals by document)", *lines]) if lines else ""


def _goals(results: Results) -> str:
    lines = ["goals"]
    for one in goals(results):
        met = {True: "met", False: "NOT met", None: "not measured"}[one.met]
        found = "" if one.found is None else f": {_interval(asdict(one.found))}"
        lines.append(f"  {met:<13}{one.says}{found}{f' ({one.detail})' if one.detail else ''}")
    return "\n".join(lines)


def _interval(one: dict[str, float] | Interval | None) -> str:
    return "" if one is None else f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"  # type: ignore[index]


def _n(value: int) -> str:
    return f"{value:6d}"


def _f(value: float | None) -> str:
    return "     –" if value is None else f"{value:6.1f}"
