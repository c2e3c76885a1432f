"""`mbc train attend`: the read of passages as vectors, from prepared data; or its equally trained closed book."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mbc_core.cli.train_reader import named_folders

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _shares(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """``0.7,0.15,0.15`` → numbers."""
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers", context, parameter) from error


@click.command("attend")
@click.argument("prepared", type=_FOLDER, nargs=-1, required=True)
@click.option("--lm", "source", required=True, help="Language model: a folder or a Hugging Face name.")
@click.option("--gguf", "gguf_file", default=None, help="Name of the GGUF file inside the folder.")
@click.option("--lexicon", "lexicon_file", type=_FILE, required=True, help="Lexicon file.")
@click.option(
    "--codebook",
    "codebook_files",
    type=_FILE,
    multiple=True,
    required=True,
    help="Codebook of the address codes; the first (T = 24) is evaluated, each one given is trained on.",
)
@click.option("--rotation", "rotation_file", type=_FILE, required=True, help="Rotation of the address codes.")
@click.option(
    "--encoder", "encoder_folder", type=_FOLDER, required=True, help="The encoder that PREPARED was made with."
)
@click.option("--encoder-id", default=None, help="Id of the encoder, when the prepared folder was made with a copy.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the weights.")
@click.option(
    "--closed", is_flag=True, help="Train the rival without memory instead: the same questions, steps and adapter."
)
@click.option(
    "--minutes", type=float, default=6.0, show_default=True, help="Length of the run; 0 leaves it to --steps."
)
@click.option("--steps", type=click.IntRange(0), default=None, help="End after so many; 0: naming alone.")
@click.option("--call-minutes", type=float, default=None, help="Stop this call early; call again to go on.")
@click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Samples a step.")
@click.option("--rows", type=click.IntRange(1), default=256, show_default=True, help="Samples of one forward pass.")
@click.option("--lr", type=float, default=7e-4, show_default=True, help="Highest learning rate of the adapter.")
@click.option("--words", type=click.IntRange(1), default=16_384, show_default=True, help="In the dictionary.")
@click.option("--answers", type=click.IntRange(0), default=8, show_default=True, help="Soft tokens that may answer.")
@click.option("--topics", type=click.IntRange(0), default=8, show_default=True, help="Soft tokens of the passage.")
@click.option("--hidden", type=click.IntRange(1), default=768, show_default=True, help="Hidden units.")
@click.option(
    "--question/--no-question", default=True, show_default=True, help="Read each passage for the question at hand."
)
@click.option("--dropout", type=float, default=0.3, show_default=True, help="Of the projector's hidden layer.")
@click.option(
    "--variants",
    callback=_shares,
    default=None,
    metavar="SHARES",
    help="How often each codebook's vectors are shown, and last the float embedding (default 0.7 and the rest even).",
)
@click.option("--cloze", type=float, default=0.4, show_default=True, help="Share of cloze questions.")
@click.option("--start", type=_FOLDER, default=None, help="Adapter to start from, such as the one that reads words.")
@click.option(
    "--sentences", type=click.IntRange(0), default=2, show_default=True, help="Of a passage, as passages of their own."
)
@click.option(
    "--naming-steps", type=click.IntRange(0), default=1000, show_default=True, help="The projector alone, first."
)
@click.option("--naming-batch", type=click.IntRange(1), default=2048, show_default=True, help="Questions a step of it.")
@click.option("--as-found", type=float, default=0.25, show_default=True, help="Share of samples shown as recalled.")
@click.option("--cloze-each", type=click.IntRange(1), default=2, show_default=True, help="Made of a passage, at most.")
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, help="Of KV-LoRA; alpha is twice it.")
@click.option("--targets", default=None, help="Names of the key and value projections, such as k_proj,v_proj.")
@click.option("--evaluate", multiple=True, callback=named_folders, metavar="NAME=FOLDER", help="Prepared sets to read.")
@click.option("--evaluate-questions", type=click.IntRange(1), default=700, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--compile/--no-compile", "compile_layers", default=True, show_default=True, help="Compile layers on a GPU."
)
@click.option("--resume/--restart", default=True, show_default=True, help="Take up the checkpoint in --out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def attend_command(
    prepared: tuple[Path, ...],
    source: str,
    gguf_file: str | None,
    lexicon_file: Path,
    codebook_files: tuple[Path, ...],
    rotation_file: Path,
    encoder_folder: Path,
    encoder_id: str | None,
    out_dir: Path,
    closed: bool,
    minutes: float,
    steps: int | None,
    call_minutes: float | None,
    batch: int,
    rows: int,
    lr: float,
    words: int,
    answers: int,
    topics: int,
    hidden: int,
    question: bool,
    dropout: float,
    variants: tuple[float, ...] | None,
    cloze: float,
    start: Path | None,
    sentences: int,
    naming_steps: int,
    naming_batch: int,
    as_found: float,
    cloze_each: int,
    rank: int,
    targets: str | None,
    evaluate: list[tuple[str, Path]],
    evaluate_questions: int,
    precision: str,
    compile_layers: bool,
    resume: bool,
    seed: int,
    device: str,
) -> None:
    """Train the read `attend` on PREPARED, folders that `mbc train prepare` wrote, and write it with its card.

    Example: mbc train attend ./prepared --lm ./SmolLM2 --lexicon lexicon.json.gz --codebook codebook_t24.safetensors
    --rotation rotation.safetensors --encoder ./MiniLM --out ./attend --minutes 6
    """
    from dataclasses import replace

    from mbc_core.cli.options import resolve_device
    from mbc_core.codebook.files import Codebook
    from mbc_core.codes import Rotation
    from mbc_core.encoder import PassageEncoder
    from mbc_core.lexicon import Lexicon
    from mbc_core.reader.kv_lora import KVLoraConfig
    from mbc_core.reader.language_model import load_language_model
    from mbc_core.training.attend import train_attend
    from mbc_core.training.attend_naming import NamingPhase
    from mbc_core.training.attend_run import ATTEND_MIXTURE, AttendRun

    place = resolve_device(device)
    books = [Codebook.from_bytes(one.read_bytes(), str(one)) for one in codebook_files]
    card = train_attend(
        prepared,
        Lexicon.load(lexicon_file),
        books,
        Rotation.load(rotation_file),
        load_language_model(source, gguf_file, dtype=precision, device=place),
        out_dir,
        AttendRun(
            steps=steps,
            minutes=minutes or None,
            call_minutes=call_minutes,
            batch=batch,
            rows=min(rows, batch),
            lr=lr,
            seed=seed,
            compile_layers=compile_layers,
            evaluate_questions=evaluate_questions,
            words=words,
            answers=answers,
            topics=topics,
            hidden=hidden,
            question=question,
            dropout=dropout,
            variants=variants or (0.7, *([0.3 / len(books)] * len(books))),
            closed=closed,
            as_found=as_found,
            sentences=sentences,
            cloze_each=cloze_each,
            naming=NamingPhase(steps=naming_steps, batch=naming_batch),
            kv_lora=KVLoraConfig(r=rank, alpha=2 * rank),
            mixture=replace(ATTEND_MIXTURE, cloze=cloze),
        ),
        encoder=PassageEncoder.load(encoder_folder, None, device=place),
        encoder_id=encoder_id,
        start=start,
        targets=targets.split(",") if targets else None,
        evaluate=dict(evaluate),
        resume=resume,
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(json.dumps(card))
