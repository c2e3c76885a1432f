"""Passages for `mbc train paper-data` straight from QA files: training data, or a set to measure on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mbc_core.errors import UsageError
from mbc_core.evaluation.qa_file import QaSet, load_qa
from mbc_core.training.data import TrainingPassage, load_training_passages


def passages_of(
    files: Sequence[Path], only: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> list[TrainingPassage]:
    """Read QA files.

    Args:
        only: conditions ``FIELD=VALUE,…``; without any the files are training data, whose forbidden sources, late dates
            and other splits stay out; with some, the matching rows of one file are a set to measure on (split "dev").

    Raises:
        UsageError: a condition is not one, several files with conditions, or nothing is left.
        DamagedFile: a row is not what it should be.
    """
    if not only:
        return load_training_passages(files, log=say)
    if len(files) != 1:
        raise UsageError("a set to measure on is one QA file", value=len(files), fix="make one file of data for each")
    wanted: dict[str, frozenset[str]] = {}
    for condition in only:
        field, equals, values = condition.partition("=")
        if not equals or not field or not values:
            raise UsageError("a condition is not FIELD=VALUE", value=condition, fix="write such as --only split=test")
        wanted[field] = wanted.get(field, frozenset()) | frozenset(values.split(","))
    return measured(load_qa(files[0], wanted), files[0].name)


def measured(qa: QaSet, source: str) -> list[TrainingPassage]:
    """Documents of a QA set with their questions, none of them to be trained on."""
    asked: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in qa.documents]
    for one in qa.questions:
        asked[one.document].append((one.question, one.answers))
    return [
        TrainingPassage(document.doc_id, source, document.text, tuple(own), "dev")
        for document, own in zip(qa.documents, asked, strict=True)
    ]
