"""The plain loop: what a bank must hold, computed one passage at a time with nothing but ``mbc_core``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tiny import RULE, SLOTS, TinyEncoder, codebook, rotation

from mbc_core.bank import Bank
from mbc_core.codebook.chain import CodebookChain
from mbc_core.codebook.statistics import BatchStatistics
from mbc_core.codes import pack, quantize, to_slots
from mbc_core.lexicon import Lexicon
from mbc_core.passages import split_passages
from mbc_core.words import choose_words
from schemas.manifest import Manifest
from schemas.tables import UNDATED

DAY_MICROS = 86_400_000_000
SALT = "000102030405060708090a0b0c0d0e0f"


@dataclass(frozen=True)
class Expected:
    """Code rows by (key, passage): (window, event time, address, words, version); digests of the versions."""

    codes: dict[tuple[int, int], tuple[str, int | None, bytes, bytes, int]]
    digests: list[str]


def window_name(event_time: int | None) -> str:
    if event_time is None:
        return UNDATED
    return f"{np.datetime64(event_time // DAY_MICROS * DAY_MICROS, 'us').astype('datetime64[s]')}Z"


def plain_loop(documents, words: int = 24) -> Expected:
    """Walk windows in order; encode, quantize and add up each passage alone."""
    chain = CodebookChain([codebook()], rule=RULE)
    salt, turn, encoder, lexicon = bytes.fromhex(SALT), rotation(), TinyEncoder(), Lexicon([])
    by_window: dict[str, list] = {}
    for one in documents:
        by_window.setdefault(window_name(one.event_time), []).append(one)
    codes = {}
    for window in sorted(by_window, key=lambda name: (name != UNDATED, name)):
        book = chain.version_for(window)
        total = BatchStatistics.zero(book.size, book.width, book.version)
        for one in by_window[window]:
            for number, passage in enumerate(split_passages(one.text, encoder.count_pieces)):
                (encoded,) = encoder.encode([passage])
                z = to_slots(encoded.embedding[None], turn, SLOTS)
                code = quantize(z, book.codewords)
                key = one.key(salt)
                chosen = lexicon.pack(choose_words(encoded.words, encoded.scores, words, lexicon).tolist())
                codes[key, number] = (window, one.event_time, pack(code).tobytes(), chosen, book.version)
                total += BatchStatistics.of(book, z, code, np.array([key]), np.array([number], np.int32))
        chain.add(window, total)
    return Expected(codes, [one.digest for one in chain.versions])


def empty_bank(uri, settings, words: int = 24) -> Bank:
    """A bank with a fixed salt, so that two banks of the same documents hold the same keys."""
    loaded = settings.encoder.load()
    manifest = Manifest(
        profile=settings.profile or "default",
        encoder=loaded.encoder.encoder_id,
        slots=SLOTS,
        codewords=codebook().size,
        width=codebook().width,
        words=words,
        rotation=rotation().digest,
        salience=loaded.encoder.salience_digest,
        lexicon=loaded.lexicon.digest,
        key_salt=SALT,
    )
    return Bank.create(uri, manifest, codebook())


def held(bank: Bank) -> Expected:
    """What a bank holds, in the same form."""
    rows = bank.read("codes").to_pylist()
    found = {
        (row["key"], row["passage"]): (
            row["window"],
            None if row["event_time"] is None else int(row["event_time"].timestamp() * 1e6 + 0.5),
            row["address"],
            row["words"],
            row["codebook_version"],
        )
        for row in rows
    }
    assert len(found) == len(rows), "a passage is stored twice"
    return Expected(found, [one.digest for one in bank.codebooks().versions])
