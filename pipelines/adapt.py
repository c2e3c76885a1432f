"""The second job: refresh the language model's KV-LoRA adapter against what a bank recalls now.

    python -m pipelines.adapt --bank my-bank --minutes 2

Wiring only: replay questions are asked of the bank, the live adapter is trained on what it recalls, the candidate is
stored with its figures before and after, and goes live when the rule in ``mbc_core.training.adapt`` allows it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.adapters import AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.errors import MbcError
from pipelines.encoding import resolve_device
from schemas.results import AdaptResult

if TYPE_CHECKING:
    from mbc_core.codes import Rotation
    from mbc_core.lexicon import Lexicon
    from mbc_core.memory import QuestionEncoder
    from mbc_core.reader.language_model import LanguageModel
    from mbc_core.training.adapt import AdaptRun


_FRESH_LR = 7e-4


def run_adapt(
    bank: Bank | str | Path,
    run: AdaptRun | None = None,
    *,
    device: str = "cpu",
    language_model: LanguageModel | None = None,
    adapter: Path | None = None,
    encoder: QuestionEncoder | None = None,
    lexicon: Lexicon | None = None,
    rotation: Rotation | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AdaptResult:
    """Train a candidate adapter, store it, and promote it if it is better.

    Args:
        bank: an open bank, or where one is.
        run: steps or minutes, batch, learning rate, seed; the defaults when None.
        device: ``cpu``, ``cuda`` or ``auto``.
        language_model: the base model, without adapter; SmolLM2-135M-Instruct when None.
        adapter: folder of the adapter to start from; the bank's live one, the shipped one or fresh weights when None.
            Fresh weights learn at the first training's rate.
        encoder, lexicon, rotation: those the bank was made with; the release's own when None.
        say: gets a line of progress now and then.

    Raises:
        UsageError: no bank is there, or it has nothing to adapt to.
        IncompatibleBank: it was made with other pieces.
        StorageError: the candidate cannot be written, or another promotion came between.
    """
    from mbc_core import defaults
    from mbc_core.memory import Memory, with_adapter
    from mbc_core.training.adapt import AdaptRun, adapt
    from mbc_core.training.replay_set import build_training_set

    opened, device = bank if isinstance(bank, Bank) else Bank.open(bank), resolve_device(device)
    run = run or AdaptRun()
    registry = AdapterRegistry(opened)
    memory = Memory.open(opened, encoder, device=device, lexicon=lexicon, rotation=rotation)
    base = language_model or defaults.language_model(device=device)
    since = _last_adapted(registry, base.digest)
    examples = build_training_set(memory, since=since, seed=run.seed)
    say(f"{len(examples)} questions from the bank's replay, asked of its {len(memory)} passages")
    model, before = with_adapter(base, opened, folder=adapter)
    if before is None:
        run = replace(run, lr=max(run.lr, _FRESH_LR))
        say(f"no adapter for {base.name} yet: fresh weights, learning rate {run.lr:g}")
    with tempfile.TemporaryDirectory(prefix="mbc-adapt-") as folder:
        done = adapt(examples, model, Path(folder), run, say=say)
        card = done.card() | {"started_from": before}
        candidate = registry.save_candidate_folder(Path(folder), card, base.digest)
    if done.promote:
        registry.promote(candidate, done.reason)
    return AdaptResult(
        candidate=candidate,
        promoted=done.promote,
        reason=done.reason,
        steps=done.steps,
        seconds=round(done.seconds, 1),
        before=done.before,
        after=done.after,
    )


def _last_adapted(registry: AdapterRegistry, base_digest: str) -> datetime | None:
    """When the live adapter was made: documents added since then are the new ones."""
    live = registry.live(base_digest)
    return None if live is None else datetime.fromisoformat(str(registry.info(live).card["created_at"]))


def run_of(steps: int | None, minutes: float | None, seed: int = 0) -> AdaptRun:
    """The run that the options ask for: ``--steps``, ``--minutes``, whichever comes first, or the default."""
    from mbc_core.training.adapt import AdaptRun

    plain = AdaptRun(seed=seed)
    return plain if steps is None and minutes is None else replace(plain, steps=steps, minutes=minutes)


def named_model(name: str | None, gguf_file: str | None, device: str) -> LanguageModel | None:
    """The base model that ``--lm`` names; None without it.

    Raises:
        AssetError: there is no such model.
    """
    if name is None:
        return None
    from mbc_core import defaults

    return defaults.language_model(name, gguf_file=gguf_file, device=resolve_device(device))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pipelines.adapt``: 0 done, 1 failed, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.adapt",
        description="Refresh the adapter of a bank's reader. It trains in this process; Beam's options are accepted "
        "(--name=value) so that one scheduler entry serves both jobs, and change nothing.",
    )
    parser.add_argument("--bank", required=True, help="local path, s3://… or gs://…")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--minutes", type=float, help="training time; with --steps, whichever comes first")
    parser.add_argument("--lm", help="another language model: a folder or a Hugging Face name")
    parser.add_argument("--gguf", help="name of the GGUF file inside the folder of --lm")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter to start from (default: the live one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cpu")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on standard output")
    given, _ = parser.parse_known_args(argv)
    try:
        run = run_of(given.steps, given.minutes, given.seed)
        result = run_adapt(
            given.bank,
            run,
            device=given.device,
            language_model=named_model(given.lm, given.gguf, given.device),
            adapter=given.adapter,
            say=lambda line: print(line, file=sys.stderr),
        )
    except MbcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    shown = json.dumps(result) if given.as_json else "\n".join(f"{name}: {value}" for name, value in result.items())
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
