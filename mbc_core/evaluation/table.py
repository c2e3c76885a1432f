"""One row of an evaluation's table, for any way of reading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbc_core.evaluation.metrics import bootstrap, exact_match, f1, prefix_match
from schemas.results import EvalRow


def measured_row(
    read: str,
    profile: str,
    k: int,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    bytes_per_passage: float,
    prompt_tokens: float,
    milliseconds: float,
    seed: int = 0,
) -> EvalRow:
    """Strict EM, prefix EM and F1 in per cent, the first and last with 95% bootstrap intervals.

    Args:
        predictions: one a question.
        answers: the accepted answers of each question.
        bytes_per_passage: stored for this read.
        prompt_tokens: mean length of the prompts.
        milliseconds: a question, recall and generation.

    Raises:
        UsageError: there are no questions, or one has no answer.
    """
    pairs = list(zip(predictions, answers, strict=True))
    em = bootstrap(100 * np.array([exact_match(said, given) for said, given in pairs]), seed=seed)
    overlap = bootstrap(100 * np.array([f1(said, given) for said, given in pairs]), seed=seed)
    return {
        "read": read,
        "profile": profile,
        "k": k,
        "em": em.mean,
        "em_low": em.low,
        "em_high": em.high,
        "em_prefix": 100 * float(np.mean([prefix_match(said, given) for said, given in pairs])),
        "f1": overlap.mean,
        "f1_low": overlap.low,
        "f1_high": overlap.high,
        "questions": len(pairs),
        "bytes_per_passage": bytes_per_passage,
        "prompt_tokens": prompt_tokens,
        "milliseconds": milliseconds,
    }


def format_row(row: EvalRow) -> str:
    """One line for people."""
    return (
        f"{row['read']:<10} {row['profile']:<8} k={row['k']}  EM {row['em']:5.1f} [{row['em_low']:.1f},"
        f" {row['em_high']:.1f}]  F1 {row['f1']:5.1f} [{row['f1_low']:.1f}, {row['f1_high']:.1f}]  prefix EM"
        f" {row['em_prefix']:5.1f}  {row['bytes_per_passage']:6.1f} B  {row['prompt_tokens']:6.1f} tokens "
        f" {row['milliseconds']:.0f} ms  {row['questions']} questions"
    )
