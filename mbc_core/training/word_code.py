"""How many bits each word code takes: a code of the words that passages really keep, in their order.

Which words are kept depends on what they cost, so counting and coding take turns; two turns are enough. Classes of
entries (:mod:`~mbc_core.training.word_classes`) are found once, from whole texts and kept words together; lists of
followers (:mod:`~mbc_core.training.word_followers`) in every turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbc_core.class_code import ClassCode, sequence_bits
from mbc_core.errors import UsageError
from mbc_core.follow_code import FollowCode
from mbc_core.lexicon import Lexicon
from mbc_core.prefix_code import PrefixCode
from mbc_core.training.lexicon import card_path
from mbc_core.training.prepared import Prepared
from mbc_core.training.word_classes import Pairs, set_apart, word_classes
from mbc_core.training.word_followers import follow_code
from mbc_core.words import choose_words

BUDGETS = (12, 24, 41)
"""Word codes of the profiles, counted alike."""

CLASSES = 256
"""Of entries. More (512) save less on held-out passages, for want of text to count."""

LEAST_CLASSES = 129
"""Fewer may all get codes shorter than eight bits, and then the filling at a passage's end could read as a class."""

UNSEEN = 0.3
"""Count given to every entry beside what was seen."""


def train_word_code(
    data: Prepared,
    lexicon: Lexicon,
    *,
    budgets: Sequence[int] = BUDGETS,
    classes: int = CLASSES,
    followers: bool = True,
    turns: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> Lexicon:
    """The same entries with bits that suit the words which the passages of ``data`` keep.

    Args:
        data: passages with scored words, see ``mbc train prepare``.
        lexicon: entries; its bits, if it has some, are where the first turn starts.
        budgets: word codes a passage, as in profiles.
        classes: of entries; a code's bits then depend on the class before. Entries that make up most of a class get
            one of their own besides. 0: bits depend on an entry's own frequency alone.
        followers: entries that often follow one another are written as such; without classes there are none.

    Raises:
        UsageError: there are no scored words; fewer than 129 classes, or more than entries.
    """
    words, scores = data.table["words"].to_pylist(), data.table["scores"].to_pylist()
    if not any(words):
        raise UsageError(
            "there are no words to count",
            value=f"{len(words):,} passages",
            cause="they were prepared without a salience head",
            fix="run `mbc train prepare … --salience FILE` first",
        )
    if classes and not LEAST_CLASSES <= classes <= len(lexicon):
        raise UsageError(
            "that many classes of word codes cannot be made",
            value=classes,
            cause=f"a code needs {LEAST_CLASSES} classes at least and an entry for each, of {len(lexicon):,}",
            fix=f"give --classes {min(CLASSES, len(lexicon))}, or 0 for a code without classes",
        )
    scored = [np.asarray(one, dtype=np.float32) for one in scores]
    found = None
    for turn in range(turns):
        kept = chosen(words, scored, lexicon, budgets)
        if classes and found is None:
            whole = [np.array([code for word in lexicon.encode_words(one) for code in word]) for one in words]
            found = word_classes(Pairs.of([*kept, *whole], len(lexicon)), classes, say=say)
            found = set_apart(found, _counts(kept, len(lexicon)))
        if found is not None and followers:
            lexicon = Lexicon(lexicon.merges, follow_code(kept, whole, found, weight=1 / len(budgets)))
        else:
            lexicon = _coded(lexicon, kept, found)
        count = sum(len(one) for one in kept)
        bits = sum(stored_bits(lexicon, one) for one in kept) / max(count, 1)
        say(f"turn {turn + 1}: {count:,} codes kept, {bits:.2f} bits a code")
    return lexicon


def _coded(lexicon: Lexicon, kept: Sequence[NDArray[np.uint16]], classes: NDArray[np.int64] | None) -> Lexicon:
    """Entries of ``lexicon`` with the bits that suit ``kept``."""
    if classes is not None:
        return Lexicon(lexicon.merges, ClassCode.from_sequences(kept, classes.tolist(), unseen=UNSEEN))
    return Lexicon(lexicon.merges, PrefixCode.from_counts(_counts(kept, len(lexicon)) + UNSEEN).lengths.tolist())


def _counts(kept: Sequence[NDArray[np.uint16]], entries: int) -> NDArray[np.float64]:
    """How often each entry is kept: float64 [entries]."""
    return np.bincount(np.concatenate(kept), minlength=entries).astype(np.float64)


def chosen(
    words: Sequence[Sequence[str]],
    scores: Sequence[NDArray[np.float32]],
    lexicon: Lexicon,
    budgets: Sequence[int],
) -> list[NDArray[np.uint16]]:
    """Word codes that each passage keeps at each of the ``budgets``, passage by passage."""
    pairs = zip(words, scores, strict=True)
    return [choose_words(passage, score, budget, lexicon) for passage, score in pairs for budget in budgets]


def stored_bits(lexicon: Lexicon, codes: Sequence[int] | NDArray[np.uint16]) -> int:
    """Bits of a passage's word codes, before they are filled to bytes."""
    return sequence_bits(lexicon.code, [int(code) for code in codes])


def kept_at(
    words: Sequence[Sequence[str]], scores: Sequence[NDArray[np.float32]], lexicon: Lexicon, budget: int
) -> tuple[float, float]:
    """Mean bits of a code and mean number of codes that a passage keeps at ``budget``."""
    kept = chosen(words, scores, lexicon, [budget])
    count = sum(len(one) for one in kept)
    return sum(stored_bits(lexicon, one) for one in kept) / max(count, 1), count / max(len(kept), 1)


def write_card(out: Path, before: Path, coded: Lexicon, data: Prepared) -> dict[str, object]:
    """Write the card beside the file ``out``; ``before`` is the file whose entries, and card, it goes on from."""
    entries = json.loads(card_path(before).read_text(encoding="utf-8")) if card_path(before).exists() else {}
    words = data.table["words"].to_pylist()
    scores = [np.asarray(one, dtype=np.float32) for one in data.table["scores"].to_pylist()]
    kept = {}
    for budget in BUDGETS:
        bits, codes = kept_at(words, scores, coded, budget)
        plain = kept_at(words, scores, Lexicon(coded.merges), budget)[1]
        kept[str(budget)] = {
            "bits_per_code": round(bits, 2),
            "codes": round(codes, 1),
            "codes_at_16_bits": round(plain, 1),
        }
    card: dict[str, object] = {
        "what": f"byte-level BPE lexicon with a Huffman code{_kind(coded)}: word codes",
        "entries": len(coded),
        "digest": coded.digest,
        "file_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "entries_of": Lexicon.load(before).digest,
        "trained_on": entries.get("trained_on", []),
        "classes": int(coded.code.classes.max()) + 1 if isinstance(coded.code, ClassCode) else 0,
        "followers": _followers(coded),
        "bits": {"shortest": min(coded.bits), "longest": max(coded.bits)},
        "counted_on": {"passages": len(data), **data.sources},
        "kept_by_budget": kept,
        "licence": "Apache-2.0; the entries are sub-word statistics of the texts named above",
    }
    card_path(out).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _kind(lexicon: Lexicon) -> str:
    """What the code knows beside how frequent an entry is."""
    if isinstance(lexicon.code, FollowCode):
        return " in classes of entries, with followers"
    return " in classes of entries" if isinstance(lexicon.code, ClassCode) else ""


def _followers(lexicon: Lexicon) -> dict[str, int]:
    """How many entries have followers, and how many those are together."""
    lists = lexicon.code.followers if isinstance(lexicon.code, FollowCode) else None
    return {"leaders": len(lists.leaders) if lists else 0, "pairs": len(lists.symbols) if lists else 0}
