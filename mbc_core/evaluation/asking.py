"""Shows the questions of a QA set from a bank, in every way of reading; and how often the right passage is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mbc_core.codes import code_size
from mbc_core.errors import UsageError
from mbc_core.evaluation.bank_view import BankView, TextEncoder
from mbc_core.evaluation.found import DEPTHS, nearest_by_float, recall_at
from mbc_core.evaluation.qa_file import QaSet
from mbc_core.evaluation.sheet import READS, Lines, Shown
from mbc_core.evaluation.shown_codes import ShownCodes, address_lines
from mbc_core.evaluation.shuffled import shuffled_rows
from mbc_core.evaluation.stores import (
    Store,
    first_words_store,
    text_codes_store,
    text_store,
    truncated_store,
)
from mbc_core.evaluation.whole_bank import histogram_line
from schemas.results import RecallFigures, TextBytes

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to ask.

    Attributes:
        reads: names in ``READS``; those that a bank cannot give (a profile without words) are left out.
        ks: how many passages are shown; each makes rows of its own.
        limit: at most so many questions, drawn by the seed.
        with_float: also search the float embeddings, where every text is known.
    """

    reads: tuple[str, ...] = tuple(READS)
    ks: tuple[int, ...] = (5,)
    limit: int | None = None
    seed: int = 0
    with_float: bool = True

    def __post_init__(self) -> None:
        unknown = [read for read in self.reads if read not in READS]
        if unknown or not self.reads:
            raise UsageError(
                "there is no such read",
                value=unknown,
                cause="a misspelt name",
                fix=f"choose among {', '.join(READS)}",
            )
        if not self.ks or min(self.ks) < 1:
            raise UsageError("k is below 1", value=list(self.ks), fix="use a k such as 5")


@dataclass(eq=False)
class Asker:
    """Shows the questions of one set; what banks of the same set share is computed once.

    Attributes:
        qa: documents and questions.
        encoder: of questions, and of passages for the float search.
        places: which questions.
    """

    qa: QaSet
    encoder: TextEncoder
    wanted: Wanted
    places: Sequence[int]
    lines: Lines = field(default_factory=Lines)

    @property
    def _asked(self) -> list[str]:
        return [self.qa.questions[place].question for place in self.places]

    @cached_property
    def _questions(self) -> tuple[NDArray[np.float32], float]:
        """Embeddings float32 [q, d] of the chosen questions, and milliseconds a question."""
        began = time.perf_counter()
        found = self.encoder.encode_questions(self._asked)
        return found, 1e3 * (time.perf_counter() - began) / max(1, len(self.places))

    def search(self, view: BankView, depth: int, *, rerank: bool = True) -> tuple[NDArray[np.float32], Int64, float]:
        """Scores float32 and rows int64, both [q, ≤ depth], best first, as the bank recalls them, and ms a question.

        Args:
            rerank: look again by word codes, where the bank has them; else by address code alone.
        """
        embeddings, encoding = self._questions
        began = time.perf_counter()
        scores, rows = view.memory.search(embeddings, depth, questions=self._asked if rerank else None)
        return scores, rows, encoding + 1e3 * (time.perf_counter() - began) / max(1, len(self.places))

    def recall_figures(self, view: BankView) -> RecallFigures:
        """R@k of this bank's addresses, alone and re-ranked, beside the float's when every text is known."""
        _, rows, _ = self.search(view, max(DEPTHS), rerank=False)
        _, again, _ = self.search(view, max(DEPTHS)) if view.has_words else (None, None, 0.0)
        right = view.right[list(self.places)]
        by_float = None
        if self.wanted.with_float and all(text is not None for text in view.texts) and len(view.texts):
            encoded = self.encoder.encode([text for text in view.texts if text is not None])
            embeddings = np.stack([one.embedding for one in encoded])
            by_float = nearest_by_float(self._questions[0], embeddings, max(DEPTHS))
        return {
            "profile": view.profile,
            "T": view.slots,
            "bytes": code_size(view.slots),
            "passages": len(view.texts),
            "questions": len(self.places),
            "at": recall_at(right, rows, by_float, seed=self.wanted.seed),
            "at_reranked": [] if again is None else recall_at(right, again, by_float, seed=self.wanted.seed),
        }

    def show(self, view: BankView, reads: Sequence[str], texts: TextBytes | None) -> list[Shown]:
        """Each of ``reads`` for the chosen questions, once a k.

        Args:
            texts: what full text takes; needed by reads of full text only.
        """
        deepest = max(self.wanted.ks)
        scores, found, spent = self.search(view, deepest)
        by_code, code_ms = found, spent
        if view.has_words and any(READS[read].store == "address" for read in reads):
            scores, by_code, code_ms = self.search(view, deepest, rerank=False)  # it has no words to look again by
        stores = _Stores(view, texts)
        right = view.right[list(self.places)]
        shown = []
        for read in reads:
            kind = READS[read]
            if kind.store == "histogram":
                shown.append(self._whole_bank(view, read))
                continue
            ks = {"none": (0,), "right": (1,)}.get(kind.places, self.wanted.ks)
            for k in ks:
                rows: list[list[int]] = [[] for _ in self.places]
                by_address = kind.store == "address"
                if kind.places == "right":
                    rows = [[row] if row >= 0 else [] for row in right.tolist()]
                elif kind.places != "none":
                    rows = (by_code if by_address else found)[:, :k].tolist()
                if kind.places == "shuffled":
                    answering = view.right_document[list(self.places)]
                    rows = shuffled_rows(rows, view.documents, answering, self.wanted.seed)
                searched = kind.places in ("found", "shuffled")
                line, size = stores.of(kind.store)
                shown.append(
                    Shown(
                        read,
                        _profile(view, read),
                        k,
                        list(self.places),
                        [self.lines.places(line(row) for row in one) for one in rows],
                        size + (code_size(view.slots) if searched or by_address else 0.0),
                        (code_ms if by_address else spent) if searched else 0.0,
                        scores=_scores_shown(scores, rows) if by_address and searched and k > 1 else None,
                    )
                )
        return shown

    def _whole_bank(self, view: BankView, read: str) -> Shown:
        """A read of all codes at once: every question is shown the same one line."""
        shuffle = self.wanted.seed if read == "aggregate-shuffled" else None
        (line,) = self.lines.places([histogram_line(view.memory, shuffle)])
        size = float(code_size(view.slots))
        asked = list(self.places)
        return Shown(read, _profile(view, read), 0, asked, [[line] for _ in asked], size, self._questions[1])

    def shown_codes(self, view: BankView) -> ShownCodes:
        """What reads of ``view`` by address codes are decoded with."""
        return ShownCodes.of(view.memory, self.places, self._questions[0])


def _scores_shown(scores: NDArray[np.float32], rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Scores of the places that are shown; a shuffled passage is given that of the one it stands for."""
    return [[round(float(one), 5) for one in own[: len(shown)]] for own, shown in zip(scores, rows, strict=True)]


def _profile(view: BankView, read: str) -> str:
    kind = READS[read]
    if kind.store in ("address", "histogram"):
        return f"T{view.slots}"
    return view.profile if kind.by_profile else "-" if kind.store is None else "text"


class _Stores:
    """The ways of keeping one bank's passages, each made when it is first asked for."""

    def __init__(self, view: BankView, texts: TextBytes | None) -> None:
        self._view, self._texts = view, texts
        self._made: dict[str, Store] = {}

    def of(self, name: str | None) -> tuple[Callable[[int], str], float]:
        """Row → memory line, and bytes a passage without its address."""
        if name is None:
            return lambda row: "", 0.0
        if name not in self._made:
            self._made[name] = self._make(name)
        store = self._made[name]
        if name in ("words", "address"):
            return store.line, store.bytes_per_passage

        def line(row: int) -> str:
            self._view.text(row)  # raises where nobody has it
            return store.line(row)

        return line, store.bytes_per_passage

    def _make(self, name: str) -> Store:
        view = self._view
        sizes = view.sizes.tolist()
        if name == "words":
            said = view.memory.words(np.arange(len(view.texts)))
            return Store(lambda row: said[row], float(np.mean(sizes)) if sizes else 0.0)
        if name == "address":
            lines = address_lines(view.memory)
            return Store(lambda row: lines[row], 0.0)
        if name == "text":
            return text_store(view.texts, self._texts["zstd_dictionary"] if self._texts is not None else 0.0)
        if name == "truncated":
            return truncated_store(view.texts, sizes)
        lexicon = view.memory.lexicon
        if lexicon is None:
            raise UsageError(
                "the bank has no lexicon to spell words with",
                value=f"profile {view.profile}",
                cause="this profile stores addresses only",
                fix=f"leave out the read `{name}`, or take a profile with words",
            )
        return first_words_store(view.texts, sizes, lexicon) if name == "first-words" else text_codes_store(
            view.texts, lexicon
        )  # fmt: skip
