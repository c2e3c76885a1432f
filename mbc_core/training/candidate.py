"""A candidate's folder, as the second step leaves it and the bank takes it in.

Beside the two files of the adapter it holds ``scores.json``, the F1 of every question the gate asked, before and
after, and ``candidate.json``, written last: the card and the digests of the other three. The gate decides again where
the candidate is taken in, from those scores and with that place's rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.training.gate import Decision, GateRule, PerQuestion, decide, mean_scores
from mbc_core.training.set_file import JUDGED
from schemas.results import AddResult

if TYPE_CHECKING:
    from mbc_core.bank import Bank

CANDIDATE, SCORES = "candidate.json", "scores.json"
FORMAT = 1
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class CandidateFolder:
    """What a folder holds; every digest was checked.

    Attributes:
        card: how the candidate was made; JSON values.
        base_digest: of the language model it belongs to.
        before, after: F1 of each question in points. documents: of the same questions.
    """

    card: dict[str, Any]
    base_digest: str
    before: PerQuestion
    after: PerQuestion
    documents: Mapping[str, Sequence[str]]


def write_candidate(
    folder: Path,
    card: Mapping[str, Any],
    base_digest: str,
    before: PerQuestion,
    after: PerQuestion,
    documents: Mapping[str, Sequence[str]],
) -> None:
    """Write ``scores.json`` and ``candidate.json`` beside an adapter's files that are there already."""
    scores = {
        split: {"before": before[split].tolist(), "after": after[split].tolist(), "documents": list(documents[split])}
        for split in JUDGED
    }
    _write_whole(folder / SCORES, scores)
    files = {name: _sha256(folder / name) for name in (*_ADAPTER_FILES, SCORES)}
    _write_whole(folder / CANDIDATE, {"format": FORMAT, "base_digest": base_digest, "card": dict(card), "files": files})


def read_candidate(folder: Path) -> CandidateFolder:
    """Read a candidate's folder.

    Raises:
        UsageError: it is no such folder.
        DamagedFile: a file is missing, or is not the one that ``candidate.json`` records.
    """
    if not (folder / CANDIDATE).is_file():
        raise UsageError(
            "this is not a candidate's folder",
            value=str(folder),
            cause=f"it lacks {CANDIDATE}: the second step was interrupted, or the path is wrong",
            fix="name the folder that `mbc adapt --from-set FILE --out FOLDER` wrote",
        )
    try:
        told = json.loads((folder / CANDIDATE).read_text("utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}, this release reads {FORMAT}")
        if set(told["files"]) != {*_ADAPTER_FILES, SCORES}:
            raise ValueError(f"it names {sorted(told['files'])}")
        for name, digest in told["files"].items():
            if _sha256(folder / name) != digest:
                raise ValueError(f"{name} does not match its digest")
        scores = json.loads((folder / SCORES).read_text("utf-8"))
        before, after = (
            {str(split): np.array(scores[split][side], np.float64) for split in JUDGED} for side in ("before", "after")
        )
        documents = {str(split): [str(one) for one in scores[split]["documents"]] for split in JUDGED}
        return CandidateFolder(dict(told["card"]), str(told["base_digest"]), before, after, documents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(
            "the candidate's folder cannot be used",
            value=str(folder),
            cause=f"{type(error).__name__}: {error}",
            fix="copy the whole folder again, or train the candidate again",
        ) from error


def add_candidate(bank: Bank, folder: Path, rule: GateRule | None = None, *, promote: bool = True) -> AddResult:
    """Take a candidate into the bank's registry with the gate's decision, and promote it when the gate lets it pass.

    Args:
        folder: as :func:`mbc_core.training.adapt.adapt` leaves it.
        rule: of the gate; the decision is made again with it and noted on the card.
        promote: False only records the candidate.

    Raises:
        UsageError: it was trained for another bank.
        DamagedFile: a file does not match its digest.
        LostRace: it passed the gate, but another adapter than the one it was compared with is live by now. It stays a
            candidate.
    """
    from mbc_core.adapters import AdapterRegistry

    found = read_candidate(folder)
    _require_same_bank(bank, found)
    decision = _decide(bank, found, rule or GateRule())
    registry = AdapterRegistry(bank)
    card = found.card | {"decision": decision.to_json()}
    version = registry.save_candidate_folder(folder, card, found.base_digest)
    if decision.promote and promote:
        start = found.card.get("started_from")
        compared = start if start in registry.versions() else None  # shipped, a folder, or fresh weights
        registry.promote(version, decision.sentence, expected=compared)
    return AddResult(
        candidate=version,
        promoted=decision.promote and promote,
        reason=decision.reason,
        sentence=decision.sentence,
        before=mean_scores(found.before),
        after=mean_scores(found.after),
    )


def _decide(bank: Bank, found: CandidateFolder, rule: GateRule) -> Decision:
    from mbc_core.canary import load_canary

    decision = decide(found.before, found.after, found.documents, rule)
    canary = load_canary(bank)
    asked = found.card.get("canary") or ""
    if decision.promote and canary is not None and canary.rows and canary.name != asked:
        told = f"it was asked the canary set {asked or '(none)'}, the bank's is {canary.name}: adapt again"
        return Decision(False, "canary", told, decision.intervals, decision.questions, rule)
    return decision


def _require_same_bank(bank: Bank, found: CandidateFolder) -> None:
    from mbc_core.training.replay_set import bank_name

    wanted = bank_name(bank)
    if found.card.get("bank") != wanted:
        raise UsageError(
            "the candidate was trained for another bank",
            value=found.card.get("bank"),
            cause=f"this bank is {wanted}; an adapter is judged on the questions of the bank it was made for",
            fix="check --bank, or make a training set from this bank: mbc adapt --bank URI --write-set FILE",
        )


def _write_whole(path: Path, value: object) -> None:
    staging = path.with_name(f".{path.name}.writing")
    staging.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    staging.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
