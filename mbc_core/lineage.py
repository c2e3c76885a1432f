"""Where an adapter comes from: the part of its card that lets another person say what it was trained on, and by what.

An adapter that was judged by the gate must tell all of it; one imported by hand may know less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from mbc_core.errors import UsageError

SHIPPED = "shipped"
_SCORES = ("new_f1", "old_f1")


@dataclass(frozen=True, slots=True)
class Lineage:
    """An adapter's origin; None where the card does not tell.

    Attributes:
        parent: the version that training went on from, ``shipped``, a folder's name, or None for fresh weights.
        parent_sha256: digest of the parent's weights.
        base_model: name, base_digest: digest of the language model.
        bank: which bank. instant: as of which moment it was asked, ISO 8601.
        codebook_versions: those that its codes name.
        replay: split → window → questions used.
        set_digest: of the training set. seed: of the run. code_version: of the program.
        before, after: F1 in per cent on held-out questions, by ``new_f1`` and ``old_f1``.
        promote, reason, sentence: the gate's decision.
    """

    parent: str | None
    parent_sha256: str | None
    base_model: str | None
    base_digest: str | None
    bank: str | None
    instant: str | None
    codebook_versions: tuple[int, ...]
    replay: dict[str, dict[str, int]]
    set_digest: str | None
    seed: int | None
    code_version: str | None
    before: dict[str, float | None]
    after: dict[str, float | None]
    promote: bool | None
    reason: str | None
    sentence: str | None

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Lineage:
        """What a card tells, also one of an earlier release, whose decision is a sentence."""
        decision = card.get("decision")
        judged = decision if isinstance(decision, Mapping) else {"sentence": decision if decision else None}
        replay = card.get("replay") or {}
        return cls(
            parent=card.get("started_from"),
            parent_sha256=card.get("parent_sha256"),
            base_model=card.get("base_model"),
            base_digest=card.get("base_digest"),
            bank=card.get("bank"),
            instant=card.get("instant"),
            codebook_versions=tuple(card.get("codebook_versions") or ()),
            replay={split: dict(rows) for split, rows in replay.items()} if isinstance(replay, Mapping) else {},
            set_digest=card.get("set_digest"),
            seed=card.get("seed"),
            code_version=card.get("code_version"),
            before=_scores(card.get("before")),
            after=_scores(card.get("after")),
            promote=judged.get("promote"),
            reason=judged.get("reason"),
            sentence=judged.get("sentence"),
        )

    @property
    def questions(self) -> dict[str, int]:
        """Split → questions used."""
        return {split: sum(rows.values()) for split, rows in self.replay.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the questions a split instead of those of every window."""
        told = asdict(self) | {"codebook_versions": list(self.codebook_versions), "questions": self.questions}
        del told["replay"]
        return told


def check_lineage(card: Mapping[str, Any]) -> None:
    """Refuse a judged adapter whose card does not tell where it comes from.

    Raises:
        UsageError: names what is missing or wrong.
    """
    if isinstance(card.get("decision"), Mapping) and (found := problems_of(card)):
        raise UsageError(
            "the adapter's card does not tell where it comes from",
            value="; ".join(found),
            cause="another program wrote the card, or it was cut",
            fix="train the adapter with `mbc adapt`, which writes the whole card",
        )


def problems_of(card: Mapping[str, Any]) -> list[str]:
    """What is missing or wrong of a judged adapter's lineage."""
    rules: dict[str, Callable[[Any], bool]] = {
        "started_from": lambda one: one is None or _is_text(one),
        "base_model": _is_text,
        "base_digest": _is_text,
        "instant": _is_moment,
        "codebook_versions": _are_versions,
        "replay": _are_counts,
        "seed": lambda one: isinstance(one, int),
        "code_version": _is_text,
        "before": _are_scores,
        "after": _are_scores,
        "decision": lambda one: isinstance(one.get("promote"), bool) and _is_text(one.get("reason")),
    }
    missing = [name for name in rules if name not in card]
    wrong = [name for name, rule in rules.items() if name in card and not rule(card[name])]
    return [f"{name} is missing" for name in missing] + [f"{name} is {card[name]!r:.60}" for name in wrong]


def _scores(told: object) -> dict[str, float | None]:
    known = told if isinstance(told, Mapping) else {}
    return {name: known.get(name) for name in _SCORES}


def _is_text(one: object) -> bool:
    return isinstance(one, str) and bool(one)


def _is_moment(one: object) -> bool:
    try:
        return datetime.fromisoformat(str(one)).tzinfo is not None
    except ValueError:
        return False


def _are_versions(one: object) -> bool:
    return isinstance(one, list) and bool(one) and all(isinstance(version, int) for version in one)


def _are_counts(one: object) -> bool:
    return isinstance(one, Mapping) and all(
        isinstance(rows, Mapping) and all(isinstance(count, int) and count >= 0 for count in rows.values())
        for rows in one.values()
    )


def _are_scores(one: object) -> bool:
    return isinstance(one, Mapping) and all(
        name in one and (one[name] is None or isinstance(one[name], int | float)) for name in _SCORES
    )
