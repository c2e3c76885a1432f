"""Line plots as SVG text: panels side by side, one line a series. Enough for figures over time; no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from mbc_core.errors import UsageError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's: told apart by colour-blind readers too."""
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 52
_LEGEND = 18


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        title, y_label: for people.
        series: name → a value for each place on the x axis; None where there is none.
        dashed: names of series that are drawn dashed → the series whose colour they take.
    """

    title: str
    y_label: str
    series: Mapping[str, Sequence[float | None]]
    dashed: Mapping[str, str] = field(default_factory=dict)


def lines_svg(panels: Sequence[Panel], x_labels: Sequence[str]) -> str:
    """An SVG picture of the panels, with one legend below; equal arguments give equal text.

    Args:
        x_labels: one for each place; an empty one is not drawn.

    Raises:
        UsageError: no value at all, or a series that is not as long as the axis.
    """
    values = [value for panel in panels for one in panel.series.values() for value in one if value is not None]
    if not values or any(len(one) != len(x_labels) for panel in panels for one in panel.series.values()):
        raise UsageError(
            "there is nothing to plot",
            value=f"{len(values)} values, {len(x_labels)} places",
            cause="no series has a value, or one is not as long as the axis",
            fix="give a value or None for every place",
        )
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    strokes = _strokes(names, {name: other for panel in panels for name, other in panel.dashed.items()})
    rows = -(-len(names) // 4)
    width, height = _WIDTH * len(panels), _HEIGHT + _LEGEND * rows + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts += [f'<g transform="translate({_WIDTH * place},0)">', *_panel(panel, x_labels, strokes), "</g>"]
    for place, name in enumerate(names):
        x, y = 20 + (place % 4) * width / 4, _HEIGHT + 12 + _LEGEND * (place // 4)
        parts.append(f'<line x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x + 24:.1f}" y2="{y - 4:.1f}" {strokes[name]}/>')
        parts.append(f'<text x="{x + 30:.1f}" y="{y:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover ``low`` to ``high``, at most about ``2 · about`` of them.

    >>> ticks(41.3, 48.9)
    [40.0, 42.0, 44.0, 46.0, 48.0, 50.0]
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** _floor_log10(span / about)
    step = next(power * one for one in (1, 2, 5, 10) if span / (power * one) <= about)
    first, last = int(low // step), int(-(-high // step))
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def _floor_log10(value: float) -> int:
    from math import floor, log10

    return floor(log10(value))


def _panel(panel: Panel, x_labels: Sequence[str], strokes: Mapping[str, _Stroke]) -> list[str]:
    held = [value for one in panel.series.values() for value in one if value is not None]
    marks = ticks(min(held), max(held)) if held else [0.0, 1.0]
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at_x(place: int) -> float:
        return _LEFT + wide * (place + 0.5) / len(x_labels)

    def at_y(value: float) -> float:
        return _TOP + high * (1 - (value - marks[0]) / (marks[-1] - marks[0]))

    parts = [f'<text x="{_LEFT}" y="18" font-size="13" font-weight="bold">{escape(panel.title)}</text>']
    for mark in marks:
        y = at_y(mark)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for place, label in enumerate(x_labels):
        if not label:
            continue
        x, y = at_x(place), _HEIGHT - _BOTTOM + 14
        parts.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="end" transform="rotate(-35 {x:.1f} {y})">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="12" y="{_TOP + high / 2:.1f}" text-anchor="middle"'
        f' transform="rotate(-90 12 {_TOP + high / 2:.1f})">{escape(panel.y_label)}</text>'
    )
    for name, series in panel.series.items():
        points = [(at_x(place), at_y(value)) for place, value in enumerate(series) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" {strokes[name]}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{strokes[name].colour}"/>' for x, y in points]
    return parts


@dataclass(frozen=True, slots=True)
class _Stroke:
    """How a line is drawn; its text is what an SVG element says of it."""

    colour: str
    dash: str

    def __str__(self) -> str:
        dashed = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'stroke="{self.colour}" stroke-width="1.8"{dashed}'


def _strokes(names: Sequence[str], dashed: Mapping[str, str]) -> dict[str, _Stroke]:
    """Of each series: a colour of its own, or dashed in that of another; dashes of their own when colours run out."""
    strokes: dict[str, _Stroke] = {}
    for number, name in enumerate(name for name in names if name not in dashed):
        dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
        strokes[name] = _Stroke(COLOURS[number % len(COLOURS)], dash)
    for name, other in dashed.items():
        if other not in strokes:
            raise UsageError(
                "a dashed line takes its colour from a series that is not there",
                value=f"{name!r} from {other!r}",
                cause="the other one is not among the series, or is dashed itself",
                fix="name a solid series",
            )
        strokes[name] = _Stroke(strokes[other].colour, _DASHES[1])
    return strokes
