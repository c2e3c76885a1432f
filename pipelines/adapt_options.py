"""What the adaptation job is asked to do: one set of options for ``mbc adapt`` and ``python -m pipelines.adapt``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.errors import UsageError

if TYPE_CHECKING:
    from mbc_core.training.adapt import AdaptRun
    from mbc_core.training.gate import GateRule

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AdaptSettings:
    """The options; None leaves a default to the run or to the rule.

    Attributes:
        bank: where the bank is; the whole job runs, or with ``write_set`` its first step.
        write_set: the first step's file. as_of: the instant whose bank is asked.
        from_set, out: the second step's set, and the folder for the candidate.
        adapter: folder of the adapter to start from; the live one when None.
        checkpoint: folder that a killed run goes on from.
        steps, minutes, batch, patience, evaluate_every: of :class:`mbc_core.training.adapt.AdaptRun`; a patience of 0
            never stops early.
        questions, held_out, new_share: of the set, see :func:`mbc_core.training.replay_set.build_training_set`.
        min_questions: of the gate.
        lm, gguf: another language model: folder or name, and a GGUF file's name inside it.
    """

    bank: str | None = None
    write_set: Path | None = None
    as_of: datetime | None = None
    from_set: Path | None = None
    out: Path | None = None
    adapter: Path | None = None
    checkpoint: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None
    patience: int | None = None
    evaluate_every: int | None = None
    questions: int | None = None
    held_out: int | None = None
    new_share: float | None = None
    min_questions: int | None = None
    lm: str | None = None
    gguf: str | None = None
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Whether these options belong together.

        Raises:
            UsageError: they do not; the message says which.
        """
        if (self.bank is None) == (self.from_set is None):
            raise _wrong("give either --bank or --from-set", "the set holds all that the second step needs of a bank")
        if (self.from_set is None) != (self.out is None):
            raise _wrong("--from-set and --out go together", "the second step leaves its candidate in a folder")
        first: dict[str, object] = {"--write-set": self.write_set, "--as-of": self.as_of, "--questions": self.questions}
        first |= {"--held-out": self.held_out, "--new-share": self.new_share}
        given = [name for name, value in first.items() if value is not None]
        if self.from_set is not None and given:
            raise _wrong(f"{', '.join(given)} cannot be given with --from-set", "the set has been written already")
        second: dict[str, object] = {"--checkpoint": self.checkpoint, "--adapter": self.adapter, "--steps": self.steps}
        second |= {"--minutes": self.minutes, "--min-questions": self.min_questions}
        given = [name for name, value in second.items() if value is not None]
        if self.write_set is not None and given:
            raise _wrong(f"{', '.join(given)} cannot be given with --write-set", "nothing is trained in the first step")

    def run(self) -> AdaptRun:
        """How long and how fast: ``steps``, ``minutes``, whichever comes first, or the default."""
        from dataclasses import replace

        from mbc_core.training.adapt import AdaptRun

        found = AdaptRun(seed=self.seed)
        if self.steps is not None or self.minutes is not None:
            found = replace(found, steps=self.steps, minutes=self.minutes)
        if self.patience is not None:
            found = replace(found, patience=self.patience or None)
        told = {"batch": self.batch, "evaluate_every": self.evaluate_every}
        return replace(found, **{name: value for name, value in told.items() if value is not None})

    def rule(self) -> GateRule:
        """Of the gate."""
        from mbc_core.training.gate import GateRule

        return GateRule() if self.min_questions is None else GateRule(min_questions=self.min_questions)

    def of_set(self) -> dict[str, float]:
        """Arguments of :func:`mbc_core.training.replay_set.build_training_set`."""
        told = {"train": self.questions, "held_out": self.held_out, "new_share": self.new_share}
        return {name: value for name, value in told.items() if value is not None}


def parse(argv: Sequence[str] | None) -> tuple[AdaptSettings, bool]:
    """Options of ``python -m pipelines.adapt`` → settings, and whether to print JSON. Wrong ones end the program."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.adapt",
        description="Refresh the adapter of a bank's reader. It trains in this process; Beam's options are accepted "
        "(--name=value) so that one scheduler entry serves both jobs, and change nothing.",
    )
    parser.add_argument(
        "--bank", help="local path, s3://… or gs://…: the whole job, or with --write-set its first step"
    )
    parser.add_argument("--write-set", type=Path, metavar="FILE", help="first step: only write what the bank recalls")
    parser.add_argument("--as-of", type=_moment, metavar="TIME", help="the bank as it stood then (default: now)")
    parser.add_argument("--from-set", type=Path, metavar="FILE", help="second step, without a bank: train on that file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="second step: where the candidate goes")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter to start from (default: the live one)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="go on from there after a kill")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--minutes", type=float, help="training time; with --steps, whichever comes first")
    parser.add_argument("--batch", type=int, help="questions a step")
    parser.add_argument("--patience", type=int, help="looks without a lower loss before stopping; 0 never stops early")
    parser.add_argument("--evaluate-every", type=int, help="steps between two looks")
    parser.add_argument("--questions", type=int, help="most questions to train on")
    parser.add_argument("--held-out", type=int, help="most held-out questions, half of them about new documents")
    parser.add_argument("--new-share", type=float, help="share of the training questions from new documents")
    parser.add_argument(
        "--min-questions", type=int, help="fewest held-out questions the gate takes; for demonstrations"
    )
    parser.add_argument("--lm", help="another language model: a folder or a Hugging Face name")
    parser.add_argument("--gguf", help="name of the GGUF file inside the folder of --lm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on standard output")
    given = vars(parser.parse_known_args(argv)[0])
    as_json = bool(given.pop("as_json"))
    return AdaptSettings(**given), as_json


def _moment(text: str) -> datetime:
    """ISO 8601 → UTC; a time without a zone is one."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it like 2024-07-01T09:30:00Z") from error
    aware = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return _EPOCH + (aware.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1) * timedelta(microseconds=1)


def _wrong(thing: str, cause: str) -> UsageError:
    return UsageError(thing, cause=cause, fix="see `mbc adapt --help`")
