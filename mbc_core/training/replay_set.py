"""First step of adaptation: what the bank recalls for its own questions, as of one instant.

New and old windows are mixed. The memory beside each question is what the compressed bank recalls, hard neighbours
included, never a document's text. The second step (:mod:`mbc_core.training.adapt`) needs only the set, torch and peft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from mbc_core.code_version import code_version
from mbc_core.errors import UsageError
from mbc_core.training.set_file import Example, SetHeader, Split, TrainingSet, rows_by_window

if TYPE_CHECKING:
    from mbc_core.bank import Bank
    from mbc_core.canary import Canary
    from mbc_core.memory import Memory

TRAIN, HELD_OUT, LINES = 2048, 800, 8
SEARCHED = 64
NEW_SHARE = 0.5
_NEWEST = 3  # without an earlier adaptation, the newest third of the questions counts as new

Row = dict[str, Any]


def build_training_set(
    memory: Memory,
    *,
    as_of: datetime | None = None,
    train: int = TRAIN,
    held_out: int = HELD_OUT,
    lines: int = LINES,
    since: datetime | None = None,
    new_share: float = NEW_SHARE,
    canary: Canary | None = None,
    seed: int = 0,
) -> TrainingSet:
    """Ask the bank its replay questions and note what it recalls.

    Args:
        memory: opened as of the same instant.
        as_of: the instant; None: now.
        train: most questions to train on, drawn by the seed.
        held_out: most held-out questions, half of them about new documents.
        lines: recalled passages a question.
        since: documents added later count as new; None, or when none was: the newest third, by event time.
        new_share: of the training questions, how many come from new documents, as long as there are enough; the
            others are old replay. 1.0 leaves old replay out.
        canary: goes into the set as it is; its documents' questions are neither trained on nor asked by the gate.

    Raises:
        UsageError: the bank has no word codes, or no replay questions.
    """
    bank, moment = memory.bank, as_of or datetime.now(UTC)
    rows = bank.replay(None if as_of is None else _microseconds(moment)).to_pylist()
    if not bank.manifest.words or not rows:
        raise UsageError(
            "the bank offers nothing to adapt to",
            value=f"{len(rows)} replay questions, profile {bank.manifest.profile}",
            cause="it holds no documents yet, none of them gave a question, or its profile has no word codes",
            fix="ingest documents first, with the profile default, compact or rich",
        )
    watched = {} if canary is None else {one.document for one in canary.examples}
    chosen = _choose(rows, train, held_out, since, new_share, watched, seed)
    header = SetHeader(
        bank=bank_name(bank),
        as_of=moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        profile=bank.manifest.profile,
        encoder=bank.manifest.encoder,
        codebook_versions=tuple(np.unique(memory.passages["codebook_version"].to_numpy()).tolist()),
        passages=len(memory),
        offered=rows_by_window((row["split"], row["window"]) for row in rows),
        since=None if since is None else since.isoformat(),
        new_share=new_share,
        canary="" if canary is None else canary.name,
        seed=seed,
        lines=lines,
        code_version=code_version(),
    )
    asked = recalled_examples(memory, chosen, lines)
    return TrainingSet.of([*asked, *(canary.examples if canary is not None else ())], header)


def recalled_examples(memory: Memory, chosen: Sequence[tuple[Row, Split]], lines: int) -> list[Example]:
    """What the bank recalls for each replay row.

    Args:
        chosen: rows of ``Bank.replay`` with the split they are for.
        lines: recalled passages a question.
    """
    if not chosen:
        return []
    questions = [row["question"] for row, _ in chosen]
    _, found = memory.search(memory.encoder.encode_questions(questions), SEARCHED, questions=questions)
    keys = memory.keys()
    examples = []
    for (row, split), places in zip(chosen, found, strict=True):
        words = memory.words(places[:lines])
        own = np.flatnonzero(keys[places] == row["key"])
        first = int(own[0]) if len(own) else None
        true_line = (
            "" if first is None else words[first] if first < lines else memory.words(places[first : first + 1])[0]
        )
        true = first if first is not None and first < lines else None
        examples.append(
            Example(
                row["question"],
                row["answer"],
                split,
                tuple(words),
                true,
                true_line,
                document_name(row["key"]),
                row["window"],
            )
        )
    return examples


def document_name(key: int) -> str:
    """16 hex digits of a document's key."""
    return f"{key & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def bank_name(bank: Bank) -> str:
    """16 hex digits that tell banks apart wherever they are: of the manifest, whose salt is each bank's own."""
    return hashlib.sha256(bank.manifest.to_json().encode()).hexdigest()[:16]


def _choose(
    rows: list[Row],
    train: int,
    held_out: int,
    since: datetime | None,
    new_share: float,
    watched: Collection[str],
    seed: int,
) -> list[tuple[Row, Split]]:
    """Draw questions of each split by a seeded hash, the same whatever order the bank gives them in."""
    free = [row for row in rows if document_name(row["key"]) not in watched]
    ordered = sorted(free, key=lambda row: _draw(row, seed))
    learnt = [row for row in ordered if row["split"] == "train"]
    held = [row for row in ordered if row["split"] != "train"]
    split: list[tuple[Row, Split]] = [(row, "train") for row in _mixed(learnt, train, since, new_share)]
    is_new = _newness(held, since)
    new = [row for row, fresh in zip(held, is_new, strict=True) if fresh][: -(-held_out // 2)]
    old = [row for row, fresh in zip(held, is_new, strict=True) if not fresh][: held_out // 2]
    return [*split, *((row, "new") for row in new), *((row, "old") for row in old)]


def _mixed(rows: list[Row], most: int, since: datetime | None, new_share: float) -> list[Row]:
    """At most ``most`` rows in their order, ``new_share`` of them new; old ones fill what new ones do not, and
    (below a share of 1) the other way round.
    """
    is_new = _newness(rows, since)
    new = [place for place, fresh in enumerate(is_new) if fresh]
    old = [place for place, fresh in enumerate(is_new) if not fresh] if new_share < 1 else []
    wanted = min(len(new), max(round(most * new_share), most - len(old)))
    places = sorted([*new[:wanted], *old[: most - wanted]])
    return [rows[place] for place in places]


def _newness(rows: list[Row], since: datetime | None) -> list[bool]:
    if since is not None and any(row["added_at"] > since for row in rows):
        return [row["added_at"] > since for row in rows]
    times = [(row["event_time"] or row["added_at"]).timestamp() for row in rows]
    if not times:
        return []
    edge = sorted(times)[len(times) - max(1, len(times) // _NEWEST)]
    return [moment >= edge for moment in times]


def _draw(row: Row, seed: int) -> bytes:
    told = f"{seed}\x00{row['key']}\x00{row['question']}".encode()
    return hashlib.blake2b(told, digest_size=8).digest()


def _microseconds(moment: datetime) -> int:
    from mbc_core.memory import microseconds

    found = microseconds(moment)
    return 0 if found is None else found
