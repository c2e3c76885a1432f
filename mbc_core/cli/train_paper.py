"""`mbc train paper-data|paper`: the paper's model from tokenised passages and questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DEVICE = click.Choice(["auto", "cpu", "cuda"])


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("paper-data")
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--encoder", type=_FOLDER, required=True, help="Folder of the sentence encoder.")
@click.option("--lm", "source", required=True, help="Language model: a folder or a Hugging Face name.")
@click.option("--gguf", "gguf_file", default=None, help="Name of the GGUF file inside the folder.")
@click.option("--rotation", "rotation_file", type=_FILE, default=None, help="Rotation of the address codes.")
@click.option("--codebook", "codebook_files", type=_FILE, multiple=True, help="Address codebook; once a T.")
@click.option(
    "--only", multiple=True, metavar="FIELD=VALUE,…", help="Of QA files to measure on: rows with these values."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File: ….safetensors.")
@click.option("--device", type=_DEVICE, default="auto", show_default=True)
def paper_data_command(
    sources: tuple[Path, ...],
    encoder: Path,
    source: str,
    gguf_file: str | None,
    rotation_file: Path | None,
    codebook_files: tuple[Path, ...],
    only: tuple[str, ...],
    out: Path,
    device: str,
) -> None:
    """Tokenise SOURCES once for `mbc train paper`: a folder of `mbc train prepare`, or QA files.

    QA files given without --only are read as training data (held-out rows and forbidden sources stay out); with
    --only, the rows that match are a set to measure on.

    Example: mbc train paper-data ./prepared --encoder ./MiniLM --lm ./SmolLM2 --rotation rotation.safetensors
    --codebook codebook_t12.safetensors --out paper.safetensors
    """
    from mbc_core.cli.options import resolve_device
    from mbc_core.codebook.files import Codebook
    from mbc_core.codes import Rotation
    from mbc_core.encoder import PassageEncoder
    from mbc_core.reader.language_model import load_language_model
    from mbc_core.reader.prompt import PromptFormat
    from mbc_core.training.paper_data import data_of_passages, data_of_prepared
    from mbc_core.training.paper_sources import passages_of
    from mbc_core.training.prepared import load_prepared

    loaded = PassageEncoder.load(encoder, None, device=resolve_device(device))
    form = PromptFormat(load_language_model(source, gguf_file).tokenizer)
    pieces: dict[str, Any] = {
        "rotation": Rotation.load(rotation_file) if rotation_file else None,
        "codebooks": [Codebook.from_bytes(one.read_bytes(), str(one)) for one in codebook_files],
    }
    if len(sources) == 1 and sources[0].is_dir():
        data = data_of_prepared(load_prepared(sources[0]), loaded, form, **pieces)
    else:
        data = data_of_passages(passages_of(sources, only, _say), loaded, form, say=_say, **pieces)
    data.save(out)
    told = {"passages": len(data), "held_out": int(data.held_out.sum()), "questions": len(data.rows)}
    click.echo(
        json.dumps({**told, "T": sorted(data.codes), "bytes": out.stat().st_size, "sources": data.told["sources"]})
    )


@click.command("paper")
@click.argument("data_file", metavar="DATA", type=_FILE)
@click.option("--encoder", type=_FOLDER, required=True, help="Folder of the sentence encoder.")
@click.option("--lm", "source", required=True, help="Language model: a folder or a Hugging Face name.")
@click.option("--gguf", "gguf_file", default=None, help="Name of the GGUF file inside the folder.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the model.")
@click.option("--start-from", type=_FOLDER, default=None, help="A model of this shape to go on from (weights alone).")
@click.option("--codes", type=click.Choice(["learned", "address"]), default="learned", show_default=True)
@click.option("--codebook", "codebook_file", type=_FILE, default=None, help="Frozen codebook of address codes.")
@click.option("--codewords", type=click.IntRange(2), default=512, show_default=True, help="K of a learned codebook.")
@click.option("--tokens", type=click.IntRange(1), default=12, show_default=True, help="T.")
@click.option("--code-width", type=click.IntRange(1), default=None, help="d_c of learned codes (default: the model's).")
@click.option("--codebook-by", type=click.Choice(["gradient", "ema"]), default="gradient", show_default=True)
@click.option(
    "--usage-decay", type=click.FloatRange(0, 1, max_open=True), default=0.99, show_default=True,
    help="Of usage and of an EMA codebook, a step; less lets dead codes be found in short runs.",
)  # fmt: skip
@click.option("--reset/--no-reset", default=True, show_default=True, help="Give dead codes a new word.")
@click.option("--kv-lora/--no-kv-lora", default=True, show_default=True)
@click.option("--quantize/--no-quantize", default=True, show_default=True, help="Off: MAC's memory of floats.")
@click.option("--train-encoder/--freeze-encoder", default=True, show_default=True, help="Of learned codes.")
@click.option("--closed", is_flag=True, help="Train the closed book: the same parts and questions, no memory.")
@click.option(
    "--like", type=_FOLDER, default=None,
    help="Train exactly as long as the finished run in this folder, rates falling when its fell: an equal control.",
)  # fmt: skip
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of KV-LoRA; alpha is twice it.")
@click.option("--feed-forward", type=click.IntRange(1), default=768, show_default=True, help="Most hidden units.")
@click.option("--prefix-hidden", type=click.IntRange(1), default=768, show_default=True)
@click.option(
    "--backprop-keep", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Share of a step's passages that gradients flow into.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(0), default=None, help="End after so many steps, if that comes first.")
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Longest run; 0 leaves it to --steps.")
@click.option("--call-minutes", type=float, default=None, help="Stop this call early; call again to go on.")
@click.option("--documents", type=click.IntRange(2), default=128, show_default=True, help="Passages a step.")
@click.option("--questions", type=click.IntRange(1), default=2, show_default=True, help="Questions of each passage.")
@click.option("--banks", default="1,4,16,64", show_default=True, help="Sizes of banks; a step draws one.")
@click.option("--held-out-bank", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--grow-every", type=click.IntRange(0), default=0, show_default=True, help="Steps until the next bank size."
)
@click.option(
    "--cue-steps", type=click.IntRange(0), default=0, show_default=True, help="First steps that ask for words too."
)
@click.option("--standardize/--no-standardize", default=True, show_default=True, help="Center z before quantizing.")
@click.option("--slot-marks/--no-slot-marks", default=True, show_default=True, help="Tell codes of slots apart.")
@click.option("--lr", type=float, default=5e-4, show_default=True, help="Highest learning rate of the new parts.")
@click.option("--encoder-lr", type=float, default=5e-5, show_default=True)
@click.option("--lora-lr", type=float, default=7e-4, show_default=True)
@click.option("--codebook-lr", type=float, default=1e-3, show_default=True)
@click.option(
    "--burst", type=float, default=3.0, show_default=True,
    help="Largest gradient norm of a part of the model, in its own usual norms; 0: one common limit for all parts.",
)  # fmt: skip
@click.option("--beta2", type=click.FloatRange(0, 1, max_open=True), default=0.98, show_default=True, help="Of Adam.")
@click.option("--warm-up", type=click.IntRange(0), default=100, show_default=True, help="Steps.")
@click.option(
    "--cool-down", type=click.FloatRange(0, 1, max_open=True), default=0.2, show_default=True,
    help="Share of the run over which the learning rates fall to zero.",
)  # fmt: skip
@click.option("--look-every", type=click.IntRange(1), default=200, show_default=True, help="Steps.")
@click.option(
    "--flat", type=float, default=0.002, show_default=True,
    help="Stop when the held-out loss improved by no more than this share over the last third; 0: never.",
)  # fmt: skip
@click.option(
    "--keep-best/--keep-last", default=True, show_default=True,
    help="End with the weights of the lowest held-out loss, or with the last ones.",
)  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option(
    "--compile/--no-compile", "compile_layers", default=True, show_default=True, help="Compile layers on a GPU."
)
@click.option("--lambda-vq", type=float, default=1.0, show_default=True)
@click.option(
    "--evaluate", multiple=True, metavar="NAME=FILE", help="Sets of `mbc train paper-data` to answer at the end."
)
@click.option("--evaluate-questions", type=click.IntRange(1), default=500, show_default=True)
@click.option("--research", is_flag=True, help="Allow sources whose licence forbids giving the weights away.")
@click.option("--resume/--restart", default=True, show_default=True, help="Take up the checkpoint in --out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=_DEVICE, default="auto", show_default=True)
def paper_command(**options: Any) -> None:  # noqa: ANN401 (click's)
    """Train the paper's model on DATA, the file that `mbc train paper-data` wrote. `torchrun -m` runs it on many GPUs.

    Example: mbc train paper paper.safetensors --encoder ./MiniLM --lm ./SmolLM2 --out ./learned --minutes 20
    """
    from mbc_core.training.paper_command import PaperOptions, run_paper

    card = run_paper(PaperOptions(**options), _say)
    if card is not None:
        click.echo(json.dumps({name: card[name] for name in ("finished", "ended_by", "steps", "seconds")}))
