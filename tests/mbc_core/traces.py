"""Looks for anything of a document in every file of a bank, decoded in every way, and in every old Delta version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import zstandard
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from safetensors import safe_open

from mbc_core.bank import Bank
from schemas.document import document_key
from schemas.tables import TABLES

Decode = Callable[[bytes], str]


@dataclass
class Planted:
    """What is looked for.

    Attributes:
        doc_id: its id. strings: title, uri, unique words, question and answer. payloads: bytes the bank made of it.
    """

    doc_id: str
    strings: Sequence[str]
    payloads: list[bytes] = field(default_factory=list)

    def learn(self, bank: Bank) -> None:
        """Remember what the bank stores of it now: codes, words, content hashes, of every revision."""
        key = document_key(self.doc_id, bank.manifest.salt)
        for table, columns in (("codes", ("address", "words")), ("documents", ("content_hash", "text_zstd"))):
            for row in bank.read(table).to_pylist():
                if row["key"] == key:
                    self.payloads += [row[name] for name in columns if row[name] and len(row[name]) >= 6]

    def needles(self, salt: bytes) -> list[bytes]:
        """All of it as bytes, with the key in both byte orders and as logs spell it."""
        key = document_key(self.doc_id, salt)
        texts = [self.doc_id, *self.strings, str(key)]
        orders = ("little", "big")
        return [one.encode() for one in texts] + [key.to_bytes(8, one, signed=True) for one in orders] + self.payloads


def traces(bank: Bank, planted: Planted, decode: Decode) -> list[str]:
    """`file: what was found`, for every file below the bank's folder (hidden and unfinished ones too) and version."""
    needles = planted.needles(bank.manifest.salt)
    found = []
    for folder, _, names in os.walk(bank.uri):
        for name in names:
            path = Path(folder, name)
            found += _hits(str(path.relative_to(bank.uri)), needles, _readings(path, decode))
    for table in TABLES:
        for version in range(bank.table(table).version() + 1):
            try:
                files = DeltaTable(bank.storage.locate(table), version=version).file_uris()
            except DeltaError:
                continue  # cut off
            for path in map(Path, files):
                if path.exists():
                    found += _hits(f"{table}@{version}", needles, _readings(path, decode))
    return sorted(set(found))


def _hits(where: str, needles: Sequence[bytes], readings: Iterator[bytes]) -> list[str]:
    data = where.encode() + b"\0" + b"\0".join(readings)
    return [f"{where}: {one[:40]!r}" for one in needles if one in data]


def _readings(path: Path, decode: Decode) -> Iterator[bytes]:
    """The file's bytes, and whatever can be decoded of them."""
    raw = path.read_bytes()
    yield raw
    if raw[:4] == b"PAR1":
        yield from _parquet(path, decode)
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as opened:
            yield repr(opened.metadata()).encode()
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield opened.get_tensor(name).tobytes()


def _parquet(path: Path, decode: Decode) -> Iterator[bytes]:
    try:
        opened = pq.ParquetFile(path)
    except Exception:  # half a file: its raw bytes were looked at
        return
    meta = opened.metadata
    yield repr(meta.metadata).encode() + repr(meta.to_dict()).encode()
    for row in opened.read().to_pylist():
        for name, value in row.items():
            yield from _value(name, value, decode)


def _value(name: str, value: object, decode: Decode) -> Iterator[bytes]:
    if isinstance(value, dict | list):
        yield repr(value).encode()
    elif isinstance(value, bytes):
        yield value
        if name == "words":
            yield decode(value).encode()
        elif name == "text_zstd":
            yield zstandard.ZstdDecompressor().decompress(value, max_output_size=1 << 24)
    elif isinstance(value, int) and name in ("key", "candidate_keys"):
        yield value.to_bytes(8, "little", signed=True)
    elif value is not None:
        yield str(value).encode()
