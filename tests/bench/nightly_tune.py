"""Choices of the nightly proof, tuned on the first year's quarters alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbc_core.errors import UsageError
from mbc_core.training.nightly import Choices
from tests.bench.nightly_run import Deadline, Job, Say, choices_digest, run_arm, write_stream_facts

YEAR = "2024"
GRID = (
    Choices(),
    Choices(lr=1e-4),
    Choices(steps=80),
    Choices(as_read=1.0),
    Choices(cloze_share=0.0),
    Choices(steps=80, lr=7e-4),
    Choices(steps=20),
    Choices(old_share=0.25),
)
"""Around the first one, one or two things changed at a time; the likeliest first, in case the time runs out."""


def tuning_quarters(names: tuple[str, ...]) -> int:
    """How many quarters, from the first, are of the tuning year.

    Raises:
        UsageError: none is; then nothing may be tuned on this stream.
    """
    count = sum(name.startswith(YEAR) for name in names)
    if not count or not all(name.startswith(YEAR) for name in names[:count]):
        raise UsageError("nothing may be tuned", value=list(names), cause=f"choices are tuned on {YEAR} alone")
    return count


def tune(job: Job, halves: tuple[int, ...], deadline: Deadline, say: Say, grid: tuple[Choices, ...] = GRID) -> None:
    """Run the nightly arm with each of the choices; every finished quarter is kept, so it goes on after a kill."""
    quarters = tuning_quarters(job.stream.quarters)
    for choices in grid:
        one = replace(
            job, choices=choices, quarters=quarters, gate=False, out=job.out / f"tune-{choices_digest(choices)}"
        )
        write_stream_facts(one)
        for half in halves:
            run_arm(one, "nightly", half, deadline, say)


def tuned(folder: Path) -> list[dict[str, Any]]:
    """Every choice whose quarters are done on as many halves as any, best first.

    Scored by the mean of two figures over the scored half's questions: F1 on each quarter's own questions, and F1 on
    the older ones after the last tuning quarter. Equal scores: fewer steps first.

    Raises:
        UsageError: nothing is done.
    """
    rows = []
    for place in sorted(folder.glob("tune-*")):
        facts = json.loads((place / "stream.json").read_text("utf-8"))
        last = tuning_quarters(tuple(facts["quarters"])) - 1
        halves = [one for one in sorted(place.glob("nightly-[01]")) if (one / f"q{last:02d}.json").exists()]
        if halves:
            rows.append(_scored(halves, facts["quarter"], last))
    if not rows:
        raise UsageError("no choice was tried", value=str(folder), fix="run `tune` first")
    most = max(row["halves"] for row in rows)
    whole = [row for row in rows if row["halves"] == most]
    return sorted(whole, key=lambda row: (-row["score"], row["choices"]["steps"]))


def _scored(halves: list[Path], quarter_of: list[int], last: int) -> dict[str, Any]:
    new: list[float] = []
    old: list[float] = []
    told: dict[str, Any] = {}
    for half in halves:
        for quarter in range(last + 1):
            told = json.loads((half / f"q{quarter:02d}.json").read_text("utf-8"))
            scores = told["scores"]
            for question, value in zip(scores["questions"], scores["f1"], strict=True):
                if quarter_of[question] == quarter:
                    new.append(value)
                elif quarter == last:
                    old.append(value)
    figures = {"new_f1": float(np.mean(new)), "old_f1": float(np.mean(old)) if old else float(np.mean(new))}
    return {
        "choices": told["choices"], "halves": len(halves), "questions": len(new), **figures,
        "score": round((figures["new_f1"] + figures["old_f1"]) / 2, 3),
    }  # fmt: skip


def choose(folder: Path) -> Choices:
    """The best of :func:`tuned`."""
    return Choices(**tuned(folder)[0]["choices"])
