"""Question-answer passages for training: what may be trained on, what is held out, and how long texts are cut.

Weights that ship are trained without sets whose licence is for research only, and without anything dated on or
after the day that the evaluation's news begins.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mbc_core.errors import DamagedFile, UsageError
from mbc_core.passages import MAX_PIECES, split_passages
from mbc_core.words import split_words

SHIP_EXCLUDED_SOURCES = frozenset({"race", "dream", "sciq", "mctest", "multirc", "bioasq", "archivalqa"})
"""Sources that weights in this repository are never trained on (research-only, or an unclear licence)."""

LICENCES = {
    "squad_train": "CC BY-SA 4.0 (SQuAD 1.1)",
    "squad_sent": "CC BY-SA 4.0 (SQuAD 1.1)",
    "squadshifts_new_wiki": "CC BY 4.0 (SQuADShifts)",
    "squadshifts_reddit": "CC BY 4.0 (SQuADShifts)",
    "squadshifts_amazon_reviews": "CC BY 4.0 (SQuADShifts)",
    "nq_qed": "CC BY-SA 3.0 (Natural Questions via QED)",
    "quoref": "CC BY 4.0",
    "tweetqa": "CC BY-SA 4.0",
    "realtimeqa": "RealTimeQA",
    "realtimeqa_news": "RealTimeQA",
    "realtimeqa_gcs": "articles that RealTimeQA links to",
    "wiki_leads": "CC BY-SA 4.0 (English Wikipedia, the demo's corpus)",
    "timeqa_human": "TimeQA",
    "fairytaleqa": "FairytaleQA",
}
"""What the publishers of the training sets say, for cards."""

SHIP_CUTOFF = "2024-07-01"
"""Rows dated from here on are for measuring only."""

DEV_SHARE = 0.02

Split = Literal["train", "dev"]


@dataclass(frozen=True, slots=True)
class TrainingPassage:
    """One passage with its questions.

    Attributes:
        passage_id: stable, unique; ``…#1`` upwards for the later parts of a text that was cut.
        source: name of the data set.
        text: the passage.
        questions: (question, accepted answers), the first answer being the preferred one.
        split: "dev" rows are never trained on.
    """

    passage_id: str
    source: str
    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]
    split: Split


def load_training_passages(
    files: Sequence[Path],
    *,
    excluded: frozenset[str] = SHIP_EXCLUDED_SOURCES,
    before: str | None = SHIP_CUTOFF,
    log: Callable[[str], None] | None = None,
) -> list[TrainingPassage]:
    """Read JSON Lines (plain or ``.gz``) of passages with ``qas``, or of one question a row.

    Rows of the same passage are merged and their repeated questions dropped, whichever file they come from. Rows
    that their file marks for another split than "train" are left out; of the rest 2% are held out ("dev") by hash.

    Args:
        files: read in order.
        excluded: sources to leave out.
        before: ISO date; rows dated on or after it are left out. None keeps all.
        log: told the counts, and what was left out and why.

    Raises:
        UsageError: a file is missing, or nothing is left.
        DamagedFile: a line is not what it should be.
    """
    left_out: Counter[str] = Counter()

    def why_not(row: dict[str, Any]) -> str | None:
        if _source(row) in excluded:
            return f"source {_source(row)}"
        if row.get("split", "train") != "train":
            return f"marked {row['split']}"
        if before is not None and str(row.get("timestamp") or "") >= before:
            return f"dated from {before} on"
        return None

    found = _merge(files, why_not, left_out, split_of)
    if log is not None:
        _report(found, left_out, log)
    return found


def load_dev_passages(
    files: Sequence[Path],
    *,
    excluded: frozenset[str] = SHIP_EXCLUDED_SOURCES,
    log: Callable[[str], None] | None = None,
) -> list[TrainingPassage]:
    """Read files to tune on: rows without a split or marked "dev" (never "train" or "test"), of any date.

    Raises:
        UsageError, DamagedFile: as :func:`load_training_passages`.
    """
    left_out: Counter[str] = Counter()

    def why_not(row: dict[str, Any]) -> str | None:
        if _source(row) in excluded:
            return f"source {_source(row)}"
        return None if row.get("split", "dev") == "dev" else f"marked {row['split']}"

    found = _merge(files, why_not, left_out, lambda text: "dev")
    if log is not None:
        _report(found, left_out, log)
    return found


def load_extracts(file: Path) -> list[str]:
    """Texts of a JSON object ``{title: {"extract": text, …}, …}``, the form of the demo corpus.

    Raises:
        DamagedFile: it has another form.
    """
    try:
        return [str(entry["extract"]) for entry in json.loads(file.read_bytes()).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(
            "a file of extracts cannot be read",
            value=str(file),
            cause=str(error) or type(error).__name__,
            fix='give it as JSON {title: {"extract": text}}',
        ) from error


def split_of(text: str) -> Split:
    """ "dev" for 2% of all texts, by hash: the same text is never in both splits, whatever its id."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=8).digest()
    return "dev" if int.from_bytes(digest, "little") < DEV_SHARE * 2**64 else "train"


def cut_passages(
    passages: Iterable[TrainingPassage], count_pieces: Callable[[str], int], max_pieces: int = MAX_PIECES
) -> list[TrainingPassage]:
    """Cut texts that are longer than the encoder reads; each question goes to the part that answers it.

    That is, of the parts that hold an answer (all parts, if none does), the one that shares most words with the
    question. Split and source stay those of the whole.
    """
    result: list[TrainingPassage] = []
    for passage in passages:
        parts = split_passages(passage.text, count_pieces, max_pieces)
        owned: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in parts]
        for question, answers in passage.questions if parts else ():
            owned[part_for(question, answers, parts)].append((question, answers))
        for number, (part, asked) in enumerate(zip(parts, owned, strict=True)):
            name = passage.passage_id if number == 0 else f"{passage.passage_id}#{number}"
            result.append(replace(passage, passage_id=name, text=part, questions=tuple(asked)))
    return result


def _merge(
    files: Sequence[Path],
    why_not: Callable[[dict[str, Any]], str | None],
    left_out: Counter[str],
    split: Callable[[str], Split],
) -> list[TrainingPassage]:
    """Rows of ``files`` by passage; ``left_out`` counts the rows that ``why_not`` gives a reason for."""
    texts: dict[str, tuple[str, str]] = {}
    questions: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in (row for file in files for row in _rows(file)):
        reason = why_not(row)
        if reason is not None:
            left_out[reason] += 1
            continue
        name = row["doc_id"]
        texts.setdefault(name, (_source(row), row["text"]))
        for question, answers in _questions(row):
            questions.setdefault(name, {}).setdefault(question, answers)
    if not texts:
        raise UsageError(
            "no passage is left",
            value=[str(file) for file in files],
            cause="every row was left out: " + ", ".join(f"{count} × {why}" for why, count in left_out.items()),
            fix="give files with other sources",
        )
    return [
        TrainingPassage(name, source, text, tuple(questions.get(name, {}).items()), split(text))
        for name, (source, text) in texts.items()
    ]


def part_for(question: str, answers: Sequence[str], parts: Sequence[str]) -> int:
    """Which of a text's ``parts`` answers: of those that hold an answer, the one sharing most words with the question.

    When none holds an answer, all are considered.
    """
    if len(parts) == 1:
        return 0
    holding = [n for n, part in enumerate(parts) if any(answer.lower() in part.lower() for answer in answers)]
    asked = {word.text.casefold() for word in split_words(question)}

    def shared(number: int) -> int:
        return len(asked & {word.text.casefold() for word in split_words(parts[number])})

    return max(holding or range(len(parts)), key=shared)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise UsageError("a training file is missing", value=str(file), cause="the path is wrong", fix="check the path")
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    yield _checked(json.loads(line))
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise DamagedFile(
            f"line {number} of a training file cannot be read",
            value=str(file),
            cause=str(error) or type(error).__name__,
            fix="each line is an object with doc_id, text and qas, or question and answer",
        ) from error


def _checked(row: Any) -> dict[str, Any]:  # noqa: ANN401 (JSON, checked here)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("doc_id", "text")):
        raise TypeError("not an object with the strings `doc_id` and `text`")
    if "qas" not in row and not {"question", "answer"} <= set(row):
        raise KeyError("neither `qas` nor `question` and `answer`")
    return row


def _source(row: dict[str, Any]) -> str:
    return str(row.get("source") or row["doc_id"].split(":")[0])


def _questions(row: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for question, answer in row.get("qas", ()):
        yield str(question), (str(answer),)
    if "question" in row:
        others = [str(other) for other in row.get("answers") or ()]
        yield str(row["question"]), tuple(dict.fromkeys([str(row["answer"]), *others]))


def _report(passages: Sequence[TrainingPassage], left_out: Counter[str], log: Callable[[str], None]) -> None:
    by_source = Counter(passage.source for passage in passages)
    asked = Counter(dict.fromkeys(by_source, 0))
    for passage in passages:
        asked[passage.source] += len(passage.questions)
    dev = sum(passage.split == "dev" for passage in passages)
    log(f"{len(passages):,} passages ({dev:,} held out), {sum(asked.values()):,} questions")
    for source, count in by_source.most_common():
        log(f"  {source}: {count:,} passages, {asked[source]:,} questions")
    for why, count in left_out.most_common():
        log(f"  left out, {why}: {count:,} rows")
