"""Train codebook version 0: one set of K codewords for all T slots, by k-means on rotated embeddings.

All slots are pooled, because after a random rotation they look alike: one shared codebook addresses as well as
T separate ones at a T-th of their memory. The k-means sums run in int64 fixed point, so that a seed gives the
same codebook again on the same kind of device.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mbc_core.codebook.files import Codebook
from mbc_core.codes import Float32, Rotation, check_array, quantize, to_slots
from mbc_core.errors import DamagedFile, UsageError
from mbc_core.training.neighbours import nearest_by_code

DEFAULT_MASS = 2_000_000.0
"""Vectors that version 0 counts for in later updates: τ, so that the decayed mass starts at its steady state."""

Progress = Callable[[str], None]
Measure = Callable[[Rotation, Codebook, int], Mapping[str, Any]]

_FIXED_POINT_BITS = 28
_CHUNK_VECTORS = 1 << 16
_START_SAMPLE = 1 << 16
_CONVERGED = 1e-5
_WEAK_SHARE = 0.05
"""Of the mean count: above the share at which an update calls a code dead."""


@dataclass(frozen=True, slots=True)
class HeldOutQuestions:
    """Questions whose passage is known, to measure how well addresses find it.

    Attributes:
        embeddings: float32 [q, d].
        rows: int [q], row of the right passage among the training embeddings.
    """

    embeddings: Float32
    rows: NDArray[np.integer[Any]]


def train_codebook(
    embeddings: NDArray[Any],
    out_dir: Path,
    *,
    slots: Sequence[int] = (12, 24),
    codewords: int = 512,
    seed: int = 0,
    iterations: int = 100,
    mass: float = DEFAULT_MASS,
    device: str = "auto",
    held_out: HeldOutQuestions | None = None,
    sources: Mapping[str, int] | None = None,
    rotation: Rotation | None = None,
    measured: Measure | None = None,
    progress: Progress = lambda line: None,
) -> list[dict[str, Any]]:
    """Fit one codebook for each T to embeddings in one rotation and write them with a card each.

    Writes ``rotation.safetensors`` and, for each T, ``codebook_t<T>.safetensors`` and ``codebook_t<T>.json``.

    Args:
        embeddings: [N, d] of any float dtype; brought to unit length here.
        slots: the T to fit.
        codewords: K.
        iterations: most k-means passes; stops earlier when the error falls by less than 1e-5 of itself.
        mass: total decayed count given to version 0.
        device: ``cpu``, ``cuda`` or ``auto``.
        held_out: questions to measure recall with; the card says nothing about recall without them.
        sources: rows of training text by source, for the card.
        rotation: R; drawn at random when None.
        measured: called with (rotation, codebook, T); what it returns becomes ``recall`` in the card.

    Returns:
        The cards, one for each T.

    Raises:
        UsageError: too few embeddings, or a T that does not divide their width.
    """
    unit = unit_rows(embeddings)
    where = torch.device(resolve_device(device))
    rotation = rotation or Rotation.random(unit.shape[1], seed)
    cards: list[dict[str, Any]] = []
    files = {"rotation.safetensors": rotation.to_bytes()}
    for count in slots:
        started = time.monotonic()
        vectors = to_slots(unit, rotation, count)
        book, passes = _fit(vectors, codewords, seed, iterations, mass, where, progress)
        card = _card(book, vectors, rotation, sources) | {
            "seed": seed,
            "iterations": passes,
            "device": _device_name(where),
        }
        if held_out is not None and len(held_out.rows):
            card["held_out_recall"] = address_recall(unit, held_out, rotation, book, count, where)
        if measured is not None:
            card["recall"] = measured(rotation, book, count)
        card["seconds"] = round(time.monotonic() - started, 1)
        files[f"codebook_t{count}.safetensors"] = book.to_bytes()
        files[f"codebook_t{count}.json"] = (json.dumps(card, indent=2, sort_keys=True) + "\n").encode()
        progress(f"T={count}: error {card['error']:.4f}, perplexity {card['perplexity']:.0f} of {codewords}")
        cards.append(card)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():  # all at the end: an interrupted run leaves no rotation beside older codebooks
        (out_dir / name).write_bytes(data)
    return cards


def read_prepared(folder: Path, most_questions: int = 4_000) -> tuple[Float32, HeldOutQuestions, dict[str, int]]:
    """Embeddings, questions on the held-out (``dev``) passages and rows by source, from a prepared folder.

    Args:
        folder: what ``mbc train prepare`` wrote.
        most_questions: questions kept, evenly spaced.

    Raises:
        DamagedFile: a file of the folder is missing or cannot be read.
    """
    try:
        embeddings = load_file(folder / "embeddings.safetensors")["embeddings"]
        passages = pq.read_table(folder / "passages.parquet", columns=["source", "split"])
        questions = pq.read_table(folder / "questions.parquet", columns=["row", "question_embedding"])
    except (OSError, KeyError, SafetensorError, pa.ArrowException) as error:
        raise DamagedFile(
            "the prepared training data cannot be read",
            value=str(folder),
            cause=str(error),
            fix="run `mbc train prepare` again and name the folder it wrote",
        ) from error
    rows = questions.column("row").to_numpy()
    is_dev = np.asarray(passages.column("split").to_pylist()) == "dev"
    chosen = np.flatnonzero(is_dev[rows])
    chosen = chosen[:: max(1, -(-len(chosen) // most_questions))]
    vectors = np.asarray(questions.column("question_embedding").take(chosen).to_pylist(), dtype=np.float32)
    sources = Counter(passages.column("source").to_pylist())
    return embeddings.astype(np.float32), HeldOutQuestions(vectors, rows[chosen]), dict(sorted(sources.items()))


def resolve_device(name: str) -> str:
    """``auto`` → ``cuda`` when there is one, else ``cpu``; other names stay."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def kmeans(
    vectors: torch.Tensor, codewords: int, *, seed: int, iterations: int, progress: Progress = lambda line: None
) -> tuple[torch.Tensor, int]:
    """Lloyd's algorithm from a k-means++ start; a codeword with next to no vectors is put to better use.

    It joins the code that has most: an outlier's private codeword would be dead at the first update.

    Args:
        vectors: float32 [m, d_c], on the device to compute on; elements within ±1024.

    Returns:
        (codewords float32 [K, d_c], passes made).

    Raises:
        UsageError: fewer vectors than codewords.
    """
    if len(vectors) < codewords:
        raise UsageError(
            "too few vectors to train a codebook",
            value=len(vectors),
            cause=f"K = {codewords} codewords need at least as many vectors, and 20 times as many to be good",
            fix="train on more passages",
        )
    centres = _spread_start(vectors, codewords, seed)
    last = float("inf")
    for done in range(1, iterations + 1):
        codes, errors = _assign(vectors, centres)
        error = float(errors.double().mean())
        progress(f"k-means pass {done}: mean squared error {error:.6f}")
        centres, moved = _means(vectors, codes, errors, codewords)
        if not moved and last - error < _CONVERGED * error:
            return centres, done
        last = error
    return centres, iterations


def address_recall(
    unit: Float32,
    held_out: HeldOutQuestions,
    rotation: Rotation,
    book: Codebook,
    slots: int,
    device: torch.device,
) -> dict[str, float | int]:
    """Share of questions whose passage is first, or among the first five: by float embedding and by codes.

    Args:
        unit: float32 [N, d], the passages searched.
    """
    right = torch.from_numpy(np.asarray(held_out.rows, dtype=np.int64)).to(device)[:, None]
    asked = to_slots(unit_rows(held_out.embeddings), rotation, slots)
    question_slots = torch.from_numpy(asked).to(device)
    vectors = to_slots(unit, rotation, slots)
    codes = torch.from_numpy(quantize(vectors, book.codewords).astype(np.int32)).to(device)
    words = torch.from_numpy(book.codewords).to(device)
    _, by_code = nearest_by_code(question_slots, codes, words, min(5, len(unit)))
    # The float search is the same search with every passage's vector as its own "codeword" in one slot.
    own = torch.arange(len(unit), device=device)[:, None]
    floats = torch.from_numpy(vectors.reshape(len(unit), -1)).to(device)
    _, by_float = nearest_by_code(question_slots.flatten(1)[:, None], own, floats, min(5, len(unit)))
    shares: dict[str, float | int] = {"questions": len(right), "passages": len(unit)}
    for name, found in (("codes", by_code), ("float", by_float)):
        shares[f"{name}_at_1"] = round(float((found[:, :1] == right).any(dim=1).double().mean()), 4)
        shares[f"{name}_at_5"] = round(float((found == right).any(dim=1).double().mean()), 4)
    return shares


def _fit(
    vectors: Float32,
    codewords: int,
    seed: int,
    iterations: int,
    mass: float,
    device: torch.device,
    progress: Progress,
) -> tuple[Codebook, int]:
    """k-means over all slots, then counts from the exact codes, scaled to ``mass``."""
    flat = torch.from_numpy(vectors.reshape(-1, vectors.shape[2])).to(device)
    centres, passes = kmeans(flat, codewords, seed=seed, iterations=iterations, progress=progress)
    words = np.ascontiguousarray(centres.cpu().numpy(), dtype=np.float32)
    counts = np.bincount(quantize(vectors, words).ravel(), minlength=codewords).astype(np.float64)
    counts = np.maximum(counts, 0.5)  # a codeword that lost its last vector in the final pass still needs a mass
    return Codebook.first(words, counts * (mass / counts.sum())), passes


def unit_rows(embeddings: NDArray[Any]) -> Float32:
    """Embeddings [N, d] of any float dtype → float32 rows of length 1.

    Raises:
        UsageError: there are none, or a row is zero or not finite.
    """
    check_array("the embeddings", embeddings, (None, None))
    rows = np.asarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if len(rows) == 0 or not np.isfinite(lengths).all() or (lengths == 0).any():
        raise UsageError(
            "the embeddings cannot be brought to unit length",
            value=f"{len(rows)} rows",
            cause="there are none, or a row is zero or not finite",
            fix="prepare the training data again",
        )
    return np.asarray(rows / lengths, dtype=np.float32)


def _spread_start(vectors: torch.Tensor, codewords: int, seed: int) -> torch.Tensor:
    """k-means++ on a sample, on the CPU: each next codeword is drawn by squared distance to those drawn before."""
    draw = torch.Generator().manual_seed(seed)
    sample = vectors[torch.randperm(len(vectors), generator=draw)[: max(_START_SAMPLE, codewords)].to(vectors.device)]
    sample = sample.cpu()
    chosen = [int(torch.randint(len(sample), (1,), generator=draw))]
    distance = ((sample - sample[chosen[0]]) ** 2).sum(dim=1)
    for _ in range(codewords - 1):
        spread = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(spread, 1, generator=draw)))
        distance = torch.minimum(distance, ((sample - sample[chosen[-1]]) ** 2).sum(dim=1))
    return sample[chosen].to(vectors.device)


def _assign(vectors: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centre of each vector: (codes int64 [m], squared errors float32 [m])."""
    half_norms = (centres * centres).sum(dim=1) / 2
    codes, errors = [], []
    for part in torch.split(vectors, _CHUNK_VECTORS):
        best = (part @ centres.T - half_norms).max(dim=1)
        codes.append(best.indices)
        errors.append(((part * part).sum(dim=1) - 2 * best.values).clamp(min=0))
    return torch.cat(codes), torch.cat(errors)


def _means(
    vectors: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor, codewords: int
) -> tuple[torch.Tensor, int]:
    """Mean of each code's vectors, and how many codewords were moved because they serve next to none.

    The sums are integers, because float sums on a GPU come in random order.
    """
    scale = float(1 << _FIXED_POINT_BITS)
    sums = torch.zeros(codewords, vectors.shape[1], dtype=torch.int64, device=vectors.device)
    for part, part_codes in zip(torch.split(vectors, _CHUNK_VECTORS), torch.split(codes, _CHUNK_VECTORS), strict=True):
        sums.index_add_(0, part_codes, (part.double() * scale).round().long())
    counts = torch.bincount(codes, minlength=codewords)
    centres = (sums.double() / scale / counts.clamp(min=1)[:, None]).float()
    weak = (counts < _WEAK_SHARE * len(vectors) / codewords).nonzero().squeeze(1)
    largest = counts.topk(len(weak)).indices
    for code, full in zip(weak.tolist(), largest.tolist(), strict=True):
        members = (codes == full).nonzero().squeeze(1)
        by_error = members[errors[members].argsort(stable=True)]
        centres[code] = vectors[by_error[len(by_error) // 2]]  # an ordinary member: the two then share the vectors
    return centres, len(weak)


def _card(book: Codebook, vectors: Float32, rotation: Rotation, sources: Mapping[str, int] | None) -> dict[str, Any]:
    """What a user of the file should know."""
    codes = quantize(vectors, book.codewords)
    squared = float(((vectors - book.codewords[codes]).astype(np.float64) ** 2).sum())
    shares = np.bincount(codes.ravel(), minlength=book.size) / codes.size
    used = shares[shares > 0]
    return {
        "what": f"codebook version 0, K={book.size}, T={vectors.shape[1]}, d_c={book.width}, shared by all slots",
        "digest": book.digest,
        "rotation": rotation.digest,
        "passages": len(vectors),
        "vectors": int(codes.size),
        "mass": float(book.count.sum()),
        "error": squared / float((vectors.astype(np.float64) ** 2).sum()),
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),
        "used": len(used),
        "sources": dict(sources or {}),
        "licence": "Apache-2.0; centroids of embeddings, no text",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
