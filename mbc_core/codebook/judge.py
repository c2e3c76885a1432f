"""How far a codebook should move: judged by recall on passages it was not fitted to, not by quantization error.

A codebook fitted to a narrow set lowers the error and loses recall: its codewords go to what the set's passages have
in common, and then nothing tells them apart. So a new version's words are judged the way they will be used. Each
held-out passage (a probe) is asked for by its own embedding with the difference of two other probes added, which
leaves it about as close to its passage as a question is; what counts is the log-probability of finding the right
passage among all probes by the score that recall uses. No text is needed, and nothing is random: probes come in the
order of a hash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mbc_core.codes import Float32, Float64, decode, exact_inner_products, length_credits, quantize

FEWEST_PROBES = 32
"""With fewer nothing can be told, and the words stay."""

STEPS = (0.25, 0.5, 1.0)
"""Shares of the way from the head's words to the new means that are tried."""

_CAUTION = 0.5
_TEMPERATURE = 0.05
_OTHERS = ((1, 2), (3, 7), (9, 17), (19, 30))
"""Which two other probes each question about a probe is mixed with, counted from it; all below FEWEST_PROBES."""

_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Step:
    """What the judge decided.

    Attributes:
        share: of the way from the old words to the new ones; 0 when they should stay.
        gain: mean log-probability of recall that the step gains over the old words; 0 when they stay.
    """

    share: float
    gain: float


def choose_step(old: Float32, new: Float32, probes: Float32) -> Step:
    """The step from ``old`` towards ``new`` that recalls the probes best, if it surely beats ``old``.

    A step counts by its mean gain less half the standard error over the probes; only one that then is above 0 is
    taken, so that chance alone seldom moves a codebook.

    Args:
        old, new: E, float32 [K, d_c]. probes: z of held-out passages, float32 [n, T, d_c].
    """
    best, best_bound = Step(0.0, 0.0), 0.0
    if len(probes) < FEWEST_PROBES:
        return best
    before = log_probabilities(probes, old)
    for share in STEPS:
        gained = log_probabilities(probes, moved(old, new, share)) - before
        mean = math.fsum(gained) / len(gained)
        deviation = math.sqrt(math.fsum((gained - mean) ** 2) / len(gained))
        # Libraries differ in the last digits of exp and log; they must not decide.
        bound = round(mean - _CAUTION * deviation / math.sqrt(len(gained)), _DIGITS)
        if bound > best_bound:
            best, best_bound = Step(share, round(mean, _DIGITS)), bound
    return best


def moved(old: Float32, new: Float32, share: float) -> Float32:
    """The words ``share`` of the way from ``old`` to ``new``; exactly ``new`` at 1."""
    if share == 1.0:
        return new
    start = old.astype(np.float64)
    return (start + share * (new.astype(np.float64) - start)).astype(np.float32)


def log_probabilities(probes: Float32, codewords: Float32) -> Float64:
    """Mean log-probability of finding each probe by questions about it: float64 [n].

    Args:
        probes: z, float32 [n, T, d_c], n at least :data:`FEWEST_PROBES`. codewords: E, float32 [K, d_c].
    """
    count = len(probes)
    places = np.arange(count)
    flat = probes.reshape(count, -1)
    stored = decode(quantize(probes, codewords), codewords)
    credits = length_credits(stored)
    total = np.zeros(count)
    for one, other in _OTHERS:
        questions = flat + (np.roll(flat, -one, axis=0) - np.roll(flat, -other, axis=0))
        logits = (exact_inner_products(questions, stored) + credits) / _TEMPERATURE
        logits -= logits.max(axis=1, keepdims=True)
        total += logits[places, places] - np.log(np.exp(logits).sum(axis=1))
    means: Float64 = total / len(_OTHERS)
    return means
