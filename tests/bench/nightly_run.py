"""Second step of the nightly proof: arms adapt quarter by quarter and are scored after each. torch and peft alone.

A folder holds one arm on one half: ``q03.json`` when quarter 3 is done, and the last quarter's adapter. Everything is
written beside its place and moved there, so a killed run goes on from the last quarter that was adapted; the same
seeds make it the same run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbc_core.errors import UsageError
from mbc_core.evaluation.answers import adapted
from mbc_core.evaluation.dated_stream import DatedStream
from mbc_core.evaluation.metrics import exact_match, f1
from mbc_core.evaluation.shuffled import shuffled_rows
from mbc_core.reader.generate import NEW_TOKENS, answer_prompts
from mbc_core.reader.kv_lora import adapter_config, adapter_state, save_adapter, set_adapter_state
from mbc_core.reader.language_model import LanguageModel
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.adapt_prompts import learned_end
from mbc_core.training.gate import decide
from mbc_core.training.nightly import ARMS, Arm, Choices, K, Spelling, adapt_quarter
from mbc_core.training.set_file import Example

MAX_PROMPT = 4096
OLD_GATE = 600
"""Most old questions of a gate: twice what it needs."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a run is made of; results of another one are refused.

    Attributes:
        starts: memory → folder of the adapter that its arms start from.
        quarters: how many quarters are run, from the first.
        batch_tokens: of a training pass; None for answers takes what suits the device.
    """

    stream: DatedStream
    base: LanguageModel
    starts: dict[str, Path]
    out: Path
    choices: Choices = field(default_factory=Choices)
    quarters: int = 10_000
    seed: int = 0
    batch_tokens: int = 16_384
    answer_tokens: int | None = None
    gate: bool = True

    @property
    def made_of(self) -> dict[str, Any]:
        """What must be the same for results to be taken up."""
        return {
            "stream": self.stream.figures.get("qa"), "questions": len(self.stream.questions),
            "base": self.base.digest, "choices": self.choices.to_json(), "seed": self.seed,
        }  # fmt: skip


class Stopped(Exception):
    """The time is up; everything done is kept."""


class Deadline:
    """Stops before a quarter that would not be done in time, judged by the longest so far."""

    def __init__(self, minutes: float | None) -> None:
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest = 0.0

    def check(self) -> None:
        if self._ends is not None and time.monotonic() + self._longest > self._ends:
            raise Stopped

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)


def run_arm(job: Job, name: str, half: int, deadline: Deadline, say: Say) -> None:
    """Adapt on ``half``'s questions and score the other half's, for every quarter that is not there yet.

    Raises:
        Stopped: the deadline.
        UsageError: the folder holds results made of something else.
    """
    folder = job.out / f"{name}-{half}"
    folder.mkdir(parents=True, exist_ok=True)
    last = min(job.quarters, len(job.stream.quarters))
    todo = [quarter for quarter in range(last) if not _done(folder, quarter, job)]
    if not todo:
        say(f"{folder.name}: all {last} quarters are there")
        return
    begin = _begin(folder, todo[0], job) if ARMS[name].learns else None
    with adapted(job.base, begin or job.starts[ARMS[name].memory]) as model:
        state = _State(job, ARMS[name], half, folder, model, lambda line: say(f"{folder.name} {line}"))
        for quarter in todo:
            deadline.check()
            began = time.monotonic()
            state.quarter(quarter)
            deadline.took(time.monotonic() - began)


class _State:
    """An arm on one half, with its adapter in the model."""

    def __init__(self, job: Job, arm: Arm, half: int, folder: Path, model: LanguageModel, say: Say) -> None:
        self.job, self.arm, self.half, self.folder, self.model, self.say = job, arm, half, folder, model, say
        form = PromptFormat(model.tokenizer)
        form.end = learned_end(model, form, _shown_examples(job.stream, arm))
        room = min(MAX_PROMPT, model.context - NEW_TOKENS)
        self.spelling = Spelling(job.stream, form, arm.memory, room)

    def quarter(self, quarter: int) -> None:
        """Adapt, unless this quarter's adapter is there from before a kill; score; write."""
        name = f"q{quarter:02d}"
        told: dict[str, Any] = {}
        if self.arm.learns:
            kept = self.folder / name / "told.json"
            told = json.loads(kept.read_text("utf-8")) if kept.exists() else self._adapt(quarter, self.folder / name)
        began = time.monotonic()
        asked = self.job.stream.select(range(quarter + 1), half=1 - self.half)
        result = self.job.made_of | told | {"quarter": quarter, "half": self.half, "arm": self.folder.name}
        result["scores"] = self.score(quarter, asked)
        end = len(self.job.stream.quarters) - 1
        if quarter < end < self.job.quarters and self.arm.learns and self.arm.memory == "words":
            result["final"] = self.score(end, asked)  # tells the adapter's forgetting from the bank's growth
        if quarter == end and self.arm.memory == "words":
            result["shuffled"] = self.score(quarter, asked, shuffled=True)
        result["score_seconds"] = round(time.monotonic() - began, 2)
        _write(self.folder / f"{name}.json", result)
        for old in self.folder.glob("q[0-9]*"):
            if old.is_dir() and old.name != name:
                shutil.rmtree(old)
        self.say(f"{self.job.stream.quarters[quarter]}: {_means(result['scores'], self.job.stream, quarter)}")

    def score(self, quarter: int, asked: Sequence[int], *, shuffled: bool = False) -> dict[str, Any]:
        """Answers from the bank as it was after ``quarter``: questions, predictions, EM and F1 in points."""
        stream = self.job.stream
        rows = [list(stream.rows(quarter, question)[:K]) for question in asked]
        if shuffled:
            held, owners = stream.held(quarter)
            place = {row: number for number, row in enumerate(held.tolist())}
            right = np.array([stream.questions[question].document for question in asked], dtype=np.int64)
            other = shuffled_rows([[place[row] for row in one] for one in rows], owners, right, self.job.seed)
            rows = [[int(held[number]) for number in one] for one in other]
        self.model.model.eval()
        prompts = [self.spelling.prompt(question, one) for question, one in zip(asked, rows, strict=True)]
        said = answer_prompts(self.model, self.spelling.form, prompts, batch_tokens=self.job.answer_tokens)
        pairs = [(one, stream.questions[question].answers) for one, question in zip(said, asked, strict=True)]
        return {
            "questions": list(asked), "predictions": said,
            "em": [100 * exact_match(*one) for one in pairs], "f1": [round(100 * f1(*one), 2) for one in pairs],
        }  # fmt: skip

    def _adapt(self, quarter: int, target: Path) -> dict[str, Any]:
        """Train a candidate, ask the gate, and keep what is live now in ``target``."""
        job, gating = self.job, self.job.gate and self.arm.memory == "words" and self.arm.replay
        asked = gate_questions(job.stream, quarter, self.half, job.seed) if gating else {}
        before = {split: self.score(quarter, one)["f1"] for split, one in asked.items()}
        saved = {name: value.clone() for name, value in adapter_state(self.model.model).items()}
        began = time.monotonic()
        done = adapt_quarter(
            job.stream, self.spelling, self.model, quarter, self.half, self.arm, job.choices,
            seed=job.seed, batch_tokens=job.batch_tokens, say=self.say,
        )  # fmt: skip
        told: dict[str, Any] = self.job.made_of | {
            "adapt": asdict(done),
            "adapt_seconds": round(time.monotonic() - began, 2),
        }
        if gating:
            after = {split: self.score(quarter, one)["f1"] for split, one in asked.items()}
            told["gate"] = _decision(job.stream, asked, before, after)
            told["gate_seconds"] = round(time.monotonic() - began - told["adapt_seconds"], 2)
            self.say(f"{job.stream.quarters[quarter]} gate: {told['gate']['sentence']}")
            if self.arm.gated and not told["gate"]["promote"]:
                set_adapter_state(self.model.model, saved, "the adapter before")
        staging = self.folder / f".{target.name}.writing"
        shutil.rmtree(staging, ignore_errors=True)
        config = adapter_config(self.model.model)
        save_adapter(self.model.model, staging, config, base_digest=job.base.digest, base_name=job.base.name)
        _write(staging / "told.json", told)
        staging.replace(target)
        return told


def gate_questions(stream: DatedStream, quarter: int, half: int, seed: int) -> dict[str, list[int]]:
    """The gate's questions, none of which the arm is trained on or scored with.

    Of held-out documents of the adapted half the asked and the cloze ones; of the scored half cloze questions only.
    New ones are of this quarter; of older ones at most :data:`OLD_GATE`, drawn by the seed.
    """
    parts = {"new": [quarter], "old": list(range(quarter))}
    chosen = {}
    for split, quarters in parts.items():
        kinds = ("cloze", "gate") if split == "new" else ("cloze",)
        own = stream.select(quarters, ("asked", *kinds), half=half, held_out=True)
        chosen[split] = sorted([*own, *stream.select(quarters, kinds, half=1 - half)])
    if len(chosen["old"]) > OLD_GATE:
        drawn = np.random.default_rng([seed, quarter]).permutation(len(chosen["old"]))[:OLD_GATE]
        chosen["old"] = [chosen["old"][place] for place in sorted(drawn.tolist())]
    return chosen


def _decision(
    stream: DatedStream, asked: dict[str, list[int]], before: dict[str, list[float]], after: dict[str, list[float]]
) -> dict[str, Any]:
    documents = {split: [f"{stream.questions[one].document}" for one in chosen] for split, chosen in asked.items()}
    found = decide(
        {split: np.array(one) for split, one in before.items()},
        {split: np.array(one) for split, one in after.items()},
        documents,
    )
    return dict(found.to_json())


def _shown_examples(stream: DatedStream, arm: Arm) -> list[Example]:
    """A few questions with their true passage, from which the adapter's own end of an answer is read off."""
    texts = {"words": stream.words, "text": stream.texts, "none": ("",) * len(stream.words)}[arm.memory]
    few = [stream.questions[number] for number in stream.select([0])[:8]]
    return [Example(one.question, one.answers[0], "train", (), None, texts[one.true]) for one in few]


def _done(folder: Path, quarter: int, job: Job) -> bool:
    path = folder / f"q{quarter:02d}.json"
    if not path.exists():
        return False
    _require_same(path, job)
    return True


def _require_same(path: Path, job: Job) -> None:
    told = json.loads(path.read_text("utf-8"))
    differing = [name for name, value in job.made_of.items() if told.get(name) != value]
    if differing:
        raise UsageError(
            "the folder holds results of another run",
            value=str(path),
            cause=f"they differ in {', '.join(differing)}",
            fix="name another --out, or remove the folder",
        )


def _begin(folder: Path, quarter: int, job: Job) -> Path | None:
    """The adapter that ``quarter`` goes on from: its own if a kill came before its scores, else the one before.

    Raises:
        UsageError: results of the quarter before are there, but its adapter is not.
    """
    for number in (quarter, quarter - 1):
        found = folder / f"q{number:02d}"
        if (found / "told.json").exists():
            _require_same(found / "told.json", job)
            return found
    if quarter:
        raise UsageError(
            "the adapter to go on from is missing",
            value=str(folder / f"q{quarter - 1:02d}"),
            cause="results were brought along without it",
            fix="bring the whole folder, or remove it to start again",
        )
    return None


def _means(scores: dict[str, Any], stream: DatedStream, quarter: int) -> str:
    came = np.array([stream.documents[stream.questions[one].document].quarter for one in scores["questions"]])
    values = np.array(scores["f1"])
    old = f", old {values[came < quarter].mean():.1f}" if (came < quarter).any() else ""
    return f"F1 new {values[came == quarter].mean():.1f}{old}"


def write_stream_facts(job: Job) -> None:
    """What the report needs to know of the stream, beside the results."""
    facts = {
        "quarters": list(job.stream.quarters),
        "document": [one.document for one in job.stream.questions],
        "quarter": [job.stream.documents[one.document].quarter for one in job.stream.questions],
        "device": torch.cuda.get_device_name() if job.base.device.type == "cuda" else "CPU",
    }
    job.out.mkdir(parents=True, exist_ok=True)
    _write(job.out / "stream.json", facts)


def choices_digest(choices: Choices) -> str:
    """A short name of choices."""
    return hashlib.sha256(json.dumps(choices.to_json(), sort_keys=True).encode()).hexdigest()[:10]


def _write(path: Path, told: Any) -> None:
    staging = path.with_name(f".{path.name}.{time.monotonic_ns()}.writing")
    staging.write_text(json.dumps(told, ensure_ascii=False) + "\n", "utf-8")
    staging.replace(path)
