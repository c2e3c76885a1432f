"""Ways of keeping passages beside the bank's word codes, each with the bytes it takes: the rivals of ``mbc eval``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mbc_core.lexicon import Lexicon
from mbc_core.words import BYTES_PER_CODE, split_words


@dataclass(frozen=True, slots=True)
class Store:
    """What a store gives back for a row of the bank, and bytes a passage without its address."""

    line: Callable[[int], str]
    bytes_per_passage: float


def one_line(text: str) -> str:
    """Text as a memory line: white space becomes single spaces."""
    return " ".join(text.split())


def cut_bytes(text: str, size: int) -> str:
    """The longest start of ``text`` that takes at most ``size`` bytes of UTF-8; no character is halved.

    >>> cut_bytes("naïve", 3), cut_bytes("naïve", 4)
    ('na', 'naï')
    """
    return text.encode("utf-8", "surrogatepass")[:size].decode("utf-8", "ignore")


def text_codes(text: str, lexicon: Lexicon) -> list[int]:
    """Every word of ``text`` as lexicon codes, in order, repeated as it stands; edge punctuation is left out."""
    return [code for codes in lexicon.encode_words([word.text for word in split_words(text)]) for code in codes]


def first_codes(text: str, most: int, lexicon: Lexicon) -> list[int]:
    """Codes of the first words of ``text`` that pack into ``most`` bytes; the first word too long ends them."""
    taken: list[int] = []
    words = [word.text for word in split_words(text)]
    room = 8 * most
    coded = lexicon.encode_words(words)
    price = lexicon.price(coded)
    for place, codes in enumerate(coded):
        bits = price(place - 1 if place else None, place, None)
        if bits > room:
            break
        taken += codes
        room -= bits
    return taken


def truncated_store(texts: Sequence[str | None], sizes: Sequence[int]) -> Store:
    """Each text's first bytes, as many as ``sizes`` says for it."""
    cut = [None if text is None else cut_bytes(one_line(text), size) for text, size in zip(texts, sizes, strict=True)]
    return _store(cut, [0 if text is None else len(text.encode()) for text in cut])


def first_words_store(texts: Sequence[str | None], sizes: Sequence[int], lexicon: Lexicon) -> Store:
    """Each text's first words as codes of at most ``sizes`` bytes: what salience has to beat."""
    coded = [
        None if text is None else first_codes(text, size, lexicon) for text, size in zip(texts, sizes, strict=True)
    ]
    sizes = [0 if codes is None else len(lexicon.pack(codes)) for codes in coded]
    return _coded_store(coded, sizes, lexicon)


def text_codes_store(texts: Sequence[str | None], lexicon: Lexicon) -> Store:
    """All words of each text as plain 16-bit codes."""
    coded = [None if text is None else text_codes(text, lexicon) for text in texts]
    return _coded_store(coded, [BYTES_PER_CODE * len(codes or ()) for codes in coded], lexicon)


def text_store(texts: Sequence[str | None], bytes_per_passage: float) -> Store:
    """The texts themselves; what they take is measured by a compressor elsewhere."""
    lines = [None if text is None else one_line(text) for text in texts]
    return Store(lambda row: lines[row] or "", bytes_per_passage)


def _coded_store(coded: Sequence[list[int] | None], sizes: Sequence[int], lexicon: Lexicon) -> Store:
    return _store([None if codes is None else lexicon.decode(codes) for codes in coded], sizes)


def _store(lines: Sequence[str | None], sizes: Sequence[int]) -> Store:
    """A store of ready lines; its bytes are the mean over the rows that have one."""
    there = [size for line, size in zip(lines, sizes, strict=True) if line is not None]
    return Store(lambda row: lines[row] or "", sum(there) / max(1, len(there)))
