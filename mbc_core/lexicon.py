"""The lexicon: a frozen byte-level BPE whose ids are the word codes, and how many bits each takes on storage.

The file is JSON, gzipped when its name ends in ``.gz``. ``merges``: ids 0-255 are the bytes, id 256 upwards what the
merges make, in order (at most 61,440 ids; the rest of 16 bits is reserved). ``bits``: length of each id's code in a
canonical Huffman code, so that a common word costs a few bits and a rare name many. ``code``: the same in the light of
the word before, see :class:`~mbc_core.class_code.ClassCode` and, with followers,
:class:`~mbc_core.follow_code.FollowCode`. Without either every id takes 16.
A word is encoded with a space before it, so codes of several words decode to text with spaces between them,
whatever the words were.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mbc_core.class_code import ClassCode
from mbc_core.errors import DamagedFile, ModelError
from mbc_core.follow_code import FollowCode
from mbc_core.prefix_code import PrefixCode

VOCABULARY = 61_440
"""Most entries a lexicon may have; ids from here to 65,535 are reserved."""

PLAIN_BITS = 16
"""Bits of every id in a lexicon without ``bits``; a profile's budget of word codes is counted in these."""

FORMATS = ("mbc-lexicon-1", "mbc-lexicon-2", "mbc-lexicon-3", "mbc-lexicon-4")
"""Plain, with ``bits``, with ``code``, with ``code`` and followers."""


class Lexicon:
    """Words ↔ codes. Immutable; ``digest`` (sha256, hex) names it in a bank's manifest.

    >>> lexicon = Lexicon([])            # no merges: every byte its own code
    >>> lexicon.decode([code for word in lexicon.encode_words(["on", "30°"]) for code in word])
    'on 30°'
    """

    def __init__(self, merges: Sequence[tuple[str, str]], bits: Sequence[int] | ClassCode | None = None) -> None:
        self.merges = tuple(merges)
        self._content = _canonical(self.merges, bits)
        self.digest = hashlib.sha256(self._content).hexdigest()
        self._tokenizer = _build(self.merges)
        self._size = self._tokenizer.get_vocab_size()
        self.code = _code(bits)
        if bits is not None and len(self.code.lengths) != self._size:
            raise ValueError(f"{len(self.code.lengths)} code lengths for {self._size} entries")
        self._bits: list[int] = self.code.lengths.tolist()
        self._known: dict[str, tuple[list[int], int]] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def bits(self) -> list[int]:
        """Bits that each id takes on storage; with a :class:`ClassCode` by and large, whatever comes before."""
        return self._bits[: self._size]

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read a lexicon file.

        Raises:
            ModelError: there is no such file.
            DamagedFile: it is not a lexicon.
        """
        try:
            stored = path.read_bytes()
        except OSError as error:
            raise ModelError(
                "the lexicon cannot be read",
                value=str(path),
                cause=error.strerror or str(error),
                fix="reinstall the package, or make one with `mbc train lexicon`",
            ) from error
        try:
            fields = json.loads(gzip.decompress(stored) if path.suffix == ".gz" else stored)
            if fields["format"] not in FORMATS:
                raise ValueError(f"format {fields['format']!r}, this release reads {', '.join(FORMATS)}")
            merges = [_pair(entry) for entry in fields["merges"]]
            if fields["format"] == FORMATS[2]:
                return cls(merges, ClassCode.of_fields(fields["code"]))
            if fields["format"] == FORMATS[3]:
                return cls(merges, FollowCode.of_fields(fields["code"]))
            return cls(merges, fields["bits"] if fields["format"] == FORMATS[1] else None)
        except (ValueError, KeyError, TypeError, OverflowError, OSError, EOFError, RecursionError, zlib.error) as error:
            raise DamagedFile(
                "the lexicon file is damaged",
                value=str(path),
                cause=str(error),
                fix="restore the file the bank was made with; word codes have no meaning without it",
            ) from error

    def save(self, path: Path) -> None:
        """Write the file that :meth:`load` reads; equal lexicons give equal bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = gzip.compress(self._content, compresslevel=9, mtime=0) if path.suffix == ".gz" else self._content
        path.write_bytes(stored)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Codes of each word (one or more a word; none for an empty word), each word on its own."""
        return [codes for codes, _ in self._learned(words)]

    def costs(self, words: Sequence[str]) -> list[int]:
        """Bits that each word takes on storage, by and large: see :attr:`bits`."""
        return [bits for _, bits in self._learned(words)]

    def price(self, codes: Sequence[Sequence[int]]) -> Callable[[int | None, int, int | None], int]:
        """What a word adds to a passage: a function of the places of the kept word before, the word, the one after.

        Args:
            codes: of each word of the passage, as :meth:`encode_words` gives them; a word without codes (an empty one)
                has no price and must not be kept.

        Returns:
            bits added by keeping the word at a place, between two kept ones (None: there is none on that side). Added
            up over the words kept, in whatever order they came, they are the bits that :meth:`pack` fills to bytes.
        """
        code = self.code
        inside = [sum(code.after(*pair) for pair in pairwise(own)) for own in codes]

        def added(before: int | None, place: int, after: int | None) -> int:
            own = codes[place]
            left = None if before is None else codes[before][-1]
            bits = inside[place] + code.after(left, own[0])
            if after is not None:
                bits += code.after(own[-1], codes[after][0]) - code.after(left, codes[after][0])
            return bits

        return added

    def pack(self, ids: Sequence[int]) -> bytes:
        """Word codes → bytes, as stored in the bank.

        Raises:
            ValueError: with a :class:`ClassCode`, an id that this lexicon does not have.
        """
        return self.code.pack(ids)

    def unpack(self, stored: bytes) -> list[int]:
        """Stored bytes → word codes.

        Raises:
            DamagedFile: the bytes end inside a code.
        """
        return self.code.unpack(stored)

    def read(self, stored: bytes) -> str:
        """Text of stored bytes, words parted by single spaces.

        Raises:
            DamagedFile: the bytes are not word codes of this lexicon.
        """
        return self.decode(self.unpack(stored))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of word codes, words parted by single spaces.

        Raises:
            DamagedFile: an id that this lexicon does not have.
        """
        codes = [int(code) for code in ids]
        unknown = next((code for code in codes if not 0 <= code < len(self)), None)
        if unknown is not None:
            raise DamagedFile(
                "a word code is not in the lexicon",
                value=unknown,
                cause=f"this lexicon has codes 0 to {len(self) - 1}; the row is damaged or of another lexicon",
                fix="read the bank with the lexicon its manifest names, and run `mbc inspect --verify`",
            )
        return str(self._tokenizer.decode(codes)).strip()

    def _learned(self, words: Sequence[str]) -> list[tuple[list[int], int]]:
        """Codes and bits of words; those that were met lately are remembered.

        Threads share the memory, so a full one is replaced and never emptied: another thread may be reading it.
        """
        known = self._known
        unknown = list(dict.fromkeys(word for word in words if word not in known))
        if unknown and len(known) > _REMEMBERED:
            self._known = known = {}
            unknown = list(dict.fromkeys(words))
        if unknown:
            encodings = self._tokenizer.encode_batch([f" {word}" for word in unknown])
            for word, encoding in zip(unknown, encodings, strict=True):
                ids = encoding.ids if word else []
                known[word] = ids, sum(self._bits[code] for code in ids)
        return [known[word] for word in words]


_REMEMBERED = 200_000  # words whose codes are kept in memory (about 40 MB); text repeats itself


def _code(bits: Sequence[int] | ClassCode | None) -> PrefixCode | ClassCode:
    if isinstance(bits, ClassCode):
        return bits
    return _plain_code() if bits is None else PrefixCode(bits)


@cache
def _plain_code() -> PrefixCode:
    return PrefixCode([PLAIN_BITS] * 2**PLAIN_BITS)


def _canonical(merges: Sequence[tuple[str, str]], bits: Sequence[int] | ClassCode | None) -> bytes:
    form = int(bits is not None)
    if isinstance(bits, ClassCode):
        form = 3 if isinstance(bits, FollowCode) else 2
    fields: dict[str, object] = {"format": FORMATS[form], "merges": [f"{left} {right}" for left, right in merges]}
    if isinstance(bits, ClassCode):
        fields["code"] = bits.fields()
    elif bits is not None:
        fields["bits"] = [int(length) for length in bits]
    return json.dumps(fields, ensure_ascii=False, indent=0).encode("utf-8")


def _pair(entry: object) -> tuple[str, str]:
    left, right = str(entry).split(" ")
    return left, right


def _build(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    vocabulary = {symbol: code for code, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary:
            raise ValueError(f"merge {left!r} + {right!r} does not follow from the merges before it")
        vocabulary.setdefault(left + right, len(vocabulary))  # two merges may spell the same entry
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} entries, but word codes stop at {VOCABULARY - 1} (the rest is reserved)")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    # No splitting inside a word: "U.S.", "24–10" and "don't" may each become one code.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
