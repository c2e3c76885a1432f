"""The second job: refresh the language model's KV-LoRA adapter against what a bank recalls now.

    python -m pipelines.adapt --bank my-bank --minutes 2

or in two steps, which may run on two machines, the second one without a bank:

    python -m pipelines.adapt --bank my-bank --write-set tonight.jsonl.gz
    python -m pipelines.adapt --from-set tonight.jsonl.gz --out candidate --minutes 2 --checkpoint work
    mbc adapters add candidate --bank my-bank

Wiring only: replay questions are asked of the bank, the live adapter is trained on what it recalls, the candidate is
stored with the decision of the gate (:mod:`mbc_core.training.gate`), and goes live when that lets it pass.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbc_core.errors import MbcError, UsageError
from pipelines.adapt_options import AdaptSettings, parse
from pipelines.adapt_start import WEIGHTS, adapt_base, beside, live_beside, named_model, resolve_device, start_from
from schemas.results import AdaptResult, SetResult

# The second step runs where neither faiss nor deltalake nor Beam is: what needs them is imported where it is used.
if TYPE_CHECKING:
    from mbc_core.bank import Bank
    from mbc_core.codes import Rotation
    from mbc_core.lexicon import Lexicon
    from mbc_core.memory import Memory, QuestionEncoder
    from mbc_core.reader.language_model import LanguageModel
    from mbc_core.training.adapt import Adaptation, AdaptRun, Start
    from mbc_core.training.gate import GateRule
    from mbc_core.training.set_file import TrainingSet

Say = Callable[[str], None]
_FRESH_LR = 7e-4
_SET = "set.jsonl.gz"


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
    as_of: datetime | None = None,
    rule: GateRule | None = None,
    checkpoint: Path | None = None,
    of_set: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> AdaptResult:
    """Train a candidate adapter, store it, and promote it if it is better: both steps in one process.

    Args:
        bank: an open bank, or where one is.
        run: steps or minutes, batch, learning rate, seed; the defaults when None.
        device: ``cpu``, ``cuda`` or ``auto``.
        language_model: the base model, without adapter; SmolLM2-135M-Instruct when None.
        adapter: folder of the adapter to start from; the bank's live one, the shipped one or fresh weights when None.
            Fresh weights learn at the first training's rate.
        encoder, lexicon, rotation: those the bank was made with; the release's own when None.
        as_of: the instant whose bank is asked; None: now.
        rule: of the gate.
        checkpoint: folder that keeps the set and the run's state until the candidate is stored, and that a killed run
            goes on from.
        of_set: further arguments of :func:`mbc_core.training.replay_set.build_training_set`.
        say: gets a line of progress now and then.

    Raises:
        UsageError: no bank is there, or it has nothing to adapt to.
        IncompatibleBank: it was made with other pieces.
        LostRace: another job promoted an adapter meanwhile; the candidate is stored.
        StorageError: the candidate cannot be written.
    """
    from mbc_core import defaults
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.bank import Bank
    from mbc_core.memory import Memory
    from mbc_core.training.adapt import AdaptRun, adapt
    from mbc_core.training.candidate import add_candidate

    opened, device = bank if isinstance(bank, Bank) else Bank.open(bank), resolve_device(device)
    run, moment = run or AdaptRun(), as_of or datetime.now(UTC)
    registry = AdapterRegistry(opened)
    base = language_model or defaults.language_model(device=device)
    found = _kept_set(checkpoint, opened, base.digest, run.seed, say)
    if found is None:
        memory = Memory.open(opened, encoder, as_of=moment, device=device, lexicon=lexicon, rotation=rotation)
        found = make_set(memory, moment, base_digest=base.digest, seed=run.seed, of_set=of_set, say=say)
        if checkpoint is not None:
            from mbc_core.training.set_file import save_set

            save_set(checkpoint / _SET, found)
    with tempfile.TemporaryDirectory(prefix="mbc-adapt-") as folder:
        place = Path(folder)
        live = found.header.live.get(base.digest)
        loaded = adapter or (registry.load(live["version"], place) if live is not None else None)
        model, start = start_from(base, found.header, loaded)
        run = _paced(run, start, base.name, say)
        done = adapt(found, model, place / "candidate", run, rule=rule, start=start, checkpoint=checkpoint, say=say)
        added = add_candidate(opened, place / "candidate", rule)
    if checkpoint is not None:
        (checkpoint / _SET).unlink(missing_ok=True)
    return {**_result(done, added["candidate"]), "promoted": added["promoted"], "reason": added["reason"],
            "sentence": added["sentence"]}  # fmt: skip


def make_set(
    memory: Memory,
    moment: datetime,
    *,
    base_digest: str | None = None,
    seed: int = 0,
    of_set: Mapping[str, float] | None = None,
    say: Say = lambda line: None,
) -> TrainingSet:
    """The first step: what the bank recalls for its replay questions, and which adapters were live then.

    A bank without a canary set gets one from its own held-out questions, if it has enough of them.

    Args:
        memory: opened as of ``moment``.
        base_digest: of the language model; documents count as new since its live adapter's instant. None: since the
            newest instant of all live adapters.
        of_set: further arguments of :func:`mbc_core.training.replay_set.build_training_set`.
    """
    from mbc_core.canary import draw_from_replay, load_canary, save_canary
    from mbc_core.memory import microseconds
    from mbc_core.training.replay_set import build_training_set

    bank, canary = memory.bank, load_canary(memory.bank)
    if canary is None and bank.manifest.words and (drawn := draw_from_replay(memory, moment)):
        path = save_canary(bank, drawn)
        say(f"{len(drawn)} of the bank's held-out questions are its canary set from now on: {path}")
        canary = load_canary(bank)
    live = _live_adapters(bank, microseconds(moment) or 0)
    instants = [one["instant"] for digest, one in live.items() if base_digest in (None, digest)]
    since = max((datetime.fromisoformat(one) for one in instants), default=None)
    given: dict[str, Any] = dict(of_set or {})
    found = build_training_set(memory, as_of=moment, since=since, canary=canary, seed=seed, **given)
    told = {digest: {name: one[name] for name in ("version", "weights_sha256")} for digest, one in live.items()}
    counts = ", ".join(f"{count} {split}" for split, count in found.counts.items())
    say(f"{len(found.examples)} questions from the bank's replay ({counts}), asked of its {len(memory)} passages")
    return replace(found, header=replace(found.header, live=told))


def write_set(
    settings: AdaptSettings,
    say: Say = lambda line: None,
    *,
    encoder: QuestionEncoder | None = None,
    lexicon: Lexicon | None = None,
    rotation: Rotation | None = None,
) -> SetResult:
    """The first step as a file; the live adapters are copied beside it, into ``<file>.adapter/<version>``.

    Args:
        encoder, lexicon, rotation: those the bank was made with; the release's own when None.
    """
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.bank import Bank
    from mbc_core.memory import Memory
    from mbc_core.training.set_file import save_set

    began, moment = time.monotonic(), settings.as_of or datetime.now(UTC)
    bank, target = Bank.open(settings.bank or ""), settings.write_set or Path(_SET)
    device = resolve_device(settings.device)
    memory = Memory.open(bank, encoder, as_of=moment, device=device, lexicon=lexicon, rotation=rotation)
    found = make_set(memory, moment, seed=settings.seed, of_set=settings.of_set(), say=say)
    registry = AdapterRegistry(bank)
    folders = [registry.load(one["version"], beside(target)) for one in found.header.live.values()]
    save_set(target, found)
    return {
        "set": str(target),
        "digest": found.digest,
        "bank": found.header.bank,
        "as_of": found.header.as_of,
        "questions": found.counts,
        "adapters": [str(one) for one in folders],
        "seconds": round(time.monotonic() - began, 1),
    }


def adapt_from_set(
    settings: AdaptSettings, language_model: LanguageModel | None = None, say: Say = lambda line: None
) -> AdaptResult:
    """The second step: torch and peft, a set and a folder for the candidate; no bank.

    Raises:
        DamagedFile: the set or the adapter cannot be read.
        UsageError: the live adapter that the set names is not there.
    """
    from mbc_core.training.adapt import adapt
    from mbc_core.training.set_file import load_set

    source, out = settings.from_set or Path(_SET), settings.out or Path("candidate")
    found, device = load_set(source), resolve_device(settings.device)
    base = language_model or adapt_base(settings.lm, settings.gguf, device)
    model, start = start_from(base, found.header, settings.adapter or live_beside(source, found.header, base.digest))
    run = _paced(settings.run(), start, base.name, say)
    done = adapt(
        found, model, out, run, rule=settings.rule(), start=start, checkpoint=settings.checkpoint, say=say
    )  # fmt: skip
    say(f"the candidate is in {out}; take it into the bank with: mbc adapters add {out} --bank URI")
    return _result(done, str(out))


def run_job(settings: AdaptSettings, say: Say = lambda line: None) -> AdaptResult | SetResult:
    """Do what the options ask for.

    Raises:
        UsageError: they do not belong together.
    """
    settings.check()
    if settings.from_set is not None:
        return adapt_from_set(settings, say=say)
    if settings.write_set is not None:
        return write_set(settings, say)
    return run_adapt(
        settings.bank or "",
        settings.run(),
        device=settings.device,
        language_model=named_model(settings.lm, settings.gguf, settings.device),
        adapter=settings.adapter,
        as_of=settings.as_of,
        rule=settings.rule(),
        checkpoint=settings.checkpoint,
        of_set=settings.of_set(),
        say=say,
    )


def _result(done: Adaptation, candidate: str) -> AdaptResult:
    return AdaptResult(
        candidate=candidate,
        promoted=False,
        reason=done.decision.reason,
        sentence=done.decision.sentence,
        passed=done.decision.promote,
        steps=done.steps,
        best_step=done.best_step,
        seconds=round(done.seconds, 1),
        before=done.before,
        after=done.after,
        held_out=done.held_out,
    )


def _paced(run: AdaptRun, start: Start, name: str, say: Say) -> AdaptRun:
    """Fresh weights learn at the first training's rate."""
    if start.weights_sha256 is not None:
        return run
    faster = replace(run, lr=max(run.lr, _FRESH_LR))
    say(f"no adapter for {name} yet: fresh weights, learning rate {faster.lr:g}")
    return faster


def _live_adapters(bank: Bank, moment: int) -> dict[str, dict[str, str]]:
    """Base model's digest → version, digest of the weights and instant of the adapter that was live then."""
    from mbc_core.adapters import LIVE, AdapterRegistry

    registry, found = AdapterRegistry(bank), {}
    for base in sorted(set(bank.read(LIVE, ["base_digest"])["base_digest"].to_pylist())):
        version = registry.live(base, moment)
        if version is not None:
            card = registry.info(version).card
            instant = str(card.get("instant") or card["created_at"])
            found[base] = {"version": version, "weights_sha256": card["files"][WEIGHTS], "instant": instant}
    return found


def _kept_set(checkpoint: Path | None, bank: Bank, base_digest: str, seed: int, say: Say) -> TrainingSet | None:
    """The set of the run that a checkpoint's folder holds; one that is older than the live adapter goes."""
    if checkpoint is None or not (checkpoint / _SET).exists():
        return None
    from mbc_core.adapters import AdapterRegistry
    from mbc_core.training.replay_set import bank_name
    from mbc_core.training.set_file import load_set

    found = load_set(checkpoint / _SET)
    live = found.header.live.get(base_digest, {}).get("version")
    if found.header.bank != bank_name(bank) or found.header.seed != seed:
        raise UsageError(
            "the checkpoint belongs to another run",
            value=str(checkpoint),
            cause="it was written for another bank or another --seed",
            fix="name another folder, or remove this one to start again",
        )
    if live != AdapterRegistry(bank).live(base_digest):
        say(f"the unfinished run of {found.header.as_of} is given up: another adapter is live by now")
        _remove_run(checkpoint)
        return None
    say(f"taking up the unfinished run of {found.header.as_of}")
    return found


def _remove_run(checkpoint: Path) -> None:
    state = checkpoint / "state.json"
    names = list(json.loads(state.read_text())["files"].values()) if state.exists() else []
    for name in ("state.json", _SET, *names):
        (checkpoint / name).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pipelines.adapt``: 0 done, 1 failed, 2 wrong use."""
    settings, as_json = parse(argv)
    try:
        result = run_job(settings, say=lambda line: print(line, file=sys.stderr))
    except MbcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result) if as_json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
