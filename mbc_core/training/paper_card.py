"""The card of a trained paper model: what it was trained on, how, and what came of it."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.training.data import SHIP_EXCLUDED_SOURCES
from mbc_core.training.paper import PaperTrainer
from mbc_core.training.paper_data import PaperData

_CLOSED = "closed book: the same parts, trained equally, without memory"


def paper_card(trainer: PaperTrainer, data: PaperData, curve: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    """What a reader of the weights needs to know: data, sizes, schedule, curve, device.

    Args:
        curve: lines of ``curve.jsonl``.
        more: further entries, such as ``results``.
    """
    model, run, progress = trainer.model, trainer.run, trainer.progress
    names = trainer.parameters
    cuda = trainer.device.type == "cuda"
    return {
        "what": "the paper's model, " + (_CLOSED if run.closed else f"{model.config.codes} codes"),
        "base": {"name": model.language_model.name, "digest": model.language_model.digest},
        "config": json.loads(model.config.to_json()),
        "run": asdict(run),
        "finished": progress.finished,
        "ended_by": progress.ended_by,
        "kept_step": progress.kept or progress.step,
        "converged": progress.ended_by == "flat",
        "cool_from": progress.cool_from,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "epochs": round(progress.step / trainer.draw.steps_per_epoch, 2),
        "processes": trainer.ranks.count,
        "compiled": trainer.layers is not None,
        "parameters": {
            "learned": sum(one.numel() for one in names.values()),
            "kv_lora": sum(one.numel() for name, one in names.items() if "lora_" in name),
        },
        "data": {
            **_data_told(data),
            "too_long": trainer.draw.left_out,
            "licences": {name: LICENCES.get(name, "unknown") for name in data.told["sources"]},
        },
        "curve": curve,
        "device": torch.cuda.get_device_name(trainer.device) if cuda else platform.processor() or "CPU",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": _command(sys.argv),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }


def _data_told(data: PaperData) -> dict[str, Any]:
    """Where data come from, and how many there are."""
    counts = {"passages": int((~data.held_out).sum()), "held_out_passages": int(data.held_out.sum())}
    return {**data.told, **counts, "questions": len(data.rows)}


def card_of(folder: Path) -> dict[str, Any]:
    """The card in a folder; empty without one.

    Raises:
        DamagedFile: it is no card.
    """
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DamagedFile("a card cannot be read", value=str(path), cause=str(error), fix="train anew") from error
    if not isinstance(card, dict):
        raise DamagedFile("a card cannot be read", value=str(path), cause="it is no JSON object", fix="train anew")
    return card


def _command(argv: Sequence[str]) -> str:
    """The command as it was typed, files and folders by their last name: where they lay concerns nobody."""
    return " ".join(["mbc train", *(re.sub(r"[^=]*/", "", one) for one in argv[1:])])


def require_shippable(data: PaperData) -> None:
    """Refuse sources that weights in this repository are never trained on.

    Raises:
        UsageError: one is there.
    """
    found = sorted(SHIP_EXCLUDED_SOURCES & set(data.told["sources"]))
    if found:
        raise UsageError(
            "the data hold sources that shipped weights are never trained on",
            value=found,
            cause="their licence is for research only, or unclear",
            fix="leave them out (`mbc train prepare` does), or say --research for weights that are not given away",
        )


def require_same_data(data: PaperData, card: Mapping[str, Any], folder: object) -> None:
    """Refuse to call a run equal to one on other data.

    Args:
        card: of the other run, in ``folder``.

    Raises:
        UsageError: sources, passages, questions, encoder or codebooks differ.
    """
    own = json.loads(json.dumps(_data_told(data)))
    theirs = card.get("data", {})
    other = sorted(name for name, one in own.items() if theirs.get(name) != one)
    if other:
        raise UsageError(
            "the data are not those of the run to be like",
            value=f"{', '.join(other)} differ from {folder}",
            cause="an equal control is trained on the same passages and questions",
            fix="name the file that it was trained on",
        )


LICENCES: Mapping[str, str] = {
    "squad_train": "CC BY-SA 4.0",
    "squad_sent": "CC BY-SA 4.0",
    "squadshifts_amazon_reviews": "CC BY 4.0",
    "squadshifts_new_wiki": "CC BY 4.0",
    "squadshifts_reddit": "CC BY 4.0",
    "nq_qed": "CC BY-SA 3.0",
    "quoref": "CC BY 4.0",
    "tweetqa": "CC BY-SA 4.0",
}
"""Licences of data sets, as far as their distributors state them plainly."""


def read_curve(out_dir: Path) -> list[dict[str, Any]]:
    """Lines of ``curve.jsonl``."""
    path = out_dir / "curve.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
