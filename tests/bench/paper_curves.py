"""Held-out loss of runs of `mbc train paper`, from their ``curve.jsonl`` and ``card.json``: lines, a table, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbc_core.errors import UsageError
from mbc_core.evaluation.line_plot import Panel, lines_svg
from mbc_core.evaluation.method_report import table
from mbc_core.training.paper_run import PaperRun, flat_from

_BANKS = (("banks of one passage", "_of_one"), ("banks of 16 passages", ""))
"""What a panel shows, and how a look names it. A closed book has no bank, so it stands in both as the same line."""
_OTHER = ", other codes"


@dataclass(frozen=True, slots=True)
class Curve:
    """One run.

    Attributes:
        name: for people.
        looks: what ``curve.jsonl`` holds, by step. Nats a token of the answer; the right bank and another one.
        card: what ``card.json`` says; empty for a run that was cut off before it wrote one.
    """

    name: str
    looks: Sequence[Mapping[str, Any]]
    card: Mapping[str, Any]


def load_curve(name: str, folder: Path) -> Curve:
    """Read a run.

    Raises:
        UsageError: it has no look at the held-out loss.
    """
    lines, card = folder / "curve.jsonl", folder / "card.json"
    looks = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.is_file() else []
    if not looks:
        raise UsageError("there is no curve", value=str(folder), cause="curve.jsonl is empty or not there",
                         fix="name a folder of `mbc train paper`")  # fmt: skip
    return Curve(name, looks, json.loads(card.read_text("utf-8")) if card.is_file() else {})


def curve_lines(curve: Curve) -> list[str]:
    """One line a look: banks of 16 and of one, each with the right codes and another passage's; codes."""
    lines = []
    for look in curve.looks:
        said = f"{curve.name}  step {look['step']:5d}  16: {_pair(look, '')}"
        if "held_out_loss_of_one" in look:
            said += f"  1: {_pair(look, '_of_one')}"
        if "held_out_used" in look:
            own = f"{100 * look['held_out_different']:.1f}%"
            said += f"  codes used {look['held_out_used']}, passages with codes of their own {own}"
        lines.append(said)
    return lines


def look_table(curves: Sequence[Curve], step: int) -> str:
    """Every run that has a look at ``step``, as a Markdown table; F1 is of finished runs that end there."""
    rows = []
    for curve in curves:
        look = next((one for one in curve.looks if one["step"] == step), None)
        if look is None:
            continue
        ends = curve.card.get("finished") and curve.card["steps"] == step
        answers = [_f1(curve, name) if ends else "–" for name in ("squad", "archivalqa")]
        rows.append([
            curve.name, *(_number(look, key, "{:.4f}") for key in (*_keys(""), *_keys("_of_one"))),
            look.get("held_out_used", "–"), _number(look, "held_out_perplexity", "{:.1f}"),
            _number(look, "held_out_different", "{:.1%}"), *answers,
        ])  # fmt: skip
    heads = ["run", "16: right", "16: other", "1: right", "1: other", "codes used", "perplexity", "own codes",
             "F1 squad", "F1 archivalqa"]  # fmt: skip
    return table(heads, rows)


def run_table(curves: Sequence[Curve], books: Mapping[str, str]) -> str:
    """Every run with its length and the look whose weights it kept, as a Markdown table.

    Args:
        books: the closed book of a run, by their names; the last two columns are the run's loss less the book's, each
            at its own kept look.
    """
    by_name = {curve.name: curve for curve in curves}
    rows = []
    for curve in curves:
        look, card = _kept(curve), curve.card
        book = _kept(by_name[books[curve.name]])["held_out_loss"] if curve.name in books else None
        less = [
            "–" if book is None or key not in look else f"{look[key] - book:+.4f}"
            for key in ("held_out_loss", "held_out_loss_of_one")
        ]
        rows.append([
            curve.name, f"{curve.looks[-1]['step']:,}", _told(card, "cool_from"), f"{look['step']:,}", _flat(curve),
            *(_number(look, key, "{:.4f}") for key in (*_keys(""), *_keys("_of_one"))), *less,
        ])  # fmt: skip
    heads = ["run", "steps", "rates fall from", "kept", "flat at", "16: right", "16: other", "1: right", "1: other",
             "16 − closed", "1 − closed"]  # fmt: skip
    return table(heads, rows)


def curve_plot(curves: Sequence[Curve], first: int = 0) -> str:
    """An SVG picture of the held-out loss against the step: solid with the right bank, dashed with another one.

    Args:
        first: leave out looks before this step (the loss falls so fast there that nothing else could be seen).

    Raises:
        UsageError: no run has a look from ``first`` on.
    """
    last = max(look["step"] for curve in curves for look in curve.looks)
    labels = [f"{step:,}" if step % 500 == 0 else "" for step in range(first, last + 1)]
    panels = []
    for says, which in _BANKS:
        series: dict[str, list[float | None]] = {}
        dashed: dict[str, str] = {}
        for curve in curves:
            closed = not any("held_out_shuffled" in look for look in curve.looks)
            key = "held_out_loss" if closed else f"held_out_loss{which}"
            series[curve.name] = _placed(curve, key, first, len(labels))
            if not closed:
                dashed[curve.name + _OTHER] = curve.name
                series[curve.name + _OTHER] = _placed(curve, f"held_out_shuffled{which}", first, len(labels))
        panels.append(Panel(f"Held-out loss by step: {says}", "nats a token of the answer", series, dashed))
    return lines_svg(panels, labels)


def _kept(curve: Curve) -> Mapping[str, Any]:
    """The look whose weights a run kept; its last one when it was cut off before it said."""
    step = curve.card.get("kept_step", curve.looks[-1]["step"])
    return next((look for look in curve.looks if look["step"] == step), curve.looks[-1])


def _flat(curve: Curve) -> str:
    """Where the looks at the full rates were first flat by the rule of `mbc train paper --flat`."""
    if "run" not in curve.card:
        return "–"
    run = PaperRun(**{**curve.card["run"], "banks": tuple(curve.card["run"]["banks"])})
    falls = curve.card.get("cool_from")
    looks = [(one["step"], one["held_out_loss"]) for one in curve.looks if falls is None or one["step"] <= falls]
    step = flat_from(looks, run)
    return "no" if step is None else f"{step:,}"


def _told(card: Mapping[str, Any], name: str) -> str:
    return f"{card[name]:,}" if card.get(name) is not None else "–"


def _placed(curve: Curve, key: str, first: int, places: int) -> list[float | None]:
    values: list[float | None] = [None] * places
    for look in curve.looks:
        if look["step"] >= first and key in look:
            values[look["step"] - first] = look[key]
    return values


def _keys(which: str) -> tuple[str, str]:
    return f"held_out_loss{which}", f"held_out_shuffled{which}"


def _pair(look: Mapping[str, Any], which: str) -> str:
    return " ".join(f"{look[key]:.4f}" for key in _keys(which) if key in look)


def _number(look: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(look[key]) if key in look else "–"


def _f1(curve: Curve, name: str) -> str:
    """F1 of a set's answers from its whole bank / a shuffled one, as the run measured them itself."""
    found = {one["read"]: f"{one['f1']:.1f}" for one in curve.card.get("results", {}).get(name, ())}
    return " / ".join(found[read] for read in ("aggregate", "shuffled", "closed") if read in found) or "–"
