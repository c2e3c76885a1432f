"""`mbc train reader`: KV-LoRA v0, or one of its equally trained rivals, from prepared data."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def named_folders(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, Path]]:
    """``NAME=FOLDER`` options."""
    named = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or not Path(folder).is_dir():
            raise click.BadParameter(f"{value!r} is not NAME=FOLDER with an existing folder", context, parameter)
        named.append((name, Path(folder)))
    return named


@click.command("reader")
@click.argument("prepared", type=_FOLDER)
@click.option("--lm", "source", required=True, help="Language model: a folder or a Hugging Face name.")
@click.option("--gguf", "gguf_file", default=None, help="Name of the GGUF file inside the folder.")
@click.option("--lexicon", "lexicon_file", type=_FILE, required=True, help="Lexicon file.")
@click.option("--codebook", "codebook_file", type=_FILE, required=True, help="Codebook of the address codes (T = 24).")
@click.option("--rotation", "rotation_file", type=_FILE, required=True, help="Rotation of the address codes.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the adapter.")
@click.option(
    "--memory",
    type=click.Choice(("words", "text", "none")),
    default="words",
    show_default=True,
    help="What stands before a question: a bank's words; or for the fair rivals of `mbc eval` full text, or nothing.",
)
@click.option(
    "--minutes", type=float, default=5.0, show_default=True, help="Length of the run; 0 leaves it to --steps."
)
@click.option("--steps", type=click.IntRange(0), default=None, help="End after so many steps, if that comes first.")
@click.option("--call-minutes", type=float, default=None, help="Stop this call early; call again to go on.")
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="Samples a step.")
@click.option("--batch-tokens", type=click.IntRange(256), default=32_768, show_default=True, help="Tokens a pass.")
@click.option("--lr", type=float, default=7e-4, show_default=True, help="Highest learning rate.")
@click.option(
    "--rank", type=click.IntRange(1), default=32, show_default=True, help="Rank of the update; alpha is twice it."
)
@click.option("--targets", default=None, help="Names of the key and value projections, such as k_proj,v_proj.")
@click.option(
    "--evaluate",
    multiple=True,
    callback=named_folders,
    metavar="NAME=FOLDER",
    help="Prepared sets to read at the end.",
)
@click.option("--evaluate-questions", type=click.IntRange(1), default=500, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--compile/--no-compile", "compile_layers", default=True, show_default=True, help="Compile layers on a GPU."
)
@click.option("--resume/--restart", default=True, show_default=True, help="Take up the checkpoint in --out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def reader_command(
    prepared: Path,
    source: str,
    gguf_file: str | None,
    lexicon_file: Path,
    codebook_file: Path,
    rotation_file: Path,
    out_dir: Path,
    memory: str,
    minutes: float,
    steps: int | None,
    call_minutes: float | None,
    batch: int,
    batch_tokens: int,
    lr: float,
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
    """Train KV-LoRA on PREPARED, the folder that `mbc train prepare` wrote, and write the adapter with its card.

    Example: mbc train reader ./prepared --lm ./SmolLM2 --lexicon lexicon.json --codebook codebook_t24.safetensors
    --rotation rotation.safetensors --out ./reader --minutes 8
    """
    from mbc_core import defaults
    from mbc_core.cli.options import resolve_device
    from mbc_core.codebook.files import Codebook
    from mbc_core.codes import Rotation
    from mbc_core.lexicon import Lexicon
    from mbc_core.reader.kv_lora import KVLoraConfig
    from mbc_core.reader.language_model import load_language_model
    from mbc_core.training.reader import ReaderRun, train_reader
    from mbc_core.training.rivals import mixture_of

    rotation = Rotation.load(rotation_file)
    codebook = Codebook.from_bytes(codebook_file.read_bytes(), str(codebook_file))
    card = train_reader(
        prepared,
        Lexicon.load(lexicon_file),
        codebook,
        rotation,
        load_language_model(source, gguf_file, dtype=precision, device=resolve_device(device)),
        out_dir,
        ReaderRun(
            steps=steps,
            minutes=minutes or None,
            call_minutes=call_minutes,
            batch=batch,
            batch_tokens=batch_tokens,
            lr=lr,
            seed=seed,
            compile_layers=compile_layers,
            evaluate_questions=evaluate_questions,
            kv_lora=KVLoraConfig(r=rank, alpha=2 * rank),
            mixture=mixture_of(memory),
        ),
        targets=targets.split(",") if targets else None,
        evaluate=dict(evaluate),
        query_map=defaults.query_map(rotation, rotation.width // codebook.width),
        resume=resume,
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(json.dumps(card))
