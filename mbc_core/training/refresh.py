"""Both steps of adaptation on one machine: bank → training set → candidate → registry, live if the rule says so."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core import defaults
from mbc_core.adapters import AdapterRegistry
from mbc_core.memory import SHIPPED_ADAPTER, Memory, with_adapter
from mbc_core.training.adapt import Adaptation, AdaptRun, adapt
from mbc_core.training.replay_set import HELD_OUT, TRAIN, Example, build_training_set, save_examples
from schemas.results import AdaptResult

if TYPE_CHECKING:
    from mbc_core.reader.language_model import LanguageModel


def refresh_adapter(
    memory: Memory,
    run: AdaptRun | None = None,
    *,
    language_model: LanguageModel | None = None,
    train: int = TRAIN,
    held_out: int = HELD_OUT,
    device: str = "cpu",
    keep_examples: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AdaptResult:
    """Train the adapter that reads ``memory``'s bank on what the bank recalls now, and judge it.

    Args:
        language_model: the base, without adapter; SmolLM2-135M-Instruct when None. Its live adapter, or the shipped
            one, is trained on.
        train, held_out: most questions to train on, and to judge with.
        keep_examples: also write the training set here, to adapt elsewhere.
        say: told the progress, a line at a time.

    Returns:
        what ``mbc adapt --json`` prints.

    Raises:
        UsageError: the bank has no word codes or no replay questions, or the run has no end.
        StorageError: the candidate cannot be written.
    """
    bank = memory.bank
    base = language_model or defaults.language_model(device=device)
    reader, name = with_adapter(base, bank)
    registry = AdapterRegistry(bank)
    since = _since(registry, name)
    examples = build_training_set(memory, train=train, held_out=held_out, since=since, seed=run.seed if run else 0)
    if keep_examples is not None:
        save_examples(keep_examples, examples)
    say(f"{_count(examples)}; starting from {name or 'fresh weights'}")
    until = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as place:
        made = adapt(examples, reader, Path(place), run, say=say)
        card = made.card() | {"parent": name, "until": until.isoformat(timespec="seconds"), "base": base.name}
        version = registry.save_candidate_folder(made.folder, card, base.digest)
    if made.promote:
        registry.promote(version, made.reason)
    return _result(version, made)


def _since(registry: AdapterRegistry, name: str | None) -> datetime | None:
    """When the live adapter last looked at the bank; None for the shipped one or none."""
    if name is None or name == SHIPPED_ADAPTER:
        return None
    told = registry.info(name).card.get("until")
    return datetime.fromisoformat(told) if told else None


def _result(version: str, made: Adaptation) -> AdaptResult:
    return {
        "candidate": version,
        "promoted": made.promote,
        "reason": made.reason,
        "steps": made.steps,
        "seconds": round(made.seconds, 1),
        "before": made.before,
        "after": made.after,
    }


def _count(examples: list[Example]) -> str:
    counts = {split: sum(one.split == split for one in examples) for split in ("train", "new", "old")}
    return f"{counts['train']} questions to train on, {counts['new']} new and {counts['old']} old ones held out"
