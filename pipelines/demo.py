"""`mbc demo`: real documents through the pipeline, answers from the bank, a short adaptation, a scored set.

Each step prints what it found. A second run finds its bank and adapter and goes straight to the answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mbc_core.cli.options import device_option, json_option, profile_option, resolve_device, seed_option
from mbc_core.cli.output import make_console, note, only_json, print_json

if TYPE_CHECKING:
    from mbc_core.answering import Reader
    from mbc_core.memory import Memory

DOCUMENTS, SCORED_QUESTIONS, SHOWN_QUESTIONS, SHOWN_WRONG, ADAPT_MINUTES = 500, 40, 6, 5, 0.7
_ADAPT_BATCH = 4  # small steps: a minute of two cores sees few questions
_ADAPT_LOOK, _ADAPT_HELD_OUT = 12, 64  # so few held-out questions prove nothing: the gate will say so
_KEY_SALT = b"mbc demo's bank!".hex()  # fixed, so that every demo splits its documents and draws its questions alike
_RIGHT = 0.5  # F1 from which a shown answer counts as right

HELP = """Show the whole loop on Wikipedia lead sections: ingest, answers with sources, sizes, adaptation, scores.

The bank stays in ./demo-bank (with --full, ./demo-bank-full), so that a second run starts at once and the other
commands have something to work on.

Example: mbc demo
"""


@dataclass
class Demo:
    """What the steps share.

    Attributes:
        console: where the story is told.
        corpus: the documents, a JSON Lines file. bank: the bank's folder.
        began: monotonic seconds at the start of the command.
        figures: everything measured, for --json.
    """

    console: Console
    corpus: Path
    bank: Path
    profile: str | None
    device: str
    seed: int
    began: float
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the start of the command."""
        return time.monotonic() - self.began

    @cached_property
    def texts(self) -> dict[str, str]:
        """Id → text of every document of the corpus."""
        lines = self.corpus.read_text("utf-8").splitlines()
        return {document["id"]: document["text"] for document in map(json.loads, lines)}

    @cached_property
    def memory(self) -> Memory:
        """The bank, searchable; opened after the ingest."""
        from mbc_core.memory import Memory

        return Memory.open(self.bank, device=self.device)

    def reader(self) -> Reader:
        """A reader with the adapter that is live now."""
        from mbc_core.answering import Reader

        return Reader(self.memory, device=self.device)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A headed part of the story; how long it took is kept."""
        self.console.print(f"\n[bold]── {title}[/bold] [dim]({self.seconds:.0f} s after the start)[/dim]")
        started = time.monotonic()
        yield
        self.figures.setdefault("seconds", {})[title] = round(time.monotonic() - started, 2)
        self.figures.setdefault("peak_memory_bytes", {})[title] = _peak_memory()


@click.command(help=HELP)
@click.option("--full", is_flag=True, help="All 10,033 documents, without the adaptation.")
@click.option("--bank", type=click.Path(path_type=Path, file_okay=False), help="Where the bank goes.")
@click.option("--documents", type=click.IntRange(10, 10_033), help=f"How many (default {DOCUMENTS}).")
@profile_option
@click.option("--adapt/--no-adapt", default=None, help="Refresh the adapter (default: yes; with --full, no).")
@click.option("--minutes", type=click.FloatRange(0.05), default=ADAPT_MINUTES, show_default=True, help="To adapt for.")
@click.option("--questions", type=click.IntRange(1), default=SCORED_QUESTIONS, show_default=True, help="To score.")
@seed_option
@device_option
@json_option
def demo(
    full: bool,
    bank: Path | None,
    documents: int | None,
    profile: str | None,
    adapt: bool | None,
    minutes: float,
    questions: int,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """See HELP."""
    began = time.monotonic()
    if full and documents is not None:
        raise click.UsageError("--full takes all documents; leave out --documents.")
    with only_json(as_json) as stream:
        told = Demo(
            console=make_console(stderr=as_json),
            corpus=_corpus(None if full else documents or DOCUMENTS, seed),
            bank=bank or Path("demo-bank-full" if full else "demo-bank"),
            profile=profile,
            device=resolve_device(device),
            seed=seed,
            began=began,
        )
        wanted = adapt if adapt is not None else not full
        tell(told, minutes if wanted else None, questions)
        if as_json:
            print_json(told.figures, stream)


def tell(told: Demo, adapt_minutes: float | None, questions: int) -> None:
    """All steps in order; ``adapt_minutes`` None leaves the adaptation out."""
    with told.step("Ingest: encode → quantize → update the codebook → write"):
        _ingest(told)
    readable = told.memory.bank.manifest.words > 0
    if readable:
        with told.step("Answers from the bank"):
            _answer(told)
    with told.step("What the bank costs"):
        _sizes(told)
    if not readable:
        told.console.print("This profile keeps no words to read: the passages can be found, not read.")
    elif adapt_minutes is not None:
        with told.step("Adaptation: the adapter against what the bank recalls"):
            _adapt(told, adapt_minutes)
    with told.step("Scored set"):
        _score(told, questions, readable)
    _close(told)


def _corpus(count: int | None, seed: int) -> Path:
    """The documents' file in the user's cache; assets that are missing are fetched first."""
    from mbc_core.assets import Assets
    from mbc_core.corpus import cached_corpus

    return cached_corpus(Assets.ensure(note).wiki, count=count, seed=seed)


def _ingest(told: Demo) -> None:
    from mbc_core.bank import Bank
    from mbc_core.corpus import LICENCE
    from pipelines.commands import show_ingest
    from pipelines.demo_report import show_bank
    from pipelines.ingest import run_ingest
    from pipelines.options import IngestSettings

    told.console.print(f"{LICENCE}. Their times are made up: topics come one after the other, so that there is drift.")
    settings = IngestSettings(profile=told.profile, device=told.device, key_salt=_KEY_SALT)
    told.figures["ingest"] = result = run_ingest([str(told.corpus)], str(told.bank), settings)
    show_ingest(result, told.console)
    bank = Bank.open(told.bank)
    told.figures["inspect"] = found = bank.inspect()
    show_bank(told.console, bank, found)


def _answer(told: Demo) -> None:
    from mbc_core.demo_questions import questions_about
    from mbc_core.evaluation.metrics import f1
    from pipelines.demo_report import show_answer

    reader = told.reader()
    asked = questions_about(told.texts, SHOWN_QUESTIONS)
    answers: list[dict[str, Any]] = []
    told.figures["answers"] = answers
    for part in (asked[:1], asked[1:]):  # the first alone, for its time; the rest in one batch
        for question, answer in zip(part, reader.ask_many([one.question for one in part]), strict=True):
            if not answers:
                told.figures["first_answer_seconds"] = round(told.seconds, 1)
            answers.append({**answer.to_json(), "expected": question.answer})
            right = f1(answer.answer, [question.answer]) >= _RIGHT
            show_answer(told.console, answers[-1], question.answer, right)
    if answers:
        told.console.print(f"\nFirst answer {told.figures['first_answer_seconds']:.0f} s after the start.")
    told.figures["model"] = {
        "name": reader.language_model.name,
        "parameters": sum(
            one.numel() for name, one in reader.language_model.model.named_parameters() if "lora_" not in name
        ),
        "width": int(reader.language_model.model.config.hidden_size),
    }


def _sizes(told: Demo) -> None:
    from mbc_core.sizes import compress
    from pipelines.demo_report import show_sizes

    texts = compress(list(told.texts.values()))
    told.figures["texts"] = asdict(texts)
    show_sizes(told.console, told.memory.bank, told.figures["inspect"], texts)


def _adapt(told: Demo, minutes: float) -> None:
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.training.adapt import AdaptRun
    from pipelines.adapt import run_adapt
    from pipelines.adapt_command import show_adapt

    registry = AdapterRegistry(told.memory.bank)
    if registry.versions():
        told.console.print(
            f"There is an adapter from an earlier run ({registry.versions()[-1]}): see `mbc adapters list --bank"
            f" {told.bank}`; `mbc adapt --bank {told.bank}` refreshes it again."
        )
        return
    run = AdaptRun(None, minutes, batch=_ADAPT_BATCH, seed=told.seed, evaluate_every=20, dev_questions=_ADAPT_LOOK)
    result = run_adapt(told.memory.bank, run, device=told.device, of_set={"held_out": _ADAPT_HELD_OUT}, say=note)
    told.figures["adapt"] = result
    show_adapt(result, told.console)


def _score(told: Demo, questions: int, readable: bool) -> None:
    from mbc_core import defaults
    from mbc_core.evaluation.scored_set import Document, held_out_first, score_reads, scored_questions
    from pipelines.demo_report import show_found, show_scores, show_wrong

    reader = told.reader()
    encoder = defaults.encoder_for(told.memory.bank.manifest, device=told.device)
    order = held_out_first(reader, sorted(told.texts, key=lambda name: _rank(name, told.seed)))
    asked = scored_questions(
        [Document(name, told.texts[name], name) for name in order], encoder, count=questions, seed=told.seed
    )
    recalled = told.memory.recall([one.question for one in asked], 5)
    told.figures["scored"] = {"found": show_found(told.console, asked, recalled)}
    if readable:
        scored = score_reads(reader, asked, told.texts, encoder.count_pieces, seed=told.seed)
        show_scores(told.console, scored, told.memory.bank.manifest.profile)
        show_wrong(told.console, scored, recalled, SHOWN_WRONG)
        told.figures["scored"]["rows"] = list(scored.rows)
        told.figures["model"]["adapter"] = reader.adapter


def _close(told: Demo) -> None:
    """The model's size, how to take a larger one, time and memory."""
    model = told.figures.get("model")
    if model:
        told.console.print(
            f"\nThe language model is {model['name']}, {model['parameters'] / 1e6:.0f} million parameters, read through"
            f" adapter {model['adapter']}: small, hence many of the wrong answers. For a larger one: `mbc recall"
            f' "…" --bank {told.bank}` prints the memory lines for any model\'s prompt; or train an adapter for it,'
            " `mbc train reader --lm NAME …`, and ask with `mbc ask --lm NAME --adapter FOLDER …`."
        )
    told.figures["total_seconds"] = round(told.seconds, 1)
    told.console.print(
        f"Done in {told.seconds:.0f} s, at most {_peak_memory() / 1e9:.1f} GB of memory. The bank is {told.bank}; try"
        f' `mbc {"ask" if model else "recall"} "…" --bank {told.bank}`.'
    )


def _rank(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\x00{name}".encode(), digest_size=8).digest()


def _peak_memory() -> int:
    """Bytes of this process's largest resident set; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
