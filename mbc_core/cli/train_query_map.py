"""`mbc train query-map`: the question's side of recall."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("query-map")
@click.argument("prepared", type=_FOLDER)
@click.option("--out", "out_dir", type=click.Path(path_type=Path), required=True, help="Folder for maps and cards.")
@click.option(
    "--weights",
    "weights_dir",
    type=_FOLDER,
    default=None,
    help="Folder with rotation and codebooks of `mbc train codebook`; the release's own without.",
)
@click.option("--slots", type=int, multiple=True, default=(12, 24), show_default=True, help="T; may be repeated.")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=384, show_default=True, help="Questions a step.")
@click.option("--decay", type=float, default=0.05, show_default=True, help="How hard the matrix is held near zero.")
@click.option("--measure", type=_FOLDER, multiple=True, help="Prepared folder to measure recall on; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True)
def query_map_command(
    prepared: Path,
    out_dir: Path,
    weights_dir: Path | None,
    slots: tuple[int, ...],
    steps: int,
    batch: int,
    decay: float,
    measure: tuple[Path, ...],
    seed: int,
) -> None:
    """Fit the map of questions on PREPARED, the folder that `mbc train prepare` wrote: no code and no bank changes.

    Example: mbc train query-map ./prepared --out mbc_core/weights --measure ./squad_dev
    """
    from mbc_core import defaults
    from mbc_core.codebook.files import Codebook
    from mbc_core.codes import Rotation
    from mbc_core.training.query_map import QueryMapRecipe, train_query_maps

    if weights_dir is None:
        rotation, books = defaults.rotation(), {count: defaults.codebook(count) for count in slots}
    else:
        rotation = Rotation.load(weights_dir / defaults.ROTATION)
        files = {count: weights_dir / f"codebook_t{count}.safetensors" for count in slots}
        books = {count: Codebook.from_bytes(file.read_bytes(), str(file)) for count, file in files.items()}
    asked = "".join(f" --slots {count}" for count in slots) + "".join(f" --measure {one.name}" for one in measure)
    cards = train_query_maps(
        prepared,
        rotation,
        books,
        out_dir,
        QueryMapRecipe(steps=steps, batch=batch, decay=decay, seed=seed),
        measure={one.name: one for one in measure},
        command=f"mbc train query-map PREPARED --out OUT --steps {steps} --batch {batch} --decay {decay}"
        f" --seed {seed}{asked}",
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(json.dumps(cards))
