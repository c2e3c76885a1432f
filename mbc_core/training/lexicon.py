"""Train the lexicon: byte-level BPE over the words of a corpus, 61,440 entries."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mbc_core.errors import UsageError
from mbc_core.lexicon import VOCABULARY, Lexicon
from mbc_core.words import split_words

LONGEST_WORD = 40
"""Characters; longer runs (addresses, hashes) would buy entries that nobody meets again."""


def train_lexicon(
    texts: Iterable[str],
    out: Path,
    vocabulary: int = VOCABULARY,
    *,
    sources: Sequence[str] = (),
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Learn merges from ``texts``, write the lexicon to ``out`` and its card beside it (``<name>.card.json``).

    Words are cut and stripped exactly as those that become codes later, so an entry may hold a whole "U.S.-led" or
    "1990s". Equal texts give equal bytes.

    Args:
        texts: the corpus; each text is read once.
        out: ``….json`` or ``….json.gz``.
        vocabulary: entries, the 256 bytes included.
        sources: names for the card.
        log: told about progress.

    Returns:
        The card.

    Raises:
        UsageError: no words in the corpus, or a vocabulary that 16-bit codes cannot hold.
    """
    if not 256 < vocabulary <= VOCABULARY:
        raise UsageError(
            "the lexicon's size is out of range",
            value=vocabulary,
            cause="word codes are 16 bits with some reserved, and each byte needs an entry",
            fix=f"ask for 257 to {VOCABULARY} entries",
        )
    counts = count_words(texts)
    if not counts:
        raise UsageError("the lexicon's corpus has no words", cause="the texts are empty", fix="give it text files")
    if log is not None:
        log(f"{counts.total():,} words, {len(counts):,} distinct")
    lexicon = Lexicon(_merges(counts, vocabulary))
    lexicon.save(out)
    card = {
        "what": "byte-level BPE lexicon: word codes of the bank",
        "entries": len(lexicon),
        "digest": lexicon.digest,
        "file_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "trained_on": list(sources),
        "words": counts.total(),
        "distinct_words": len(counts),
        "codes_per_word_on_training_text": round(codes_per_word(lexicon, counts), 4),
        "licence": "Apache-2.0; the entries are sub-word statistics of the texts named above",
    }
    card_path(out).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if log is not None:
        log(f"{len(lexicon):,} entries, {card['codes_per_word_on_training_text']} codes a word → {out}")
    return card


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, as :func:`mbc_core.words.split_words` cuts them."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word.text for word in split_words(text) if len(word.text) <= LONGEST_WORD)
    return counts


def codes_per_word(lexicon: Lexicon, counts: Counter[str]) -> float:
    """Mean number of codes a word, each word weighted by its count."""
    codes = lexicon.encode_words(list(counts))
    return sum(len(code) * count for code, count in zip(codes, counts.values(), strict=True)) / counts.total()


def card_path(out: Path) -> Path:
    """``lexicon.json.gz`` → ``lexicon.card.json``."""
    return out.with_name(out.name.split(".")[0] + ".card.json")


def _merges(counts: Counter[str], vocabulary: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    # Sorted, so that ties between equally frequent pairs do not depend on the corpus' order.
    words = (f" {word}" for word, count in sorted(counts.items()) for _ in range(count))
    tokenizer.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
