"""One codebook version → the next: decay, add, divide, judge, and give dead codes a new word. All once, after merging.

Written with the symbols of the paper's family of algorithms: N_k is the decayed count of a code, m_k the decayed
sum of its vectors, and m_k / N_k the mean that its codeword moves to. How much of the way it goes is chosen by recall
(``mbc_core.codebook.judge``): the mean always has the lower error, and not always the better recall.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mbc_core.codebook.files import Codebook
from mbc_core.codebook.judge import Step, choose_step, moved
from mbc_core.codebook.samples import FIXED_POINT, Candidates, Probes
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codes import Float32, Float64, exact_squared_distances
from mbc_core.errors import UsageError
from mbc_core.windows import window_order

_SMALLEST_COUNT = 1e-6
_DECAY_DIGITS = 12
_FEWEST_IN_POOL = 5
_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """When a version is published and how strongly new vectors move it.

    Attributes:
        tau: τ, vectors after which an old vector's weight has fallen to 1/e; 500,000 are 20,000 passages at T = 24.
        dead_share: a code is dead when N_k is below this share of the mean count.
        min_vectors: vectors that must have gathered before a version is published; 20 · K.
        growth: and at least this share of all vectors seen so far, so that versions thin out as a bank grows:
            64 versions reach 27,000 passages at ``growth`` 0 and millions at 0.1 (T = 24).
        reset_pool: candidates, each of another document, whose mean becomes a reset codeword.
        anchor: most vectors that the head's own evidence counts for. It holds the words where they are, version 0's
            above all; without a limit, version 0 would outweigh years of a small bank's documents.
        judged: move the words only as far as recall of held-out passages gains; False moves them to the new means,
            which a narrow stream can make worse than standing still.
    """

    tau: float = 500_000.0
    dead_share: float = 0.02
    min_vectors: int = 20 * 512
    growth: float = 0.1
    reset_pool: int = 5
    anchor: float = 500_000.0
    judged: bool = True

    def __post_init__(self) -> None:
        problems = {
            "tau": not (math.isfinite(self.tau) and self.tau > 0),
            "anchor": not (math.isfinite(self.anchor) and self.anchor > 0),
            "dead_share": not 0 <= self.dead_share < 1,
            "min_vectors": self.min_vectors < 1,
            "growth": not self.growth >= 0,
            "reset_pool": self.reset_pool < _FEWEST_IN_POOL,
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise UsageError(
                "the update rule is impossible",
                value={name: getattr(self, name) for name in wrong},
                cause="tau, anchor and min_vectors are positive, dead_share is in [0, 1), growth is not negative, and "
                f"reset_pool is at least {_FEWEST_IN_POOL} so that no codeword is one document's vector",
                fix="correct the value",
            )

    def vectors_needed(self, head: Codebook) -> int:
        """Vectors that must have gathered before the successor of ``head`` is published."""
        return max(self.min_vectors, math.ceil(self.growth * head.vectors_seen))


@dataclass(frozen=True, slots=True)
class CodebookUpdate:
    """A new version and the figures a person wants to see beside it.

    Attributes:
        codebook: the new version.
        vectors: slot vectors it took in.
        used: codes that at least one of them was quantized to.
        perplexity: exp of the entropy of the codes' usage, between 1 and K.
        error: Σ ‖z − E_c‖² / Σ ‖z‖² under the codebook the vectors were quantized with.
        resets: dead codes that got a new word.
        starved: dead codes that kept their old word, for want of candidates from enough documents.
        step: how far the words went, and what recall of held-out passages gained by it.
    """

    codebook: Codebook
    vectors: int
    used: int
    perplexity: float
    error: float
    resets: int
    starved: int
    step: Step


def update(head: Codebook, statistics: BatchStatistics, rule: UpdateRule, windows: Collection[str]) -> CodebookUpdate:
    """Make the version after ``head``.

    N_k ← λ N_k + w n_k and m_k ← λ m_k + w s_k with λ = exp(−n/τ) and w = (1 − λ) τ / n for n new vectors: the
    total count rests at τ, and cutting the same vectors into other windows changes nothing to speak of. The words go
    the judged share of the way to m_k / N_k; the evidence in N and m is kept whole, so a step not taken now can be
    taken later. Then every dead code's codeword, count and sum are replaced together.

    Args:
        statistics: gathered under ``head`` or an older version; codes reset since then are left out.
        windows: where they come from, any order.

    Raises:
        UsageError: no vectors, no windows, or statistics of another chain.
    """
    vectors = statistics.vectors
    if not vectors or not windows:
        raise UsageError(
            "a codebook cannot be updated from nothing",
            value=f"{vectors} vectors, {len(windows)} windows",
            cause="the statistics are empty",
            fix="update after vectors have gathered",
        )
    carried = statistics.carried_to(head)
    held = _held_out(carried) if rule.judged else carried.probes.smallest(0)
    count, total = _evidence(head, carried, held, rule)
    means = _divide(head.codewords, count, total)
    step = choose_step(head.codewords, means, held.vectors) if rule.judged else Step(1.0, 0.0)
    codewords = moved(head.codewords, means, step.share).copy()
    mean = math.fsum(count) / head.size
    dead = np.flatnonzero(count < rule.dead_share * mean)
    reset_at = head.reset_at.copy()
    words = reset_words(len(dead), carried.candidates, np.delete(codewords, dead, axis=0), rule.reset_pool)
    given = dead[: len(words)]
    codewords[given] = words
    count[given] = mean
    total[given] = codewords[given].astype(np.float64) * count[given, None]
    reset_at[given] = head.version + 1
    codebook = Codebook(
        version=head.version + 1,
        parent=head.version,
        codewords=codewords,
        count=count,
        sum=total,
        reset_at=reset_at,
        built_from=tuple(sorted(set(windows), key=window_order)),
        last_window=max(filter(None, [head.last_window, *windows]), key=window_order),
        vectors_seen=head.vectors_seen + vectors,
    )
    return CodebookUpdate(
        codebook=codebook,
        vectors=vectors,
        used=int((carried.counts > 0).sum()),
        perplexity=perplexity(carried.counts),
        error=carried.error_sum / max(carried.energy_sum, 1),
        resets=len(given),
        starved=len(dead) - len(given),
        step=step,
    )


def _held_out(statistics: BatchStatistics) -> Probes:
    """The probes that judge the update: never more than one passage in eight, so that enough is left to learn from."""
    probes = statistics.probes
    passages = statistics.vectors // max(1, probes.vectors.shape[1])
    return probes.smallest(min(len(probes), passages // _HELD_OUT_ONE_IN))


def _evidence(head: Codebook, carried: BatchStatistics, held: Probes, rule: UpdateRule) -> tuple[Float64, Float64]:
    """N [K] and m [K, d_c] after the update, without the held-out passages."""
    held_counts, held_sums = held.sums(head.size)
    vectors = carried.vectors - held.vectors.shape[0] * held.vectors.shape[1]
    decay = round(math.exp(-vectors / rule.tau), _DECAY_DIGITS)  # libraries differ in exp's last digit
    weight = (1.0 - decay) * rule.tau / vectors
    kept = decay * min(1.0, rule.anchor / math.fsum(head.count))
    count = kept * head.count + weight * (carried.counts - held_counts)
    total = kept * head.sum + weight * ((carried.sums - held_sums) / FIXED_POINT)
    return count, total


def perplexity(counts: NDArray[np.int64]) -> float:
    """exp of the entropy of the usage ``counts`` [K]: K when all codes are used alike, 1 when one is; 0 for none."""
    used = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(np.exp(-(used * np.log(used)).sum())) if len(used) else 0.0


def _divide(old: Float32, count: Float64, total: Float64) -> Float32:
    """m / N [K, d_c]; a code that decayed to nothing keeps its old word, with a token count (both in place)."""
    spent = count < _SMALLEST_COUNT
    count[spent] = _SMALLEST_COUNT
    total[spent] = old[spent].astype(np.float64) * _SMALLEST_COUNT
    return (total / count[:, None]).astype(np.float32)


def reset_words(wanted: int, candidates: Candidates, alive: Float32, pool: int) -> Float32:
    """Up to ``wanted`` new words, float32 [≤ wanted, d_c]: where the codebook serves its candidates worst.

    Each word is the mean of the worst-served candidate and its nearest, one candidate a document and ``pool``
    documents: a codeword must not give away a single document's vector.
    """
    vectors = candidates.vectors
    words = np.zeros((0, vectors.shape[1]), dtype=np.float32)
    if not wanted or not len(vectors):
        return words
    error = exact_squared_distances(vectors, alive).min(axis=1, initial=np.inf)
    free = np.ones(len(vectors), dtype=bool)
    while len(words) < wanted and free.any():
        worst = int(np.where(free, error, -1.0).argmax())
        distance = exact_squared_distances(vectors, vectors[worst : worst + 1])[:, 0]
        distance[worst] = -1.0  # itself first, whatever rounding says
        by_distance = np.argsort(np.where(free, distance, np.inf), kind="stable")[: int(free.sum())]
        _, first_of_document = np.unique(candidates.keys[by_distance], return_index=True)
        chosen = by_distance[np.sort(first_of_document)[:pool]]
        if len(chosen) < pool:
            break
        word = vectors[chosen].astype(np.float64).mean(axis=0).astype(np.float32)[None]
        words = np.concatenate([words, word])
        free[chosen] = False
        error = np.minimum(error, exact_squared_distances(vectors, word)[:, 0])
    return words
