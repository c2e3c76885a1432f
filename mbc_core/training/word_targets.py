"""What salience is trained on and judged by: per word, is it in an answer, does a question repeat it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mbc_core.lexicon import Lexicon
from mbc_core.training.data import TrainingPassage
from mbc_core.words import Word, budget_bits, choose_places, split_words, word_worth

FUNCTION_WORDS = frozenset(
    """a about above after again against all also am an and another any are aren't as at be because been before being
    below between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each
    either else ever every few for from further had hadn't has hasn't have haven't having he he's her here hers herself
    him himself his how however i i'm if in into is isn't it it's its itself just let like many may me might more most
    much must my myself neither never no nor not now of off often on once one only or other our ours ourselves out over
    own per quite rather same shall she she's should shouldn't since so some such than that that's the their theirs
    them themselves then there these they they're this those though through thus to too toward towards under until up
    upon us very was wasn't we were weren't what what's when where whether which while who whom whose why will with
    within without won't would wouldn't yet you you're your yours yourself""".split()  # noqa: SIM905 (a list of 170 quoted words hides them)
)
"""English words that a question repeats whatever it asks about (case-folded)."""


@dataclass(frozen=True, slots=True)
class WordTargets:
    """Targets of one passage's words.

    Attributes:
        targets: float32 [words, 2], 0 or 1: in an answer; content word shared with a question.
        answers: of each question whose first answer stands in the passage: its occurrences, each the positions of
            the words that it touches.
    """

    targets: npt.NDArray[np.float32]
    answers: tuple[tuple[tuple[int, ...], ...], ...]


def word_targets(passage: TrainingPassage, words: Sequence[Word]) -> WordTargets:
    """Targets of ``words``, which are those of ``passage.text`` in order.

    An answer that stands nowhere in the passage still marks the content words that it shares with it.
    """
    targets = np.zeros((len(words), 2), dtype=np.float32)
    folded = [_fold(word.text) for word in words]
    places: dict[str, list[int]] = {}
    for place, word in enumerate(folded):
        if word not in FUNCTION_WORDS:
            places.setdefault(word, []).append(place)
    kept: list[tuple[tuple[int, ...], ...]] = []
    for question, answers in passage.questions:
        for word in _content_words(question):
            targets[places.get(word, []), 1] = 1.0
        occurrences = _occurrences(answers[0], passage.text, words)
        for occurrence in occurrences:
            targets[list(occurrence), 0] = 1.0
        if occurrences:
            kept.append(occurrences)
        else:
            for word in _content_words(answers[0]):
                targets[places.get(word, []), 0] = 1.0
    return WordTargets(targets, tuple(kept))


def share_kept_whole(
    texts: Sequence[Sequence[str]],
    scores: Sequence[npt.NDArray[np.float32]],
    answers: Sequence[Sequence[Sequence[Sequence[int]]]],
    lexicon: Lexicon,
    budgets: Sequence[int],
) -> dict[int, float]:
    """Of the answers that stand in their passage, the share whose words are all chosen, by budget of word codes.

    Chosen by salience alone, for this measures a salience head; a bank also keeps first words and bridges.

    Args:
        texts: words of each passage.
        scores: float32 score of each word.
        answers: ``WordTargets.answers`` of each passage; one occurrence kept whole is enough.
    """
    whole = dict.fromkeys(budgets, 0)
    asked = sum(len(passage) for passage in answers)
    for words, score, passage in zip(texts, scores, answers, strict=True):
        if not passage:
            continue
        costs = np.array(lexicon.costs(words), dtype=np.int64)
        worth = word_worth(score, costs)
        folded = [word.casefold() for word in words]
        for budget in budgets:
            room = budget_bits(budget)
            taken = choose_places(words, worth, costs.tolist(), room, opening=0, bridged=0)
            chosen = {folded[place] for place in taken}
            whole[budget] += sum(
                any(all(folded[place] in chosen for place in occurrence) for occurrence in occurrences)
                for occurrences in passage
            )
    return {budget: count / max(asked, 1) for budget, count in whole.items()}


def _occurrences(answer: str, text: str, words: Sequence[Word]) -> tuple[tuple[int, ...], ...]:
    """Word positions that each occurrence of ``answer`` (at word boundaries, any case) touches."""
    needle = " ".join(answer.split())
    if not any(char.isalnum() for char in needle):
        return ()
    pattern = r"\s+".join(re.escape(part) for part in needle.split(" "))
    starts = [word.start for word in words]
    found = []
    for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE):
        first = max(int(np.searchsorted(starts, match.start(), side="right")) - 1, 0)
        touched = tuple(_touched(words, first, match.start(), match.end()))
        if touched:
            found.append(touched)
    return tuple(dict.fromkeys(found))


def _touched(words: Sequence[Word], first: int, start: int, end: int) -> Iterator[int]:
    for place in range(first, len(words)):
        if words[place].start >= end:
            return
        if words[place].end > start:
            yield place


def _content_words(text: str) -> set[str]:
    return {folded for word in split_words(text) if (folded := _fold(word.text)) not in FUNCTION_WORDS}


def _fold(word: str) -> str:
    """Case-folded, without a possessive ending: what makes two words the same to a question."""
    folded = word.casefold().replace("’", "'")
    return folded[:-2] if folded.endswith("'s") else folded
