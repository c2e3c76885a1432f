"""How many bits each word code takes: a Huffman code of the words that passages really keep.

Which words are kept depends on what they cost, so counting and coding take turns; two turns are enough.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbc_core.errors import UsageError
from mbc_core.lexicon import Lexicon
from mbc_core.prefix_code import PrefixCode
from mbc_core.training.lexicon import card_path
from mbc_core.training.prepared import Prepared
from mbc_core.words import budget_bits, choose_places, choose_words, word_worth

BUDGETS = (12, 24, 41)
"""Word codes of the profiles, counted alike."""

UNSEEN = 0.3
"""Count given to every entry beside what was seen."""


def train_word_code(
    data: Prepared,
    lexicon: Lexicon,
    *,
    budgets: Sequence[int] = BUDGETS,
    turns: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> Lexicon:
    """The same entries with bits that suit the words which the passages of ``data`` keep.

    Args:
        data: passages with scored words, see ``mbc train prepare``.
        lexicon: entries; its bits, if it has some, are where the first turn starts.
        budgets: word codes a passage, as in profiles.

    Raises:
        UsageError: there are no scored words.
    """
    words, scores = data.table["words"].to_pylist(), data.table["scores"].to_pylist()
    if not any(words):
        raise UsageError(
            "there are no words to count",
            value=f"{len(words):,} passages",
            cause="they were prepared without a salience head",
            fix="run `mbc train prepare … --salience FILE` first",
        )
    scored = [np.asarray(one, dtype=np.float32) for one in scores]
    for turn in range(turns):
        counts = chosen_counts(words, scored, lexicon, budgets)
        lexicon = Lexicon(lexicon.merges, PrefixCode.from_counts(counts + UNSEEN).lengths.tolist())
        say(f"turn {turn + 1}: {counts.sum():,.0f} codes kept, {mean_bits(counts, lexicon):.2f} bits a code")
    return lexicon


def chosen_counts(
    words: Sequence[Sequence[str]],
    scores: Sequence[NDArray[np.float32]],
    lexicon: Lexicon,
    budgets: Sequence[int],
) -> NDArray[np.float64]:
    """How often each entry is kept, summed over the budgets: float64 [entries]."""
    counts = np.zeros(len(lexicon), dtype=np.int64)
    for passage, score in zip(words, scores, strict=True):
        for budget in budgets:
            np.add.at(counts, choose_words(passage, score, budget, lexicon), 1)
    return counts.astype(np.float64)


def mean_bits(counts: NDArray[np.float64], lexicon: Lexicon) -> float:
    """Bits of a code, weighted by ``counts``."""
    return float((counts * np.array(lexicon.bits, dtype=np.float64)).sum() / max(counts.sum(), 1.0))


def write_card(out: Path, before: Path, coded: Lexicon, data: Prepared) -> dict[str, object]:
    """Write the card beside the file ``out``; ``before`` is the file whose entries, and card, it goes on from."""
    entries = json.loads(card_path(before).read_text(encoding="utf-8")) if card_path(before).exists() else {}
    words = data.table["words"].to_pylist()
    scores = [np.asarray(one, dtype=np.float32) for one in data.table["scores"].to_pylist()]
    kept = {
        str(budget): {
            "bits_per_code": round(mean_bits(chosen_counts(words, scores, coded, [budget]), coded), 2),
            "words": round(words_kept(words, scores, coded, budget), 1),
            "words_at_16_bits_a_code": round(words_kept(words, scores, Lexicon(coded.merges), budget), 1),
        }
        for budget in BUDGETS
    }
    card: dict[str, object] = {
        "what": "byte-level BPE lexicon with a Huffman code: word codes of the bank",
        "entries": len(coded),
        "digest": coded.digest,
        "file_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "entries_of": Lexicon.load(before).digest,
        "trained_on": entries.get("trained_on", []),
        "bits": {"shortest": min(coded.bits), "longest": max(coded.bits)},
        "counted_on": {"passages": len(data), **data.sources},
        "kept_by_budget": kept,
        "licence": "Apache-2.0; the entries are sub-word statistics of the texts named above",
    }
    card_path(out).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def words_kept(
    words: Sequence[Sequence[str]], scores: Sequence[NDArray[np.float32]], lexicon: Lexicon, budget: int
) -> float:
    """Mean number of words that a passage keeps at ``budget`` word codes."""
    kept = 0
    for passage, score in zip(words, scores, strict=True):
        costs = np.array(lexicon.costs(passage), dtype=np.int64)
        kept += len(choose_places(passage, word_worth(score, costs), costs.tolist(), budget_bits(budget)))
    return kept / max(len(words), 1)
