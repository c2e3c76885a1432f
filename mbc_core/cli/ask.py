"""`mbc ask` and `mbc recall`: answers from a bank, and the memory lines alone for any language model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from mbc_core.cli.options import as_of_option, bank_option, device_option, json_option, k_option, resolve_device
from mbc_core.cli.output import escape, note, only_json, out, print_json
from mbc_core.errors import UsageError
from schemas.results import AskResult, Source

READS = ("recall", "attend", "aggregate", "closed")


@click.command()
@click.argument("question", required=False)
@click.option(
    "--questions",
    "file",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="A file of questions, one a line, or JSON Lines with `question`; - for standard input.",
)
@bank_option
@click.option(
    "--read",
    type=click.Choice(READS),
    default="recall",
    show_default=True,
    help="recall puts the words of the best passages before the question; attend reads their addresses as vectors; "
    "aggregate reads the codes of the whole bank at once, so it names no sources; closed asks the model alone.",
)
@k_option
@as_of_option
@click.option(
    "--lm", "--model", "model", metavar="NAME", help="Another language model: a folder or a Hugging Face name."
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the adapter to read with, as `mbc train reader` writes it (default: the bank's live one).",
)
@click.option(
    "--attend",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weights of the read attend, as `mbc train attend` writes them (default: the shipped ones).",
)
@click.option(
    "--paper",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weights of the read aggregate, as `mbc train paper` writes them (default: the shipped ones).",
)
@device_option
@json_option
def ask(
    question: str | None,
    file: Path | None,
    bank: str,
    read: str,
    k: int,
    as_of: datetime | None,
    model: str | None,
    adapter: Path | None,
    attend: Path | None,
    paper: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Answer a question from the bank, and show what was recalled.

    Example: mbc ask "Who created the C programming language?" --bank demo-bank
    """
    questions = _questions(question, file)
    with only_json(as_json) as stream:
        from mbc_core import defaults
        from mbc_core.answering import Reader

        device = resolve_device(device)
        named = defaults.language_model(model, device=device) if model else None
        reader = Reader(
            bank, language_model=named, adapter=adapter, as_of=as_of, device=device, warn=note, attend=attend,
            paper=paper,
        )  # fmt: skip
        answers = [answer.to_json() for answer in reader.ask_many(questions, k=k, read=read)]
        held = reader.histogram.passages if read == "aggregate" else sum(len(answer["sources"]) for answer in answers)
        if read != "closed" and not held:
            note(f"{_nothing_held(as_of)}: what is answered comes from the language model alone")
        if as_json:
            print_json(answers[0] if file is None else {"answers": answers}, stream)
            return
    for answer in answers:
        _show(answer)


@click.command()
@click.argument("question")
@bank_option
@k_option
@as_of_option
@device_option
@json_option
def recall(question: str, bank: str, k: int, as_of: datetime | None, device: str, as_json: bool) -> None:
    """Print the memory lines for a question: the words of the best passages, for any language model's prompt.

    Example: mbc recall "Who created the C programming language?" --bank demo-bank --k 3
    """
    with only_json(as_json) as stream:
        from mbc_core.memory import Memory

        memory = Memory.open(bank, as_of=as_of, device=resolve_device(device))
        (found,) = memory.recall([question], k)
        sources = [one.to_json() for one in found]
        if not sources:
            note(_nothing_held(as_of))
        elif not memory.bank.manifest.words:
            note("the bank has no word codes (profile paper): these are the titles of the best documents")
        if as_json:
            print_json({"question": question, "as_of": as_of, "sources": sources}, stream)
            return
    for source in sources:
        click.echo(source["words"] if memory.bank.manifest.words else source["title"] or source["doc_id"])


def _nothing_held(as_of: datetime | None) -> str:
    return "the bank holds no documents" + (f" added by {as_of:%Y-%m-%dT%H:%M:%SZ}" if as_of else "")


def _questions(question: str | None, file: Path | None) -> list[str]:
    """The question of the command line, or those of the file."""
    if (question is None) == (file is None):
        raise click.UsageError("Give one question, or --questions FILE.")
    if file is None:
        if not (question or "").strip():
            raise click.UsageError("The question is empty.")
        return [str(question)]
    try:
        text = (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the questions cannot be read", value=str(file), cause=str(error), fix="name a text file in UTF-8"
        ) from error
    found = [_question_of(line) for line in text.splitlines() if line.strip()]
    if not found:
        raise UsageError("there are no questions", value=str(file), fix="write one question a line")
    return found


def _question_of(line: str) -> str:
    """A line of text, or the field `question` of a JSON object."""
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        return str(json.loads(line)["question"])
    except (ValueError, KeyError) as error:
        raise UsageError(
            "a line of the questions is not a JSON object with `question`",
            value=line,
            cause=str(error),
            fix='write {"question": "…"} or the bare question on each line',
        ) from error


def _show(answer: AskResult) -> None:
    console = out()
    console.print(f"[bold]Q[/bold] {escape(answer['question'])}")
    console.print(f"[bold]A[/bold] {escape(answer['answer']) or '(nothing)'}")
    show_sources(answer["sources"])
    spent = answer["milliseconds"]
    console.print(f"[dim]recall {spent['recall']:.0f} ms, generate {spent['generate']:.0f} ms[/dim]\n")


def show_sources(sources: Sequence[Source]) -> None:
    """One line a source: title, time, score, recalled words."""
    for source in sources:
        day = f" [dim]{source['event_time'][:10]}[/dim]" if source["event_time"] else ""
        title = escape(source["title"] or source["doc_id"])
        out().print(f"  [cyan]{title}[/cyan]{day} {source['score']:.2f}  {escape(source['words'])}")
