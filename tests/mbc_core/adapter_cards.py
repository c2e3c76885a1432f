"""Cards and candidate folders as an adaptation leaves them, for tests of the registry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mbc_core.adapters import FILES, AdapterRegistry
from mbc_core.bank import Bank
from mbc_core.training.candidate import write_candidate
from mbc_core.training.replay_set import bank_name

BASE = "f" * 64
SPLITS = ("new", "old", "canary")


def full_card(parent: str | None = "shipped", **changes: object) -> dict[str, object]:
    """What `mbc adapt` tells of a candidate that passed the gate."""
    card: dict[str, object] = {
        "what": "KV-LoRA adapted to what the bank recalls for its replay questions",
        "started_from": parent,
        "parent_sha256": "a" * 64,
        "bank": "some bank",
        "instant": "2026-01-02T03:04:05+00:00",
        "codebook_versions": [0, 3],
        "replay": {"train": {"2026-01-01T00:00:00Z": 40, "undated": 2}, "new": {"2026-01-01T00:00:00Z": 9}},
        "set_digest": "b" * 64,
        "seed": 7,
        "code_version": "1.0+0123456789ab",
        "base_model": "tiny",
        "before": {"new_f1": 30.5, "old_f1": 41.25},
        "after": {"new_f1": 36.0, "old_f1": 41.0},
        "decision": {"promote": True, "reason": "promoted", "sentence": "new +5.5, old -0.2"},
        "steps": 60,
    }
    return card | changes


def files_of(text: str) -> dict[str, bytes]:
    return {FILES[0]: text.encode(), FILES[1]: b'{"r": 32}'}


def save(registry: AdapterRegistry, text: str, parent: str | None = "shipped", **changes: object) -> str:
    return registry.save_candidate(files_of(text), full_card(parent, **changes), BASE)


def candidate_folder(folder: Path, bank: Bank, parent: str | None, gain: float = 10.0, seed: int = 0) -> Path:
    """What the second step of an adaptation leaves: here with scores that pass the gate."""
    folder.mkdir(parents=True)
    for name, data in files_of(f"weights {seed}").items():
        (folder / name).write_bytes(data)
    draw = np.random.default_rng(seed)
    before = {split: draw.uniform(0, 50, 400) for split in SPLITS}
    after = {split: scores + gain for split, scores in before.items()}
    documents = {split: [f"{split}{number}" for number in range(400)] for split in SPLITS}
    card = full_card(parent, bank=bank_name(bank), seed=seed)
    write_candidate(folder, json.loads(json.dumps(card)), BASE, before, after, documents)
    return folder
