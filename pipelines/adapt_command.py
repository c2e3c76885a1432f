"""`mbc adapt`: the same job as ``python -m pipelines.adapt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mbc_core.cli.options import Time, device_option, json_option, seed_option
from mbc_core.cli.output import note, only_json, out, print_json, table

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Refresh the reader's adapter against what the bank recalls now, and promote it if the gate lets it pass.

In two steps, which may run on two machines: --write-set writes what the bank recalls; --from-set trains on that file
without a bank, with torch and peft alone; `mbc adapters add` takes the candidate into the bank.

Example: mbc adapt --bank my-bank --minutes 10 --checkpoint work

\b
In two steps:
  mbc adapt --bank my-bank --write-set tonight.jsonl.gz
  mbc adapt --from-set tonight.jsonl.gz --out candidate --minutes 2 --device cuda
  mbc adapters add candidate --bank my-bank
"""

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(help=HELP)
@click.option("--bank", metavar="URI", help="The bank: a folder, s3://bucket/path or gs://bucket/path.")
@click.option("--write-set", type=_FILE, help="First step: only write what the bank recalls to this file.")
@click.option("--as-of", type=Time(), help="Ask the bank as it stood then (ISO 8601; UTC if no zone).")
@click.option("--from-set", type=_FILE, help="Second step, without a bank: train on this file.")
@click.option("--out", type=_FOLDER, help="Second step: where the candidate goes.")
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the adapter to start from, as `mbc train reader` writes it (default: the bank's live one).",
)
@click.option("--checkpoint", type=_FOLDER, help="Keep the run's state there; killed, the same command goes on.")
@click.option("--steps", type=click.IntRange(1), help="Training steps.")
@click.option("--minutes", type=click.FloatRange(0.01), help="Training time; with --steps, whichever comes first.")
@click.option("--batch", type=click.IntRange(1), help="Questions a step (default 16).")
@click.option(
    "--patience", type=click.IntRange(0), help="Looks without a lower loss before stopping (4); 0 never stops early."
)
@click.option("--evaluate-every", type=click.IntRange(1), help="Steps between two looks at held-back questions (10).")
@click.option("--questions", type=click.IntRange(1), help="Most questions to train on (2048).")
@click.option("--held-out", type=click.IntRange(2), help="Most held-out questions, half about new documents (800).")
@click.option("--new-share", type=click.FloatRange(0, 1), help="Training questions from new documents (0.5).")
@click.option(
    "--min-questions",
    type=click.IntRange(1),
    help="Fewest new and old questions the gate takes (300). Less is for demonstrations, and noted on the card.",
)
@click.option("--lm", metavar="NAME", help="Another language model: a folder or a Hugging Face name.")
@click.option("--gguf", metavar="FILE", help="Name of the GGUF file inside the folder of --lm.")
@seed_option
@device_option
@json_option
def adapt(as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click hands over every option by its name
    """See HELP."""
    with only_json(as_json) as stream:
        from pipelines.adapt import run_job
        from pipelines.adapt_options import AdaptSettings

        result = run_job(AdaptSettings(**options), note)
        if as_json:
            print_json(result, stream)
            return
    if "set" in result:
        _show_set(result, out())
    else:
        show_adapt(result, out())


def show_adapt(result: Mapping[str, Any], console: Console) -> None:
    """Before, after, and what became of the candidate."""
    before, after, asked = result["before"], result["after"], result["held_out"]
    rows = [
        [f"{asked[name]} held-out questions about {name} documents", f"{before[key]:.1f}", f"{after[key]:.1f}"]
        for name, key in (("new", "new_f1"), ("old", "old_f1"))
    ]
    console.print(table(None, ["F1", "before", "after"], rows))
    fate = "promoted, it is live now" if result["promoted"] else "not promoted, the adapter before it stays live"
    if result["passed"] and not result["promoted"]:
        fate = "it passed the gate, and is live once it is added to the bank"
    console.print(
        f"Adapter {result['candidate']}: {result['steps']} steps in {result['seconds']:.0f} s, weights of step"
        f" {result['best_step']}; {fate}.",
        markup=False,
    )
    console.print(f"Gate: {result['reason']}. {result['sentence']}", markup=False)


def _show_set(result: Mapping[str, Any], console: Console) -> None:
    counts = ", ".join(f"{count:,} {split}" for split, count in result["questions"].items())
    console.print(
        f"{result['set']}: {counts}; the bank as of {result['as_of']}; {result['seconds']:.1f} s", markup=False
    )
    for folder in result["adapters"]:
        console.print(f"live adapter {folder}: goes with it", markup=False)
