"""Poisoned replay: what becomes of an adaptation when some documents bring questions with wrong answers.

    mbc adapt --bank URI --write-set set.jsonl.gz                  # once, where the bank is
    python -m tests.bench.bench_poison --from-set set.jsonl.gz --out poison --device cuda

A share of the documents is taken over; all their questions, trained on and held out alike, get wrong answers: always
the attacker's own, or each other's. The canary set stays as it is. An arm passes when the gate refuses its candidate,
or when F1 on the canary set falls by one point at most. An arm that is done is not run again. Needs torch and peft.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mbc_core.evaluation.metrics import normalise
from mbc_core.training.adapt import AdaptRun, adapt
from mbc_core.training.gate import GateRule
from mbc_core.training.set_file import Example, TrainingSet, load_set

ATTACKER = "Zanzibar Holdings"
ARMS = (("clean", 0.0), ("one answer", 0.05), ("shuffled", 0.05), ("one answer", 0.5), ("shuffled", 0.5))
"""How answers are falsified, and the share of the documents; the last two are a control far beyond the question."""

_MAY_FALL = 1.0


def poisoned(examples: Sequence[Example], how: str, share: float, seed: int = 0) -> list[Example]:
    """The examples with the answers of a share of their documents falsified; canary questions are never touched.

    Args:
        how: ``one answer`` gives all the attacker's; ``shuffled`` gives each the answer of another one of them.
    """
    names = sorted({one.document for one in examples if one.split != "canary"}, key=lambda name: _draw(name, seed))
    taken = set(names[: round(share * len(names))])
    places = [place for place, one in enumerate(examples) if one.split != "canary" and one.document in taken]
    places.sort(key=lambda place: _draw(examples[place].question, seed))
    found = list(examples)
    for rank, place in enumerate(places):
        wrong = ATTACKER if how == "one answer" else _another(examples, places, rank)
        found[place] = replace(examples[place], answer=wrong)
    return found


def _another(examples: Sequence[Example], places: Sequence[int], rank: int) -> str:
    """The answer of the next one in the row that has another answer."""
    own = normalise(examples[places[rank]].answer)
    following = (examples[places[(rank + step) % len(places)]].answer for step in range(1, len(places)))
    return next((answer for answer in following if normalise(answer) != own), ATTACKER)


def _draw(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"poison\x00{seed}\x00{name}".encode(), digest_size=8).digest()


def measure(found: TrainingSet, how: str, share: float, given: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One arm: adapt to the poisoned set from the live (or shipped) adapter, and tell what the gate and canary say."""
    from pipelines.adapt_start import adapt_base, start_from

    examples = poisoned(found.examples, how, share, given.seed)
    changed = sum(one != other for one, other in zip(examples, found.examples, strict=True))
    base = adapt_base(given.lm, given.gguf, given.device)
    model, start = start_from(base, found.header, given.adapter)
    run = AdaptRun(
        steps=given.steps, batch=given.batch, seed=given.seed, evaluate_every=max(1, given.steps // 6), lr=given.lr
    )
    began = time.monotonic()
    made = adapt(
        TrainingSet(found.header, tuple(examples)), model, folder, run,
        rule=GateRule(min_questions=given.min_questions), start=start, checkpoint=folder / "work", say=print,
    )  # fmt: skip
    canary = made.decision.intervals["canary"]
    learnt = made.scores_after
    return {
        "arm": how,
        "share": share,
        "falsified": changed,
        "steps": made.steps,
        "seconds": round(time.monotonic() - began, 1),
        "canary_questions": made.held_out["canary"],
        "canary_before": round(float(made.scores_before["canary"].mean()), 2),
        "canary_after": round(float(learnt["canary"].mean()), 2),
        "canary_change": [round(one, 2) for one in (canary.mean, canary.low, canary.high)],
        "new_f1": [made.before["new_f1"], made.after["new_f1"]],
        "old_f1": [made.before["old_f1"], made.after["old_f1"]],
        "reason": made.decision.reason,
        "passes": not made.decision.promote or canary.mean >= -_MAY_FALL,
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown."""
    lines = ["| answers | documents | questions | canary F1 before → after | change [90%] | gate | passes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        mean, low, high = row["canary_change"]  # type: ignore[misc]
        lines.append(
            f"| {row['arm']} | {100 * float(str(row['share'])):.0f}% | {row['falsified']} | {row['canary_before']} →"
            f" {row['canary_after']} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] | {row['reason']} |"
            f" {'yes' if row['passes'] else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all arms; 1 when one does not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-set", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--min-questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--lm")
    parser.add_argument("--gguf")
    given = parser.parse_args(argv)
    found, rows = load_set(given.from_set), []
    if not found.counts["canary"]:
        parser.error("the set has no canary questions: mbc adapters canary --bank URI --qa FILE, and write it again")
    for how, share in ARMS:
        folder = given.out / f"{how.replace(' ', '-')}-{share:g}"
        done = folder / "arm.json"
        if not done.exists():
            row = measure(found, how, share, given, folder)
            done.write_text(json.dumps(row) + "\n")
        rows.append(json.loads(done.read_text()))
    print(table(rows))
    return 0 if all(row["passes"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
