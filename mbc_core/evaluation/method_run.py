"""Runs methods over a stream of documents: retention on the way, every question at the end, times, resumable answers.

The predecessor's protocol: documents come in order; at ``first``, 2·``first``, 4·``first``, … documents and at the end
the questions about the first ``first`` are asked, and at the end all of them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.answers import score
from mbc_core.evaluation.kept_answers import KeptAnswers
from mbc_core.evaluation.methods import BankSize, Method, MethodSet
from mbc_core.evaluation.protocols import FIRST, checkpoints

Float64 = NDArray[np.float64]
Say = Callable[[str], None]
_RULE = 2  # of what is kept; another number makes answers of earlier releases unused


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is asked, and when.

    Attributes:
        first: questions about so many first documents are asked again as the stream grows; 0: no retention.
        limit: at most so many questions at the end (and at each checkpoint), drawn by the seed.
        single: so many questions are asked once more, one at a time, for the time of a lone question.
        chunk: documents that :meth:`Method.adapt` is given at once.
    """

    first: int = FIRST
    limit: int | None = None
    seed: int = 0
    single: int = 8
    chunk: int = 64


@dataclass(frozen=True, eq=False)
class Outcome:
    """One method on one set.

    Attributes:
        em, prefix, f1: float64 [questions], per cent.
        retained: documents → F1 float64 [questions about the first ones], per cent, and EM likewise.
        ms_question: milliseconds a question, batched, everything from the bank's read to the answer's text.
        ms_single: the same for a question asked alone.
        ms_document: milliseconds a document, everything from its text (or prepared embedding) to the bank.
        peak_bytes: most accelerator memory in use; 0 on a CPU.
    """

    name: str
    says: str
    predictions: list[str]
    em: Float64
    prefix: Float64
    f1: Float64
    retained: dict[int, Float64]
    size: BankSize
    ms_question: float
    ms_single: float
    ms_document: float
    peak_bytes: int


def run_method(
    method: Method,
    data: MethodSet,
    protocol: Protocol,
    *,
    kept: KeptAnswers | None = None,
    say: Say = lambda line: None,
) -> Outcome:
    """Stream ``data`` through ``method`` and ask.

    Args:
        kept: answers of an earlier run; the same method, set and protocol are not run again.

    Raises:
        UsageError: the stream is shorter than ``protocol.first``.
        MbcError: as the method.
    """
    name = _made_of(method, data, protocol)
    told = kept.get(name) if kept is not None else None
    if told is None:
        told = _run(method, data, protocol)
        if kept is not None:
            kept.add(name, f"{method.name} on {data.name}", told)
    outcome = _scored(method, data, protocol, told)
    say(
        f"{data.name}, {outcome.name}: F1 {outcome.f1.mean():.1f}, EM {outcome.em.mean():.1f}, "
        f"{outcome.ms_document:.1f} ms a document, {outcome.ms_question:.1f} ms a question"
    )
    return outcome


def asked_places(data: MethodSet, protocol: Protocol, documents: int | None = None) -> list[int]:
    """Places of the questions that are asked about the first ``documents`` (all for None), ascending."""
    places = data.asked_about(documents)
    if protocol.limit is None or protocol.limit >= len(places):
        return places
    drawn = np.random.default_rng(protocol.seed).choice(places, protocol.limit, replace=False)
    return sorted(int(one) for one in drawn)


def stops(data: MethodSet, protocol: Protocol) -> list[int]:
    """After how many documents the first ones are asked about again."""
    if not protocol.first:
        return []
    if protocol.first > len(data.documents):
        raise UsageError(
            "the stream is shorter than its first part",
            value=f"{len(data.documents)} documents",
            cause=f"retention is measured on the first {protocol.first}",
            fix="give a longer set or a smaller --first",
        )
    return checkpoints(protocol.first, len(data.documents))


def _run(method: Method, data: MethodSet, protocol: Protocol) -> dict[str, object]:
    """Everything that is kept of a run, as JSON values."""
    halts = stops(data, protocol)
    early = asked_places(data, protocol, protocol.first) if halts else []
    retained: dict[str, list[str]] = {}
    spent = 0.0
    _reset_peak()
    try:
        _warm_up(method, data)
        method.start(data)
        done = 0
        for halt in dict.fromkeys([*halts, len(data.documents)]):
            while done < halt:
                upto = min(done + protocol.chunk, halt)
                began = _now()
                method.adapt(range(done, upto))
                spent += _now() - began
                done = upto
            if halt in halts:
                retained[str(halt)] = method.answer(early)
        places = asked_places(data, protocol)
        began = _now()
        predictions = method.answer(places)
        answering = _now() - began
        single = places[:: max(1, len(places) // protocol.single)][: protocol.single] if protocol.single else []
        began = _now()
        for place in single:
            method.answer([place])
        alone = _now() - began
        size = method.size()
    finally:
        method.close()
    return {
        "predictions": predictions,
        "retained": retained,
        "size": asdict(size),
        "ms_question": 1e3 * answering / len(places),
        "ms_single": 1e3 * alone / max(1, len(single)),
        "ms_document": 1e3 * spent / len(data.documents),
        "peak_bytes": _peak(),
    }


def _warm_up(method: Method, data: MethodSet) -> None:
    """One document and one question, so that loading and compiling are in nobody's time."""
    method.start(data)
    method.adapt(range(1))
    method.answer([0])


def _scored(method: Method, data: MethodSet, protocol: Protocol, told: dict[str, object]) -> Outcome:
    predictions = cast("list[str]", told["predictions"])
    answers = data.prepared.answers
    early = asked_places(data, protocol, protocol.first) if protocol.first else []
    retained = {
        int(documents): score(said, [answers[place] for place in early])["f1"]
        for documents, said in cast("dict[str, list[str]]", told["retained"]).items()
    }
    return Outcome(
        name=method.name,
        says=method.says,
        predictions=predictions,
        **score(predictions, [answers[place] for place in asked_places(data, protocol)]),
        retained=retained,
        size=BankSize(**cast("dict[str, Any]", told["size"])),
        ms_question=cast("float", told["ms_question"]),
        ms_single=cast("float", told["ms_single"]),
        ms_document=cast("float", told["ms_document"]),
        peak_bytes=cast("int", told["peak_bytes"]),
    )


def _made_of(method: Method, data: MethodSet, protocol: Protocol) -> str:
    """sha256 (hex) of everything that the answers depend on."""
    strangers = data.strangers.table["text"].to_pylist() if data.strangers is not None else []
    told: Sequence[object] = (_RULE, method.name, method.identity, data.digest, strangers, asdict(protocol))
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()


def _now() -> float:
    """Seconds, after everything that the accelerator was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
