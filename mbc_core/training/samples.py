"""Training samples of the reader: memory lines, question, answer, drawn and composed by array operations.

Everything a sample can need is tokenised once, into flat arrays; a pool of thousands of prompts is then a few
gathers, so the accelerator never waits for the host. A pool is a pure function of the seed and its number, so a
resumed run goes on with the very same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.evaluation.cloze import make_cloze
from mbc_core.lexicon import Lexicon
from mbc_core.reader.prompt import PromptFormat
from mbc_core.training.batches import Composed, Int64, Ragged, spread
from mbc_core.training.prepared import Prepared
from mbc_core.words import Price, added_bits, budget_bits, keeping_order, word_worth

Int32 = NDArray[np.int32]
Cloze: TypeAlias = tuple[str, str, int]
"""Question, answer, row of the passage."""

_NEVER = np.iinfo(np.uint16).max
_CANDIDATES = 24


@dataclass(frozen=True, slots=True)
class Mixture:
    """What samples are made of. Shares are probabilities.

    Attributes:
        cloze: questions made from passages instead of asked ones.
        no_memory, full_text: samples without memory lines, and with truncated text instead of words.
        budgets: lowest and highest word budget, in plain codes of 16 bits as profiles are; half of the draws take
            one of ``profiles``.
        passages, weights: how many memory lines (k), and how often.
        ordered: lines stand as recall would rank them; else the true one stands anywhere.
        hardest: distractors are the nearest by code; else a random draw from the nearest 24.
        text_tokens: most tokens of one full-text passage.
        max_tokens: most tokens of a prompt; lines go first, never the true one or the question.
    """

    cloze: float = 0.25
    no_memory: float = 0.04
    full_text: float = 0.10
    budgets: tuple[int, int] = (12, 64)
    profiles: tuple[int, ...] = (12, 24, 41)
    passages: tuple[int, ...] = (1, 3, 5, 8)
    weights: tuple[float, ...] = (0.2, 0.2, 0.4, 0.2)
    ordered: float = 0.5
    hardest: float = 0.7
    text_tokens: int = 256
    max_tokens: int = 832


@dataclass(frozen=True, eq=False)
class SampleSource:
    """Everything tokenised; draws pools of samples.

    Attributes:
        words: tokens of each passage's best words, as many as the highest budget holds, in text order.
        enters: uint16 per token of ``words``: the bits of budget from which its word is kept.
        texts: tokens of each passage's text, cut at ``mixture.text_tokens``.
        questions, answers: tokens of each question; cloze questions come after the asked ones.
        rows: int64 [q], true passage of each question.
        others: int64 [q, m], the nearest other passages by code, best first; -1 where there are no more.
        ranks: int64 [q], how many of ``others`` recall puts before the true passage.
        asked: how many questions are not cloze.
    """

    words: Ragged
    enters: NDArray[np.uint16]
    texts: Ragged
    questions: Ragged
    answers: Ragged
    rows: Int64
    others: Int64
    ranks: Int64
    asked: int
    start: tuple[int, ...]
    newline: tuple[int, ...]
    mixture: Mixture = field(default_factory=Mixture)

    def pool(self, seed: int, number: int, size: int) -> Composed:
        """The pool ``number`` of a run: ``size`` samples, the same for equal arguments."""
        rng = np.random.default_rng([seed, number])
        mix = self.mixture
        cloze = len(self.rows) - self.asked
        is_cloze = (rng.random(size) < mix.cloze) & (cloze > 0) | (self.asked == 0)
        question = np.where(
            is_cloze, self.asked + rng.integers(0, max(cloze, 1), size), rng.integers(0, max(self.asked, 1), size)
        )
        kind = rng.random(size)
        as_text = (kind >= mix.no_memory) & (kind < mix.no_memory + mix.full_text)
        k = rng.choice(mix.passages, size=size, p=np.array(mix.weights) / sum(mix.weights))
        k = np.where(as_text, np.minimum(k, 5), k)
        k[kind < mix.no_memory] = 0
        budget = np.where(
            rng.random(size) < 0.5,
            rng.choice(mix.profiles, size=size),
            rng.integers(mix.budgets[0], mix.budgets[1] + 1, size),
        )
        owner, row, is_true = self.choose_lines(rng, question, k)
        return self._compose(question, owner, row, is_true, budget, as_text)

    def choose_lines(
        self, rng: np.random.Generator, question: Int64, k: Int64
    ) -> tuple[Int64, Int64, NDArray[np.bool_]]:
        """Which passages each sample shows, in the order shown: (sample, passage row, is the true one)."""
        size, most = len(question), self.others.shape[1]
        noise = rng.random((size, most))
        by_rank = np.arange(most)[None, :] / max(most, 1)
        preference = np.where((rng.random(size) < self.mixture.hardest)[:, None], by_rank, noise)
        there = self.others[question] >= 0
        order = np.argsort(np.where(there, preference, 2.0), axis=1)
        distractors = np.minimum(np.maximum(k - 1, 0), there.sum(1))
        chosen = np.where(np.arange(most)[None, :] < distractors[:, None], order, most)
        chosen.sort(axis=1)  # recall's order again
        ordered = rng.random(size) < self.mixture.ordered
        anywhere = rng.integers(0, distractors + 1)
        place = np.where(ordered, (chosen < self.ranks[question][:, None]).sum(1), anywhere)
        lines = np.where(k > 0, distractors + 1, 0)
        owner = np.repeat(np.arange(size), lines)
        position = np.arange(len(owner)) - np.repeat(np.cumsum(lines) - lines, lines)
        is_true = position == place[owner]
        other = np.minimum(position - (position > place[owner]), max(most - 1, 0))
        row = self.rows[question[owner]].copy()
        if most:
            pick = np.minimum(chosen[owner, other], most - 1)
            row = np.where(is_true, row, self.others[question[owner], pick])
        return owner, row, is_true

    def _compose(
        self,
        question: Int64,
        owner: Int64,
        row: Int64,
        is_true: NDArray[np.bool_],
        budget: Int64,
        as_text: NDArray[np.bool_],
    ) -> Composed:
        lines, lengths = self._line_tokens(row, budget[owner], as_text[owner])
        asked, answer = self.questions.lengths[question], self.answers.lengths[question]
        fixed = len(self.start) + asked + answer
        kept = _fits(owner, lengths + len(self.newline), is_true, self.mixture.max_tokens - fixed)
        kept &= lengths > 0
        lines, owner, lengths = lines[np.repeat(kept, lengths)], owner[kept], lengths[kept]
        whole = lengths + len(self.newline)
        memory = np.bincount(owner, weights=whole, minlength=len(question)).astype(np.int64)
        total = fixed + memory
        begin = np.cumsum(total) - total
        out = np.empty(int(total.sum()), dtype=np.int32)
        for offset, one in enumerate(self.start):
            out[begin + offset] = one
        before = (
            np.cumsum(whole)
            - whole
            - np.repeat(np.cumsum(memory) - memory, np.bincount(owner, minlength=len(question)))
        )
        line_at = begin[owner] + len(self.start) + before
        out[spread(line_at, lengths)] = lines
        for offset, one in enumerate(self.newline):
            out[line_at + lengths + offset] = one
        at = begin + len(self.start) + memory
        out[spread(at, asked)] = self.questions.values[spread(self.questions.starts[question], asked)]
        out[spread(at + asked, answer)] = self.answers.values[spread(self.answers.starts[question], answer)]
        return Composed(Ragged(out, begin, total), answer)

    def _line_tokens(self, row: Int64, budget: Int64, as_text: NDArray[np.bool_]) -> tuple[Int32, Int64]:
        """Tokens of every line one after the other, and their number a line."""
        held = np.where(as_text, self.texts.lengths[row], self.words.lengths[row])
        line = np.repeat(np.arange(len(row)), held)
        within = np.arange(len(line)) - np.repeat(np.cumsum(held) - held, held)
        text = as_text[line]
        tokens = np.empty(len(line), dtype=np.int32)
        tokens[text] = self.texts.values[(self.texts.starts[row][line] + within)[text]]
        places = (self.words.starts[row][line] + within)[~text]
        tokens[~text] = self.words.values[places]
        keep = np.ones(len(line), dtype=bool)
        keep[~text] = self.enters[places] <= budget_bits(1) * budget[line[~text]]
        return tokens[keep], np.bincount(line[keep], minlength=len(row)).astype(np.int64)


def build_source(
    data: Prepared,
    lexicon: Lexicon,
    form: PromptFormat,
    others: Int64,
    ranks: Int64,
    passage_others: Int64,
    *,
    mixture: Mixture | None = None,
    cloze_per_passage: int = 2,
    cloze: Sequence[Cloze] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> SampleSource:
    """Tokenise passages and questions once.

    Args:
        others, ranks: for each asked question, see :class:`SampleSource`.
        passage_others: int64 [n, m], the nearest other passages of each passage, for cloze questions.
        cloze_per_passage: how many cloze questions are made of a passage, at most.
        cloze: those questions, made already by :func:`cloze_questions`.

    Raises:
        UsageError: there is neither a question nor a cloze question to train on.
    """
    mixture = mixture or Mixture()
    words, enters = _tokenise_words(data, lexicon, form, mixture.budgets[1])
    say(f"tokenised the words of {len(data):,} passages")
    texts = data.table["text"].to_pylist()
    spelled = (
        form.encode_many([" " + " ".join(text.split()) for text in texts]) if mixture.full_text else [[]] * len(data)
    )
    text_ids = [ids[: mixture.text_tokens] for ids in spelled]
    cloze = cloze_questions(data, cloze_per_passage, seed) if cloze is None else cloze
    say(f"made {len(cloze):,} cloze questions")
    questions = [*data.questions, *(question for question, _, _ in cloze)]
    answers = [*(given[0] for given in data.answers), *(answer for _, answer, _ in cloze)]
    if not questions:
        raise UsageError("there is nothing to train on", value="0 questions", fix="give passages with questions")
    cloze_rows = np.array([row for _, _, row in cloze], dtype=np.int64)
    asked_ids = form.encode_many([f"Question: {' '.join(one.split())}\nAnswer:" for one in questions])
    answer_ids = [[*ids, *form.end] for ids in form.encode_many([" " + " ".join(one.split()) for one in answers])]
    return SampleSource(
        words,
        enters,
        Ragged.of(text_ids),
        Ragged.of(asked_ids),
        Ragged.of(answer_ids),
        np.concatenate([data.rows, cloze_rows]),
        np.concatenate([others, passage_others[cloze_rows]]),
        np.concatenate([ranks, np.zeros(len(cloze_rows), dtype=np.int64)]),
        len(data.questions),
        tuple(form.start),
        tuple(form.newline),
        mixture,
    )


def distractors(rows: Int64, found: Int64, keep: int = _CANDIDATES) -> tuple[Int64, Int64]:
    """Search results [q, m] without the true passage.

    Returns:
        others int64 [q, ≤ keep], best first, padded with -1, and ranks int64 [q]: how many of them come before the
        true passage in the search's order.
    """
    is_true = found == rows[:, None]
    place = np.where(is_true.any(1), is_true.argmax(1), found.shape[1])
    order = np.argsort(is_true, axis=1, kind="stable")  # the true one goes last
    others = np.take_along_axis(found, order, axis=1)
    others = np.where(np.take_along_axis(is_true, order, axis=1), -1, others)[:, :keep]
    return others, np.minimum(place, others.shape[1])


def _tokenise_words(
    data: Prepared, lexicon: Lexicon, form: PromptFormat, most: int
) -> tuple[Ragged, NDArray[np.uint16]]:
    """Tokens of each passage's words, with the budget at which each word enters.

    A budget keeps the first words of :func:`mbc_core.words.keeping_order`; unlike
    :func:`mbc_core.words.choose_words` a word too long for the room left ends the choice, which matters for the last
    word or two only.
    """
    column = data.table["words"].combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    coded = column.flatten().dictionary_encode()
    coded = coded.combine_chunks() if hasattr(coded, "combine_chunks") else coded
    unique: list[str] = coded.dictionary.to_pylist()
    word = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    score = data.table["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    bits = np.array(lexicon.costs(unique), dtype=np.int64)
    passage = np.repeat(np.arange(len(lengths)), lengths)
    worth = word_worth(score, bits[word])
    enters = _entry_budgets(column.to_pylist(), worth, bits[word], budget_bits(most), lexicon)
    tokens = Ragged.of(form.encode_many([f" {one}" for one in unique]))
    kept = enters != _NEVER
    word, passage, enters = word[kept], passage[kept], enters[kept]
    counts = tokens.lengths[word]
    values = tokens.values[spread(tokens.starts[word], counts)]
    total = np.bincount(passage, weights=counts, minlength=len(lengths)).astype(np.int64)
    return Ragged(values, np.cumsum(total) - total, total), np.repeat(enters, counts)


def _entry_budgets(
    texts: Sequence[Sequence[str]], worth: NDArray[np.float32], bits: Int64, most: int, lexicon: Lexicon
) -> NDArray[np.uint16]:
    """For each word of all ``texts`` the bits of budget from which it is kept; 65,535 for words beyond ``most``."""
    enters = np.full(len(bits), _NEVER, dtype=np.uint16)
    start = 0
    for words in texts:
        stop = start + len(words)
        costs = bits[start:stop]
        order, repetitions = keeping_order(words, worth[start:stop], costs.tolist())
        places = [place for place in (*order, *repetitions) if costs[place] > 0]
        spent = _spent(places, lexicon.price(lexicon.encode_words(words)), most)
        enters[start + np.array(places[: len(spent)], dtype=np.int64)] = spent
        start = stop
    return enters


def _spent(places: Sequence[int], price: Price, most: int) -> list[int]:
    """Bits of the first 1, 2, … ``places`` kept together, as long as they are at most ``most``; never falling."""
    kept: list[int] = []
    bits = 0
    spent: list[int] = []
    for place in places:
        at, added = added_bits(kept, place, price)
        kept.insert(at, place)
        bits += added
        spent.append(max(bits, spent[-1]) if spent else bits)
        if spent[-1] > most:
            spent.pop()
            break
    return spent


def cloze_questions(data: Prepared, each: int, seed: int) -> list[Cloze]:
    """At most ``each`` cloze questions of every passage, and its row."""
    texts = data.table["text"].to_pylist()
    made: dict[tuple[str, int], str] = {}
    words, scores = data.table["words"].to_pylist(), data.table["scores"].to_pylist()
    for row, text in enumerate(texts):
        for number in range(each):
            cloze = make_cloze(text, words[row], np.array(scores[row], dtype=np.float32), f"{seed}/{number}")
            if cloze is not None:
                made.setdefault((cloze[0], row), cloze[1])
    return [(question, answer, row) for (question, row), answer in made.items()]


def _fits(owner: Int64, lengths: Int64, is_true: NDArray[np.bool_], room: Int64) -> NDArray[np.bool_]:
    """Which lines fit: the true one first, then in order, until the sample's room is used up."""
    order = np.lexsort((~is_true, owner))
    used = np.cumsum(lengths[order])
    counts = np.bincount(owner, minlength=len(room))
    used -= np.repeat(np.concatenate([[0], used])[np.cumsum(counts) - counts], counts)
    kept = np.empty(len(owner), dtype=bool)
    kept[order] = (used <= room[owner[order]]) | is_true[order]
    return kept
