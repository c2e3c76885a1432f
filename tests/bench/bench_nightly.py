"""Proof of nightly adaptation on dated news, in two steps: banks without a language model, then a language model alone.

    python -m tests.bench.bench_nightly prepare --qa QUESTIONS.jsonl.gz --out FILE
    python -m tests.bench.bench_nightly tune FILE --lm FOLDER --out TUNED
    python -m tests.bench.bench_nightly run FILE --lm FOLDER --text FOLDER --none FOLDER --choices TUNED --out DIR
    python -m tests.bench.bench_nightly report DIR

Every command but the last can be killed and run again. Several may run at once on one accelerator, each with other
``--arms`` or ``--halves``. The adapters made here have learnt from test data: they never ship.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mbc_core.errors import MbcError
from mbc_core.evaluation.dated_stream import load_stream, save_stream
from mbc_core.evaluation.qa_file import load_qa
from mbc_core.training.nightly import ARMS, Choices

ONLY = {"source": frozenset({"realtimeqa", "realtimeqa_news"}), "split": frozenset({"dev", "test"})}
MAIN_ARMS = "frozen,nightly,no-replay,gated,closed,text"
READER = Path(__file__).resolve().parents[2] / "mbc_core" / "weights" / "reader"
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Proof of nightly adaptation on dated news."""


@main.command()
@click.option("--qa", type=_FILE, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--documents", type=int, default=None, help="Only the first so many.")
@click.option("--least", type=int, default=None, help="A quarter of fewer documents joins the one before.")
def prepare(qa: Path, out: Path, documents: int | None, least: int | None) -> None:
    """Grow the bank quarter by quarter and note what it recalls after each."""
    from tests.bench.nightly_prepare import LEAST_DOCUMENTS
    from tests.bench.nightly_prepare import prepare as make

    stream = make(load_qa(qa, ONLY).first_documents(documents), least=least or LEAST_DOCUMENTS, say=_say)
    save_stream(out, stream)
    click.echo(f"{out}: {out.stat().st_size:,} bytes, {dict(stream.figures)}")


def _job_options(command: Any) -> Any:
    for option in (
        click.argument("file", type=_FILE),
        click.option("--lm", required=True, help="Folder of the base model, or its name."),
        click.option("--reader", type=_FOLDER, default=READER, help="Adapter that reads words (default: shipped)."),
        click.option("--out", type=click.Path(path_type=Path), required=True),
        click.option("--halves", default="0,1", show_default=True, help="Halves to adapt on; the other is scored."),
        click.option("--minutes", type=float, default=None, help="Begin no quarter that would end later."),
        click.option("--batch-tokens", type=int, default=16_384, show_default=True, help="Of a training pass."),
        click.option("--answer-tokens", type=int, default=None, help="Of a batch of answers; by device."),
        click.option("--steps", type=int, default=None, help="Instead of the choices' own; for a rehearsal."),
        click.option("--device", default="cuda", show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
    ):
        command = option(command)
    return command


@main.command()
@_job_options
@click.option("--tries", type=int, default=None, help="Only the first so many choices of the grid.")
def tune(tries: int | None, halves: str, minutes: float | None, **given: Any) -> None:
    """Try choices on the quarters of 2024 with the nightly arm."""
    from tests.bench.nightly_run import Deadline
    from tests.bench.nightly_tune import GRID
    from tests.bench.nightly_tune import tune as work

    job = _job(Choices(), {}, **given)
    grid = tuple(replace(one, steps=given["steps"] or one.steps) for one in GRID[:tries])
    _until(lambda deadline: work(job, _halves(halves), deadline, _say, grid), Deadline(minutes))
    _print_tuned(given["out"])


@main.command()
@_job_options
@click.option("--text", type=_FOLDER, default=None, help="Adapter trained equally on full text.")
@click.option("--none", type=_FOLDER, default=None, help="Adapter trained equally without memory.")
@click.option("--arms", default=MAIN_ARMS, show_default=True, help=f"Of {', '.join(ARMS)}.")
@click.option("--choices", type=_FOLDER, default=None, help="The --out of `tune`; defaults without it.")
def run(
    text: Path | None, none: Path | None, arms: str, choices: Path | None, halves: str, minutes: float | None,
    **given: Any,
) -> None:  # fmt: skip
    """Adapt and score arms, quarter by quarter."""
    from tests.bench.nightly_run import Deadline, run_arm, write_stream_facts
    from tests.bench.nightly_tune import choose

    names = [name.strip() for name in arms.split(",")]
    starts = {"words": given["reader"], "text": text, "none": none}
    unknown = [name for name in names if name not in ARMS]
    missing = [name for name in names if name in ARMS and starts[ARMS[name].memory] is None]
    if unknown or missing:
        raise click.UsageError(f"no such arm: {unknown}" if unknown else f"--text or --none is needed for {missing}")
    job = _job(choose(choices) if choices else Choices(), starts, **given)
    write_stream_facts(job)

    def work(deadline: Deadline) -> None:
        for half in _halves(halves):
            for name in names:
                run_arm(job, name, half, deadline, _say)

    _until(work, Deadline(minutes))


@main.command()
@click.argument("folder", type=_FOLDER)
def report(folder: Path) -> None:
    """Print table, decisions and goals; write report.json and report.svg beside the results."""
    from tests.bench.nightly_report import report as told

    click.echo(told(folder))


def _job(
    choices: Choices,
    starts: dict[str, Path],
    *,
    file: Path,
    lm: str,
    reader: Path,
    out: Path,
    batch_tokens: int,
    answer_tokens: int | None,
    device: str,
    seed: int,
    steps: int | None,
) -> Any:
    from mbc_core.reader.language_model import load_language_model
    from tests.bench.nightly_run import Job

    base = load_language_model(lm, device=device)
    return Job(
        load_stream(file), base, starts or {"words": reader}, out, replace(choices, steps=steps or choices.steps),
        seed=seed, batch_tokens=batch_tokens, answer_tokens=answer_tokens,
    )  # fmt: skip


def _until(work: Any, deadline: Any) -> None:
    from tests.bench.nightly_run import Stopped

    try:
        work(deadline)
    except Stopped:
        _say("the time is up: run the same command again to go on")


def _print_tuned(folder: Path) -> None:
    from tests.bench.nightly_tune import tuned

    for row in tuned(folder):
        click.echo(
            f"score {row['score']:.2f}  new F1 {row['new_f1']:.2f}  old F1 {row['old_f1']:.2f}  "
            f"({row['questions']} questions, {row['halves']} halves)  {row['choices']}"
        )


def _halves(told: str) -> tuple[int, ...]:
    found = tuple(int(one) for one in told.split(","))
    if not set(found) <= {0, 1}:
        raise click.UsageError("--halves is 0, 1 or 0,1")
    return found


def _say(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


if __name__ == "__main__":
    try:
        main()
    except MbcError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
