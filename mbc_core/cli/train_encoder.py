"""`mbc train lexicon|salience|prepare|word-code`: what chooses and spells word codes, and data for the rest."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DEVICE = click.Choice(["auto", "cpu", "cuda"])
_files = click.argument("files", nargs=-1, required=True, type=_FILE)


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("lexicon")
@_files
@click.option("--extra-text", multiple=True, type=_FILE, help='JSON {title: {"extract": text}} to learn words from.')
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File: ….json or ….json.gz.")
@click.option("--entries", type=click.IntRange(257), default=61_440, show_default=True)
def lexicon_command(files: tuple[Path, ...], extra_text: tuple[Path, ...], out: Path, entries: int) -> None:
    """Train the lexicon (word codes) on the passages of FILES, JSON Lines with doc_id, text and qas.

    Example: mbc train lexicon qa_train.jsonl.gz --out lexicon.json.gz
    """
    from mbc_core.training.data import load_extracts, load_training_passages
    from mbc_core.training.lexicon import train_lexicon

    passages = [one for one in load_training_passages(files, log=_say) if one.split == "train"]
    texts = [one.text for one in passages] + [text for file in extra_text for text in load_extracts(file)]
    sources = sorted({one.source for one in passages}) + [file.name for file in extra_text]
    click.echo(json.dumps(train_lexicon(texts, out, entries, sources=sources, log=_say)))


@click.command("salience")
@_files
@click.option("--encoder", type=_FOLDER, required=True, help="Folder of the sentence encoder.")
@click.option("--lexicon", "lexicon_file", type=_FILE, required=True, help="Lexicon file, for the measurements.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the head.")
@click.option("--dev", multiple=True, type=_FILE, help="Files to measure on; may be repeated.")
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Passages a step.")
@click.option("--minutes", type=float, default=None, help="End after so long, if that comes first.")
@click.option("--lr", type=float, default=4e-4, show_default=True, help="Highest learning rate.")
@click.option("--dropout", type=float, default=0.1, show_default=True)
@click.option("--layers", default="2,4,6", show_default=True, help="Hidden states of the encoder that the head reads.")
@click.option("--features/--no-features", default=True, show_default=True, help="Read capitals, marks and the like.")
@click.option("--evaluate-every", type=click.IntRange(1), default=80, show_default=True, help="Steps.")
@click.option("--resume/--restart", default=True, show_default=True, help="Take up the checkpoint in --out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=_DEVICE, default="auto", show_default=True)
def salience_command(
    files: tuple[Path, ...],
    encoder: Path,
    lexicon_file: Path,
    out_dir: Path,
    dev: tuple[Path, ...],
    steps: int,
    batch: int,
    minutes: float | None,
    lr: float,
    dropout: float,
    layers: str,
    features: bool,
    evaluate_every: int,
    resume: bool,
    seed: int,
    device: str,
) -> None:
    """Train the word salience head on FILES, JSON Lines with doc_id, text and qas.

    Example: mbc train salience qa_train.jsonl.gz --encoder ./MiniLM --lexicon lexicon.json.gz --out ./salience
    """
    from mbc_core.cli.options import resolve_device
    from mbc_core.encoder.salience_head import SalienceShape
    from mbc_core.encoder.word_features import SIZES
    from mbc_core.lexicon import Lexicon
    from mbc_core.training.data import load_dev_passages, load_training_passages
    from mbc_core.training.salience import SalienceRecipe, train_salience

    card = train_salience(
        encoder,
        load_training_passages(files, log=_say),
        out_dir,
        lexicon=Lexicon.load(lexicon_file),
        recipe=SalienceRecipe(
            steps=steps,
            batch=batch,
            seed=seed,
            minutes=minutes,
            learning_rate=lr,
            dropout=dropout,
            evaluate_every=evaluate_every,
            shape=SalienceShape(
                layers=tuple(int(layer) for layer in layers.split(",")), features=SIZES if features else ()
            ),
        ),
        dev=load_dev_passages(dev, log=_say) if dev else (),
        device=resolve_device(device),
        resume=resume,
        log=_say,
    )
    click.echo(json.dumps(card))


@click.command("prepare")
@_files
@click.option("--encoder", type=_FOLDER, required=True, help="Folder of the sentence encoder.")
@click.option("--salience", type=_FILE, default=None, help="Salience head; without one there are no words.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the three files.")
@click.option("--dev", is_flag=True, help="FILES are for measuring: every date, rows without a split or marked dev.")
@click.option("--source", multiple=True, help="With --dev: keep only this source; may be repeated.")
@click.option("--device", type=_DEVICE, default="auto", show_default=True)
def prepare_command(
    files: tuple[Path, ...],
    encoder: Path,
    salience: Path | None,
    out_dir: Path,
    dev: bool,
    source: tuple[str, ...],
    device: str,
) -> None:
    """Encode FILES once for the trainings that follow: words with scores, embeddings, questions.

    Example: mbc train prepare qa_train.jsonl.gz --encoder ./MiniLM --salience salience.safetensors --out ./prepared
    """
    from mbc_core.cli.options import resolve_device
    from mbc_core.training.data import load_dev_passages, load_training_passages
    from mbc_core.training.prepare import prepare

    if source and not dev:
        raise click.UsageError("--source goes with --dev")
    passages = load_dev_passages(files, log=_say) if dev else load_training_passages(files, log=_say)
    chosen = [one for one in passages if not source or one.source in source]
    click.echo(json.dumps(prepare(encoder, salience, chosen, out_dir, resolve_device(device), log=_say)))


@click.command("word-code")
@click.argument("prepared", type=_FOLDER)
@click.option("--lexicon", "lexicon_file", type=_FILE, required=True, help="Lexicon whose entries stay.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File: ….json or ….json.gz.")
@click.option("--classes", type=click.IntRange(0), default=256, show_default=True, help="Of entries; 0: none.")
@click.option("--followers/--no-followers", default=True, show_default=True, help="Lists of what often comes next.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Count only so many passages, drawn evenly.")
def word_code_command(
    prepared: Path, lexicon_file: Path, out: Path, classes: int, followers: bool, limit: int | None
) -> None:
    """Give the lexicon's entries the bits that suit the words which the passages of PREPARED keep.

    A word's bits depend on what kind of word stands before it: entries are sorted into classes, found from the texts,
    and words that often follow one another are written as such (without classes none are).
    Banks made with the lexicon as it was keep it: its digest, and so their word codes, are not this one's.

    Example: mbc train word-code ./prepared --lexicon lexicon.json.gz --out lexicon-coded.json.gz
    """
    import numpy as np

    from mbc_core.lexicon import Lexicon
    from mbc_core.training.prepared import load_prepared
    from mbc_core.training.word_code import train_word_code, write_card

    data = load_prepared(prepared).split("train")
    if limit is not None:
        data = data.take(np.sort(np.random.default_rng(0).permutation(len(data))[:limit]))
    before = Lexicon.load(lexicon_file)
    coded = train_word_code(data, before, classes=classes, followers=followers, say=_say)
    coded.save(out)
    click.echo(json.dumps(write_card(out, lexicon_file, coded, data)))
