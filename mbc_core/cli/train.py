"""`mbc train …`: make the small weights (lexicon, salience, codebook, reader) from data given as arguments."""

from __future__ import annotations

from pathlib import Path

import click

from mbc_core.cli.train_attend import attend_command
from mbc_core.cli.train_encoder import lexicon_command, prepare_command, salience_command, word_code_command
from mbc_core.cli.train_paper import paper_command, paper_data_command
from mbc_core.cli.train_query_map import query_map_command
from mbc_core.cli.train_reader import reader_command

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def train() -> None:
    """Train the project's own small weights, each written with a card."""


train.add_command(reader_command)
train.add_command(attend_command)


train.add_command(lexicon_command)
train.add_command(salience_command)
train.add_command(prepare_command)
train.add_command(paper_data_command)
train.add_command(paper_command)
train.add_command(word_code_command)
train.add_command(query_map_command)


@train.command("codebook")
@click.argument("prepared", type=_FOLDER)
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for the weights.")
@click.option("--slots", type=int, multiple=True, default=(12, 24), show_default=True, help="T; may be repeated.")
@click.option("--codewords", type=click.IntRange(1, 512), default=512, show_default=True, help="K.")
@click.option("--iterations", type=click.IntRange(1), default=100, show_default=True, help="Most k-means passes.")
@click.option(
    "--rotation",
    type=click.Choice(["spread", "random"]),
    default="spread",
    show_default=True,
    help="spread: each slot gets its share of every principal component, for the largest T.",
)
@click.option("--measure", type=_FOLDER, multiple=True, help="Prepared folder to measure recall on; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
def codebook_command(
    prepared: Path,
    out_dir: Path,
    slots: tuple[int, ...],
    codewords: int,
    iterations: int,
    rotation: str,
    measure: tuple[Path, ...],
    seed: int,
    device: str,
) -> None:
    """Fit codebook version 0 and its rotation on PREPARED, the folder that `mbc train prepare` wrote.

    Example: mbc train codebook ./prepared --out mbc_core/weights --slots 12 --slots 24
    """
    from mbc_core.training.codebook import read_prepared, train_codebook
    from mbc_core.training.recall_codebook import measure_recall, spread_rotation

    embeddings, held_out, sources = read_prepared(prepared)
    train_codebook(
        embeddings,
        out_dir,
        slots=slots,
        codewords=codewords,
        seed=seed,
        iterations=iterations,
        device=device,
        held_out=held_out,
        sources=sources,
        rotation=spread_rotation(embeddings, max(slots), seed) if rotation == "spread" else None,
        measured=(lambda *weights: measure_recall({one.name: one for one in measure}, *weights)) if measure else None,
        progress=lambda line: click.echo(line, err=True),
    )


if __name__ == "__main__":
    train()
