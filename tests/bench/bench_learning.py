"""Does a codebook that learns from the stream serve it better than the one it started with? Both, in one run.

    python -m tests.bench.bench_learning --cache DIR
    python -m tests.bench.bench_learning --cache DIR --dated news_dated.jsonl.gz --one-in 3 --json

Two streams: the demo's Wikipedia corpus, topic after topic, and (with ``--dated``) a JSON Lines file by date. Each is
embedded once into DIR and then coded in windows of at least 1,000 passages, with the chain of codebook versions
(versions are used two windows after the one that made them) and with frozen version 0. After every window, each cloze
question about what is stored so far is looked up among everything stored so far.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbc_core import defaults
from mbc_core.assets import Assets
from mbc_core.codebook.update import UpdateRule
from mbc_core.evaluation.learning import KS, Stream, compare, cut_windows
from tests.bench.stream_cache import cached, dated, wikipedia

WINDOW_PASSAGES = 1_000
FROZEN, LEARNING, NARROW = "frozen", "learning", "narrow"
TRAP = UpdateRule(tau=10_000.0, anchor=10_000.0, growth=0.0, judged=False)
"""The deliberate mistake: each version fits the last window or so, unanchored, and nobody asks about recall."""

_FIELDS = ("version", "used", "perplexity", "error", "resets", "published", "step")


def streams(options: argparse.Namespace) -> dict[str, Stream]:
    """Name → stream, from the cache or encoded now."""
    found = {"wikipedia": cached(options.cache, "wikipedia", lambda: wikipedia(Assets.ensure().wiki), defaults.encoder)}
    if options.dated is not None:
        name = f"dated-one-in-{options.one_in}"
        found[name] = cached(options.cache, name, lambda: dated(options.dated, options.one_in), defaults.encoder)
    return found


def measure(stream: Stream, slots: int, rules: dict[str, UpdateRule | None], least: int) -> dict[str, Any]:
    """All windows of one stream at one T, and what they come to beside frozen version 0."""
    windows = cut_windows(stream.keys, least)
    rows, last = [], None
    for step in compare(stream, defaults.codebook(slots), defaults.rotation(), slots, windows, [*rules.values(), None]):
        row: dict[str, Any] = {"window": step.window, "passages": step.end - step.start, "questions": len(step.asked)}
        for name, side in zip([*rules, FROZEN], step.sides, strict=True):
            recall = {f"r@{k}": float(side.hits[:, place].mean()) for place, k in enumerate(KS)}
            row[name] = {one: getattr(side, one) for one in _FIELDS} | recall
        rows.append(row)
        last = step
    assert last is not None
    late = stream.rows[last.asked] >= windows[len(windows) // 2][0]
    frozen = last.sides[-1].hits
    summary = {}
    for name, side in zip(rules, last.sides, strict=False):
        summary[name] = {
            "all": _paired(side.hits, frozen),
            "second_half": _paired(side.hits[late], frozen[late]),
            "least_difference": {
                f"r@{k}": min(row[name][f"r@{k}"] - row[FROZEN][f"r@{k}"] for row in rows) for k in KS
            },
        }
    return {"windows": rows, "summary": summary}


def _paired(learning: np.ndarray, frozen: np.ndarray) -> dict[str, Any]:
    """R@k of both, their difference, and its standard error over the same questions."""
    found: dict[str, Any] = {"questions": len(learning)}
    for place, k in enumerate(KS):
        difference = learning[:, place].astype(float) - frozen[:, place]
        found[f"r@{k}"] = {
            "learning": float(learning[:, place].mean()),
            "frozen": float(frozen[:, place].mean()),
            "difference": float(difference.mean()),
            "standard_error": float(difference.std() / max(len(difference), 1) ** 0.5),
        }
    return found


def table(found: dict[str, Any], name: str) -> str:
    """For people: a line a window, `name / frozen` in each column."""
    lines = [f"{name} / frozen"]
    lines.append(
        "window passages questions version step        used %  perplexity/K         error           R@1           R@5"
        " resets"
    )
    for row in found["windows"]:
        both = [row[name], row[FROZEN]]
        used = " / ".join(f"{100 * one['used']:.1f}" for one in both)
        values = [" / ".join(f"{one[field]:.3f}" for one in both) for field in ("perplexity", "error", "r@1", "r@5")]
        lines.append(
            f"{row['window']:6d} {row['passages']:8d} {row['questions']:9d} {both[0]['version']:7d} "
            f"{both[0]['step']:4.2f} {used:>13s} "
            f"{values[0]:>13s} {values[1]:>13s} {values[2]:>13s} {values[3]:>13s} {both[0]['resets']:6d}"
        )
    summary = found["summary"][name]
    for part in ("all", "second_half"):
        told = ", ".join(
            f"R@{k} {one['learning']:.4f} / {one['frozen']:.4f} "
            f"({one['difference']:+.4f} ± {one['standard_error']:.4f})"
            for k, one in ((k, summary[part][f"r@{k}"]) for k in KS)
        )
        lines.append(f"{part.replace('_', ' ')}, {summary[part]['questions']} questions: {told}")
    lines.append(f"least difference after any window: {summary['least_difference']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_learning", description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder outside the repository for the embeddings")
    parser.add_argument("--dated", type=Path, help="JSON Lines (also .gz) with doc_id, timestamp and text")
    parser.add_argument("--one-in", type=int, default=1, help="take every n-th dated document")
    parser.add_argument("--slots", type=int, nargs="+", default=[24], choices=[12, 24])
    parser.add_argument("--window-passages", type=int, default=WINDOW_PASSAGES)
    parser.add_argument("--rule", type=json.loads, default={}, help='fields of UpdateRule as JSON: {"tau": 1e5}')
    parser.add_argument("--trap", action="store_true", help="also a codebook refitted to each window, to see it lose")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on standard output")
    options = parser.parse_args(argv)
    rules: dict[str, UpdateRule | None] = {LEARNING: UpdateRule(**options.rule)} | (
        {NARROW: TRAP} if options.trap else {}
    )
    results: dict[str, Any] = {"rule": options.rule}
    out = sys.stderr if options.as_json else sys.stdout
    for name, stream in streams(options).items():
        for slots in options.slots:
            began = time.monotonic()
            found = results[f"{name} T={slots}"] = measure(stream, slots, rules, options.window_passages)
            told = f"{name}, T = {slots}: {len(stream.embeddings)} passages, {len(stream.rows)} cloze questions"
            print(f"{told}, {time.monotonic() - began:.0f} s", file=out)
            for rule in rules:
                print(f"{table(found, rule)}\n", file=out, flush=True)
    if options.as_json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
