"""Train a query map: questions, their passages' codes and the passages that codes confuse them with.

The softmax over the passages of a batch and the hard ones of each question asks for the right *quantized* passage.
The map starts at the plain score and has little room: one weight for each of a slot's directions, for the question
and for the length, the same in every slot, and a matrix W held near zero. More room (a bias, a weight for each of
the d directions, a hidden layer) gained nothing, or lost, on held-out sets.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codes import LENGTH_WEIGHT, Float32, Rotation, decode, quantize, to_slots
from mbc_core.errors import UsageError
from mbc_core.evaluation.addresses import AddressIndex
from mbc_core.evaluation.metrics import Interval
from mbc_core.evaluation.paired import Resampled
from mbc_core.query_map import QueryMap
from mbc_core.training.neighbours import nearest_by_code
from mbc_core.training.prepared import Prepared, load_prepared

KS = (1, 5)
_FLOAT_BLOCK = 512
_SCALED_BY = 4000
_WARM_UP = 50


@dataclass(frozen=True, slots=True)
class QueryMapRecipe:
    """How a map is trained; tuned on held-out passages of the training data.

    Attributes:
        steps, batch: optimisation steps, and questions in each.
        hard: passages that codes rank high for a question, drawn for each question of a batch.
        nearest: out of so many.
        temperature: of the softmax.
        lr, matrix_lr: highest learning rates of the weights by direction and of W.
        decay: λ of λ·|W|².
        balance: a question is drawn by (questions of its passage)^-balance.
        seed: of the draws.
    """

    steps: int = 600
    batch: int = 384
    hard: int = 12
    nearest: int = 32
    temperature: float = 0.03
    lr: float = 0.01
    matrix_lr: float = 3e-4
    decay: float = 0.05
    balance: float = 0.5
    seed: int = 0


def fit_query_map(
    train: Prepared,
    rotation: Rotation,
    book: Codebook,
    slots: int,
    recipe: QueryMapRecipe,
    say: Callable[[str], None] = lambda line: None,
) -> QueryMap:
    """The map that ranks the right passages of ``train`` first by their codes of ``book``.

    Args:
        slots: T, of the codes.

    Raises:
        UsageError: too few passages with questions to learn from.
    """
    if len(train) <= recipe.nearest or not len(train.rows):
        raise UsageError(
            "too few passages to train a query map",
            value=f"{len(train)} passages, {len(train.rows)} questions",
            cause=f"{recipe.nearest} wrong passages are ranked for each question",
            fix="prepare more training passages with questions",
        )
    codes = quantize(to_slots(train.embeddings, rotation, slots), book.codewords)
    asked = torch.from_numpy(to_slots(train.question_embeddings, rotation, slots))
    rows = torch.from_numpy(train.rows)
    _, hard = nearest_by_code(
        asked, torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(book.codewords), recipe.nearest, exclude=rows
    )
    say(f"T={slots}: found {recipe.nearest} wrong passages for each of {len(rows):,} questions")
    decoded = torch.from_numpy(decode(codes, book.codewords))
    model = _Model(rotation.width, slots)
    _train(model, asked.flatten(1), decoded, rows, hard, recipe, say)
    return _scaled(model, asked.flatten(1), decoded, torch.cat([rows[:, None], hard], dim=1), rotation)


class _Model(torch.nn.Module):
    """Raw score (z + W·z)·w · x̂ - Σ v·x̂²; w and v by a slot's direction, as logarithms."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.matrix = torch.nn.Parameter(torch.zeros(width, width))
        self.question = torch.nn.Parameter(torch.zeros(width // slots))
        self.length = torch.nn.Parameter(torch.full((width // slots,), math.log(LENGTH_WEIGHT)))

    def turned(self, z: torch.Tensor) -> torch.Tensor:
        return (z + z @ self.matrix.T) * self.question.exp().repeat(self.slots)

    def lengths(self) -> torch.Tensor:
        return self.length.exp().repeat(self.slots)


def _train(
    model: _Model,
    asked: torch.Tensor,
    decoded: torch.Tensor,
    rows: torch.Tensor,
    hard: torch.Tensor,
    recipe: QueryMapRecipe,
    say: Callable[[str], None],
) -> None:
    draw = torch.Generator().manual_seed(recipe.seed)
    share = torch.bincount(rows, minlength=len(decoded)).float()[rows] ** -recipe.balance
    groups = [
        {"params": [model.question, model.length], "lr": recipe.lr},
        {"params": [model.matrix], "lr": recipe.matrix_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    half_cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)),
    )
    squares = decoded**2
    for step in range(1, recipe.steps + 1):
        chosen = torch.multinomial(share, recipe.batch, replacement=True, generator=draw)
        places = torch.randint(hard.shape[1], (recipe.batch, recipe.hard), generator=draw)
        shown = torch.cat([rows[chosen], hard[chosen].gather(1, places).flatten()])
        passages, place = torch.unique(shown, return_inverse=True)
        scores = model.turned(asked[chosen]) @ decoded[passages].T - squares[passages] @ model.lengths()
        loss = torch.nn.functional.cross_entropy(scores / recipe.temperature, place[: recipe.batch])
        optimizer.zero_grad()
        (loss + recipe.decay * (model.matrix**2).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        half_cosine.step()
        if step % 100 == 0 or step == recipe.steps:
            say(f"T={model.slots}: step {step:,} of {recipe.steps:,}, loss {float(loss.detach()):.3f}")


@torch.no_grad()
def _scaled(
    model: _Model, asked: torch.Tensor, decoded: torch.Tensor, candidates: torch.Tensor, rotation: Rotation
) -> QueryMap:
    """The model as a map whose scores have the mean and the spread of the plain scores of the same candidates.

    The spread within a question's candidates: on that scale words are added to scores (:mod:`mbc_core.rerank`).
    """
    some = torch.linspace(0, len(asked) - 1, min(len(asked), _SCALED_BY)).long()
    near = candidates[some]
    raw = torch.einsum("qd,qnd->qn", model.turned(asked[some]), decoded[near])
    raw -= ((decoded**2) @ model.lengths())[near]
    plain = torch.einsum("qd,qnd->qn", asked[some], decoded[near])
    plain += LENGTH_WEIGHT * (1 - (decoded**2).sum(dim=1))[near]
    scale = float(plain.std(dim=1).mean() / raw.std(dim=1).mean())
    matrix = torch.eye(len(model.matrix)) + model.matrix
    residual = scale * matrix * model.question.exp().repeat(model.slots)[:, None] - torch.eye(len(matrix))
    offset = float(plain.mean()) - scale * float(raw.mean()) - LENGTH_WEIGHT
    return QueryMap(
        residual.half().float().numpy(),
        (model.lengths() * (scale / LENGTH_WEIGHT)).numpy().astype(np.float32),
        float(np.float32(offset)),
        rotation.digest,
        model.slots,
    )


def train_query_maps(
    prepared: Path,
    rotation: Rotation,
    books: Mapping[int, Codebook],
    out_dir: Path,
    recipe: QueryMapRecipe,
    *,
    measure: Mapping[str, Path] | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train one map for each T on the ``train`` passages of ``prepared``; write it with a card.

    Writes ``query_map_t<T>.safetensors`` and ``query_map_t<T>.json``.

    Args:
        books: T → the codebook whose codes are asked.
        measure: name → further prepared sets, each searched among its own passages.
        command: how it was called, for the card.

    Returns:
        The cards. ``held_out`` there: questions on held-out passages, searched among all; by codes without and with
        the map and by float embedding, with paired bootstrap intervals of what the map brings.

    Raises:
        DamagedFile: a folder cannot be read.
        UsageError: too little to learn from.
    """
    data = load_prepared(prepared)
    splits = np.array(data.table["split"].to_pylist(), dtype=object)
    is_dev = (splits == "dev")[data.rows]
    others = {name: load_prepared(folder) for name, folder in (measure or {}).items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    cards = []
    for slots, book in sorted(books.items()):
        started = time.monotonic()
        found = fit_query_map(data.split("train"), rotation, book, slots, recipe, say)
        seconds = round(time.monotonic() - started, 1)
        pieces = (rotation, book, slots, found)
        card = _card(found, book, recipe, data.split("train")) | {"command": command, "seconds": seconds}
        if is_dev.any():
            card["held_out"] = measure_map(
                data.embeddings, data.question_embeddings[is_dev], data.rows[is_dev], *pieces
            )
        card["recall"] = {
            name: measure_map(one.embeddings, one.question_embeddings, one.rows, *pieces)
            for name, one in others.items()
        }
        (out_dir / card["file"]).write_bytes(found.to_bytes())
        (out_dir / f"query_map_t{slots}.json").write_text(json.dumps(card, indent=2) + "\n", "utf-8")
        cards.append(card)
    return cards


def measure_map(
    embeddings: Float32,
    questions: Float32,
    rows: NDArray[np.int64],
    rotation: Rotation,
    book: Codebook,
    slots: int,
    query_map: QueryMap,
) -> dict[str, Any]:
    """Recall by float embedding, by codes, and by codes with the map, over the same questions.

    Args:
        embeddings: passages searched, float32 [n, d], unit norm.
        questions, rows: float32 [q, d] and the passage that answers each.

    Returns:
        questions, passages and, for k of 1 and 5: ``float_at_k``, ``codes_at_k``, ``mapped_at_k`` in percent, the
        share of the float embedding's that codes without and with the map keep, and the gain, as [mean, low, high].
    """
    plain = AddressIndex(embeddings, rotation, book.codewords, slots)
    mapped = AddressIndex(embeddings, rotation, book.codewords, slots, query_map=query_map)
    found = [
        _by_float(embeddings, questions, max(KS)),
        plain.nearest(questions, max(KS)),
        mapped.nearest(questions, max(KS)),
    ]
    table: dict[str, Any] = {"questions": len(rows), "passages": len(embeddings)}
    for k in KS:
        hits = np.stack([(one[:, :k] == rows[:, None]).any(axis=1) for one in found]).astype(np.float64) * 100
        resampled = Resampled.of(hits)
        for name, mean in zip(("float", "codes", "mapped"), resampled.means, strict=True):
            table[f"{name}_at_{k}"] = round(float(mean), 2)
        for name, read in (("codes", 1), ("mapped", 2)):
            table[f"{name}_share_at_{k}"] = _rounded(resampled.share(read, 0))
        table[f"gain_at_{k}"] = _rounded(resampled.difference(2, 1))
    return table


def _by_float(embeddings: Float32, questions: Float32, k: int) -> NDArray[np.int64]:
    passages = torch.from_numpy(embeddings).T
    parts = torch.split(torch.from_numpy(questions), _FLOAT_BLOCK)
    best = [(one @ passages).topk(min(k, len(embeddings)), 1).indices for one in parts]
    found: NDArray[np.int64] = torch.cat(best).numpy()
    return found


def _rounded(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(value, 2) for value in (interval.mean, interval.low, interval.high)]


def _card(found: QueryMap, book: Codebook, recipe: QueryMapRecipe, train: Prepared) -> dict[str, Any]:
    return {
        "what": f"query map for T={found.slots}: (z + D·z)·x̂ + β·(1 - Σ u·x̂²) + offset, z = R·q; no byte of a bank",
        "file": f"query_map_t{found.slots}.safetensors",
        "file_sha256": found.digest,
        "digest": found.digest,
        "rotation": found.rotation,
        "codebook": book.digest,
        "recipe": asdict(recipe),
        "passages": len(train),
        "questions": len(train.rows),
        "sources": train.sources,
        "licence": "Apache-2.0; a matrix fitted to embeddings, no text",
        "device": "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
