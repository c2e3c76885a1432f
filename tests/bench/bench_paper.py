"""The paper's comparison: MBC, MAC, online fine-tuning, closed book and full text, over streams of documents.

    # CPU: SQuAD-dev and archivalqa-test as streams, held-out documents for learning rates, a bank of other documents
    python -m tests.bench.bench_paper data --squad qa_dev.jsonl.gz --dated qa_stream_dated.jsonl.gz \\
        --train PREPARED --out DATA
    # GPU (torch, transformers, peft, pyarrow, safetensors, tokenizers): learning rates of online fine-tuning
    python -m tests.bench.bench_paper tune --data DATA --lm LM --closed ADAPTER --out tuned.json
    # GPU: every method on every set; rows of one keep file may be made by several processes and put together with cat
    python -m tests.bench.bench_paper run --data DATA --lm LM --closed ADAPTER --text ADAPTER --tuned tuned.json \\
        --paper-closed learned-closed=FOLDER --paper-closed address-closed=FOLDER \\
        --paper mbc-learned-t12=FOLDER,learned-closed --paper mbc-address-t24=FOLDER,address-closed \\
        --paper mac-t12=FOLDER,learned-closed --encoder MINILM \\
        --keep answers.jsonl --json report.json --markdown report.md
    # held-out loss of trained models: one line a look, and a plot
    python -m tests.bench.bench_paper curves learned=FOLDER "MAC + KV-LoRA=FOLDER" --out curves.svg --first 500

CaMeLS, the paper's other online baseline, is left out: it meta-learns a second language model that weighs tokens, by
differentiating through the first one's gradient steps, which is a training larger than all others here together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbc_core.evaluation.kept_answers import KeptAnswers
from mbc_core.evaluation.method_report import Controls, Counted, make_report, markdown, table
from mbc_core.evaluation.method_run import Outcome, Protocol, run_method
from mbc_core.evaluation.methods import Method, load_method_set
from mbc_core.evaluation.metrics import bootstrap
from mbc_core.evaluation.online_tuning import OnlineTuning, TuningRun, Weighting
from mbc_core.evaluation.text_methods import ClosedBook, FullText

if TYPE_CHECKING:
    from mbc_core.reader.language_model import LanguageModel

SETS = ("squad", "archivalqa")
GROUPS = ("closed", "paper", "uniform", "salient", "text")
GRID = (3e-6, 1e-5, 3e-5, 1e-4)
"""Learning rates tried on held-out documents."""

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_GIVEN = click.Path(exists=True, dir_okay=False, path_type=Path)
_DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
_LM = click.option("--lm", help="Language model: a folder or a Hugging Face name (default: the release's).")


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


@main.command("data")
@click.option("--squad", type=_GIVEN, required=True, help="SQuAD-dev, one question a row.")
@click.option("--dated", type=_GIVEN, required=True, help="Dated rows with `source` and `split`.")
@click.option("--train", type=_FOLDER, required=True, help="Prepared training data (`mbc train prepare`).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--held-out", default=200, show_default=True, help="Documents to choose learning rates on.")
@click.option("--strangers", default=1000, show_default=True, help="Documents of the shuffled bank.")
def data_command(squad: Path, dated: Path, train: Path, out: Path, held_out: int, strangers: int) -> None:
    """Prepare the sets (CPU, minutes)."""
    from mbc_core import defaults
    from mbc_core.assets import ASSETS, ensure
    from tests.bench.paper_data import make_samples, make_set

    models = (ensure("minilm") / ASSETS["minilm"].inside, defaults.shipped(defaults.SALIENCE))
    make_set(squad, None, out / "squad", models, _say)
    only = {"source": frozenset({"archivalqa"}), "split": frozenset({"test"})}
    make_set(dated, only, out / "archivalqa", models, _say)
    make_samples(train, out, held_out, strangers, _say)


@main.command("tune")
@click.option("--data", type=_FOLDER, required=True)
@_LM
@click.option("--closed", type=_FOLDER, required=True, help="KV-LoRA trained on questions without memory.")
@click.option("--weighting", type=click.Choice(("uniform", "salient", "both")), default="both", show_default=True)
@click.option("--rate", "rates", type=float, multiple=True, help=f"Repeatable (default {', '.join(map(str, GRID))}).")
@click.option("--documents", type=int, help="Only the first so many held-out documents.")
@click.option("--keep", type=_FILE, help="Answers, to go on from.")
@click.option("--out", type=_FILE, required=True, help="Gets the chosen rates and every trial.")
@_DEVICE
def tune_command(
    data: Path, lm: str | None, closed: Path, weighting: str, rates: tuple[float, ...], documents: int | None,
    keep: Path | None, out: Path, device: str,
) -> None:  # fmt: skip
    """Choose the learning rate of online fine-tuning on held-out training documents, by F1."""
    base = _language_model(lm, device)
    held_out = load_method_set("heldout", data / "heldout").first(documents)
    kept = KeptAnswers(keep) if keep is not None else None
    protocol = Protocol(first=0, single=0)
    start = run_method(ClosedBook(base, closed), held_out, protocol, kept=kept, say=_say)
    told: dict[str, Any] = {"documents": len(held_out.documents), "questions": len(start.f1), "trials": [], "rates": {}}
    told["trials"].append(_trial("closed", 0.0, start))
    for kind in ("uniform", "salient") if weighting == "both" else (weighting,):
        for rate in rates or GRID:
            method = _tuning(base, closed, kind, rate)
            told["trials"].append(_trial(kind, rate, run_method(method, held_out, protocol, kept=kept, say=_say)))
        best = max((one for one in told["trials"] if one["method"] == kind), key=lambda one: one["f1"])
        told["rates"][kind] = best["rate"]
    out.write_text(json.dumps(told, indent=2) + "\n")
    click.echo(_trials_table(told))


@main.command("run")
@click.option("--data", type=_FOLDER, required=True)
@click.option("--set", "sets", type=click.Choice(SETS), multiple=True, help="Repeatable; both by default.")
@click.option("--group", "groups", type=click.Choice(GROUPS), multiple=True, help="Repeatable; all that are given.")
@_LM
@click.option("--closed", type=_FOLDER, help="KV-LoRA trained on questions without memory.")
@click.option("--text", type=_FOLDER, help="KV-LoRA trained equally on full text.")
@click.option(
    "--paper",
    "papers",
    multiple=True,
    metavar="NAME=FOLDER[,CLOSED]",
    help="A model of `mbc train paper`, and the --paper-closed that was trained equally.",
)
@click.option("--paper-closed", multiple=True, metavar="NAME=FOLDER", help="The paper's model trained without memory.")
@click.option("--encoder", type=_FOLDER, help="Folder of the sentence encoder, for learned codes.")
@click.option("--tuned", type=_GIVEN, multiple=True, help="What `tune` wrote; repeatable.")
@click.option("--k", default=5, show_default=True, help="Passages of full text.")
@click.option("--first", default=200, show_default=True, help="Documents of the retention question; 0: none.")
@click.option("--documents", type=click.IntRange(1), help="Only the first so many documents of a set.")
@click.option("--limit", type=click.IntRange(1), help="At most so many questions.")
@click.option("--single", default=4, show_default=True, help="Questions asked alone, for the time.")
@click.option("--keep", type=_FILE, help="Answers, to go on from.")
@click.option("--json", "as_json", type=_FILE, help="Write everything measured here.")
@click.option("--markdown", "as_markdown", type=_FILE, help="Write the tables here.")
@_DEVICE
def run_command(sets: tuple[str, ...], **told: Any) -> None:
    """Run every method on every set and print the tables."""
    base = _language_model(told["lm"], told["device"])
    kept = KeptAnswers(told["keep"]) if told["keep"] is not None else None
    protocol = Protocol(first=told["first"], limit=told["limit"], single=told["single"])
    reports = []
    for name in sets or SETS:
        data = load_method_set(name, told["data"] / name, told["data"] / "strangers").first(told["documents"])
        outcomes: list[Outcome] = []
        controls: dict[str, Controls] = {}
        for method, held in _methods(base, told):
            outcomes.append(run_method(method, data, protocol, kept=kept, say=_say))
            controls[method.name] = held
        stored = {int(slots): each for slots, each in _json(told["data"] / name / "stored.json").items()}
        counted = Counted.of(data, stored)
        width = int(base.model.config.hidden_size)
        reports.append(make_report(data, outcomes, controls, counted, protocol, width=width))
    _write(told["as_json"], json.dumps({"lm": base.name, "lm_digest": base.digest, "sets": reports}, indent=1) + "\n")
    text = "\n".join(markdown(one) for one in reports)
    _write(told["as_markdown"], text)
    click.echo(text)


@main.command("curves")
@click.argument("runs", nargs=-1, required=True, metavar="NAME=FOLDER[,CLOSED]...")
@click.option("--runs", "by_run", is_flag=True, help="A table of the runs, less the closed book that each names.")
@click.option("--table", "step", type=int, help="A table of the runs' looks at this step, instead of every look.")
@click.option("--out", type=_FILE, help="Write a plot (SVG) here.")
@click.option("--first", default=0, show_default=True, help="The plot leaves out looks before this step.")
def curves_command(runs: tuple[str, ...], by_run: bool, step: int | None, out: Path | None, first: int) -> None:
    """Print the held-out loss of runs of `mbc train paper`, and plot it."""
    from tests.bench.paper_curves import curve_lines, curve_plot, load_curve, look_table, run_table

    given = [_named(one, "NAME=FOLDER") for one in runs]
    curves = [load_curve(name, folder) for name, folder, _ in given]
    books = {name: book for name, _, book in given if book}
    if unknown := sorted(set(books.values()) - {name for name, _, _ in given}):
        raise click.BadParameter(f"{unknown} is not the NAME of a run", param_hint="NAME=FOLDER,CLOSED")
    if out is not None:
        _write(out, curve_plot(curves, first))
    if by_run:
        click.echo(run_table(curves, books))
    elif step is not None:
        click.echo(look_table(curves, step))
    else:
        click.echo("\n".join(line for curve in curves for line in curve_lines(curve)))


def _methods(base: LanguageModel, told: dict[str, Any]) -> Iterator[tuple[Method, Controls]]:
    """The methods that were given what they need, each with its controls."""
    wanted = told["groups"] or GROUPS
    if "closed" in wanted and told["closed"] is not None:
        yield ClosedBook(base, told["closed"]), Controls()
    if "paper" in wanted:
        yield from _papers(base, told)
    rates = {kind: rate for file in told["tuned"] for kind, rate in _json(file)["rates"].items()}
    for kind in ("uniform", "salient"):
        if kind in wanted and told["closed"] is not None and kind in rates:
            yield _tuning(base, told["closed"], kind, rates[kind]), Controls("closed")
    if "text" in wanted and told["text"] is not None:
        from mbc_core import defaults

        yield FullText(base, told["text"], defaults.rotation(), defaults.codebook(24), k=told["k"]), Controls("closed")


def _papers(base: LanguageModel, told: dict[str, Any]) -> Iterator[tuple[Method, Controls]]:
    """The paper's models over their own bank and over the bank of other documents, after their closed books."""
    closed = {name: Path(folder) for name, folder, _ in map(_named, told["paper_closed"])}
    models = [_named(given) for given in told["papers"]]
    unknown = [book for _, _, book in models if book and book not in closed]
    if unknown:
        raise click.BadParameter(f"{unknown} is not the NAME of a --paper-closed", param_hint="--paper")
    for name, folder in closed.items():
        yield _paper(base, told, folder, name), Controls()
    for name, folder, book in models:
        held, other = book or "closed", f"{name}, shuffled bank"
        yield _paper(base, told, folder, name), Controls(held, other)
        yield _paper(base, told, folder, other, shuffled=True), Controls(held)


def _named(given: str, hint: str = "--paper") -> tuple[str, Path, str]:
    """``NAME=FOLDER`` or ``NAME=FOLDER,CLOSED`` → its parts; the last is empty when it is not there."""
    name, equals, rest = given.partition("=")
    folder, _, book = rest.partition(",")
    if not equals or not name or not Path(folder).is_dir():
        raise click.BadParameter(f"{given!r} does not name an existing folder", param_hint=hint)
    return name, Path(folder), book


def _paper(base: LanguageModel, told: dict[str, Any], folder: Path, name: str, *, shuffled: bool = False) -> Method:
    from mbc_core.training.paper_method import PaperMethod

    encoder = told["encoder"]
    return PaperMethod(base, folder, name=name, shuffled=shuffled, encoder_folder=encoder)


def _tuning(base: LanguageModel, closed: Path, kind: str, rate: float) -> OnlineTuning:
    from mbc_core import defaults

    weighting: Weighting = "salient" if kind == "salient" else "uniform"
    lexicon = defaults.lexicon() if weighting == "salient" else None
    return OnlineTuning(base, closed, TuningRun(weighting, rate), lexicon=lexicon)


def _trial(name: str, rate: float, outcome: Outcome) -> dict[str, Any]:
    f1 = bootstrap(outcome.f1)
    return {"method": name, "rate": rate, "f1": f1.mean, "f1_low": f1.low, "f1_high": f1.high,
            "em": float(outcome.em.mean()), "ms_document": outcome.ms_document}  # fmt: skip


def _trials_table(told: dict[str, Any]) -> str:
    rows: Sequence[Sequence[object]] = [
        [one["method"], f"{one['rate']:g}", f"{one['f1']:.1f} [{one['f1_low']:.1f}, {one['f1_high']:.1f}]",
         f"{one['em']:.1f}", f"{one['ms_document']:.0f}"]
        for one in told["trials"]
    ]  # fmt: skip
    head = f"Held-out: {told['documents']:,} documents, {told['questions']:,} questions; chosen: {told['rates']}\n\n"
    return head + table(["method", "learning rate", "F1", "EM", "ms/doc"], rows)


def _language_model(lm: str | None, device: str) -> LanguageModel:
    import torch

    from mbc_core import defaults

    found = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return defaults.language_model(lm, device=found)


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def _say(line: str) -> None:
    click.echo(line, err=True)
    sys.stderr.flush()


if __name__ == "__main__":
    main()
