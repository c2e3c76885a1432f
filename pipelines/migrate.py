"""Making a bank anew: `mbc migrate --bank OLD --to NEW [--source …]`.

Codes are never transcoded: another encoder, profile or codebook, and a bank whose codebook versions are used up, need
the texts again. They come from the sources that are given or, for a bank made with ``--keep-text``, from the bank
itself. The new bank has the old one's salt, so that its documents keep their keys and what was forgotten stays
forgotten. Migration is an ingest under a fixed id: interrupted, the same command goes on from where it stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from mbc_core.bank import Bank, Storage
from mbc_core.bank.forget import RECEIPTS
from mbc_core.bank.tombstones import FOLDER as TOMBSTONES
from mbc_core.bank.visible import newest_revisions
from mbc_core.errors import MbcError, UsageError
from pipelines.ingest import run_ingest
from pipelines.opening import open_bank
from pipelines.options import IngestSettings
from pipelines.readers import read_source
from pipelines.sources import STDIN, Source, find_sources
from schemas.document import Document

_SHOWN = 3


class MigrateResult(TypedDict):
    """``mbc migrate --json``: documents = from_sources + changed + from_text, all of the old bank's.

    ``from_sources``: their content is the old bank's; ``changed``: the source's is another, and the old bank has no
    text of its own; ``not_in_bank``: records of the sources left alone, with those that could not be read.
    """

    ingest_id: str
    documents: int
    from_sources: int
    changed: int
    from_text: int
    dead_letters: int
    not_in_bank: int
    tombstones: int
    passages: int
    codebook_version: int
    seconds: float


def run_migrate(
    bank: str,
    to: str,
    sources: Sequence[str] = (),
    settings: IngestSettings | None = None,
    *,
    show_progress: bool | None = None,
) -> MigrateResult:
    """Re-encode the newest revision of every document of ``bank`` into the new bank ``to``.

    Older revisions, dead letters and adapters stay behind; as-of reads of the new bank begin with the migration.

    Args:
        bank: the old one. to: where nothing is yet, or an interrupted migration of the same bank.
        sources: files, folders or globs that hold the documents' texts.
        settings: encoder, profile, device and so on; the release's own when None. The salt and the window length are
            always the old bank's, the profile and whether texts are stored are unless given.
        show_progress: on standard error; None shows it on terminals only.

    Raises:
        UsageError: texts are missing, or the new place holds something else.
        MbcError: the new bank does not hold every document in the end.
    """
    began = time.monotonic()
    old = Bank.open(bank)
    wanted = _wanted(old)
    chosen = _choose(old, wanted, sources)
    _require_texts(old, wanted, chosen)
    given = _settings(old, settings or IngestSettings(), bool(wanted.stored.any()))
    _require_empty(old, to, given)
    new = open_bank(to, given).bank
    tombstones = _carry_tombstones(old, new)
    _carry_canary(old, new)
    records = _records(old, wanted, chosen)
    done = run_ingest([], to, given, show_progress=show_progress, records=records)
    _require_all(wanted, new, done)
    return MigrateResult(
        ingest_id=done["ingest_id"],
        documents=len(wanted.keys),
        from_sources=chosen.same,
        changed=len(chosen.places) - chosen.same,
        from_text=len(wanted.keys) - len(chosen.places),
        dead_letters=done["dead_letters"],
        not_in_bank=chosen.not_in_bank,
        tombstones=tombstones,
        passages=done["passages"],
        codebook_version=done["codebook_version"],
        seconds=round(time.monotonic() - began, 3),
    )


# --------------------------------------------------------------------------------------------------- what is wanted


@dataclass(frozen=True)
class _Wanted:
    """The newest revision of every document of the old bank, by ascending key.

    Attributes:
        keys, added: int64 [n]. hashes: the content hash of each. stored: bool [n], whether its text is in the bank.
    """

    keys: np.ndarray
    added: np.ndarray
    hashes: list[bytes]
    stored: np.ndarray

    def place(self, key: int) -> int:
        """Place of ``key``, or -1."""
        place = int(np.searchsorted(self.keys, key))
        return place if place < len(self.keys) and self.keys[place] == key else -1


def _wanted(old: Bank) -> _Wanted:
    codes = old.read("codes", ["key", "added_at"])
    codes = codes.filter(pa.array(newest_revisions(codes)))
    keys, first = np.unique(codes["key"].to_numpy(), return_index=True)
    added = codes["added_at"].cast(pa.int64()).to_numpy()[first]
    hashes, stored = [b""] * len(keys), np.zeros(len(keys), bool)
    found = _Wanted(keys, added, hashes, stored)
    for rows in _document_files(old):
        texts = rows["text_zstd"].is_valid().to_pylist()
        for place, row in _visible_rows(found, rows.select(["key", "added_at", "content_hash"])):
            hashes[place] = row["content_hash"]
            stored[place] |= texts[row["number"]]
    return found


def _document_files(old: Bank) -> Iterator[pa.Table]:
    """One file of documents after the other: texts need not all fit into memory."""
    for path, _ in old.files("documents"):
        yield old.read_file("documents", path)


def _visible_rows(wanted: _Wanted, rows: pa.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place in ``wanted``, row and its number in the file) of the rows that the bank shows."""
    moments = rows["added_at"].cast(pa.int64()).to_numpy()
    keys = rows["key"].to_numpy()
    for number in range(rows.num_rows):
        place = wanted.place(int(keys[number]))
        if place >= 0 and wanted.added[place] == moments[number]:
            yield place, {**rows.slice(number, 1).to_pylist()[0], "number": number}


# --------------------------------------------------------------------------------------------------- where texts are


@dataclass
class _Chosen:
    """Which record of the sources stands for which document.

    Attributes:
        places: key → (number of the source, number of the record in it).
        same: how many of them have the content that the old bank shows. not_in_bank: other records.
    """

    sources: tuple[Source, ...] = ()
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    same: int = 0
    not_in_bank: int = 0


def _choose(old: Bank, wanted: _Wanted, sources: Sequence[str]) -> _Chosen:
    """Read the sources once; of several records of a document the one the bank shows, else the newest."""
    if not sources:
        return _Chosen()
    chosen = _Chosen(find_sources(sources).sources)
    if any(one.path == STDIN for one in chosen.sources):
        raise UsageError(
            "standard input cannot be a source of a migration",
            value=STDIN,
            cause="the sources are read twice",
            fix="write the documents to a file and name it",
        )
    salt = old.manifest.salt
    best: dict[int, tuple[bool, int, bytes]] = {}
    for where, record in _numbered(chosen.sources):
        key = record.key(salt) if isinstance(record, Document) else None
        place = -1 if key is None else wanted.place(key)
        if key is None or place < 0 or not isinstance(record, Document):
            chosen.not_in_bank += 1
            continue
        content = record.content_hash(salt)
        rank = (content == wanted.hashes[place], -1 if record.event_time is None else record.event_time, content)
        if not rank[0] and wanted.stored[place]:
            continue  # the bank's own text is what it shows
        if key not in best or rank > best[key]:
            best[key], chosen.places[key] = rank, where
    chosen.same = sum(rank[0] for rank in best.values())
    return chosen


def _numbered(sources: Sequence[Source]) -> Iterator[tuple[tuple[int, int], object]]:
    for number, source in enumerate(sources):
        for position, record in enumerate(read_source(source)):
            yield (number, position), record


def _require_texts(old: Bank, wanted: _Wanted, chosen: _Chosen) -> None:
    """Refuse before anything is written."""
    missing = [key for key, stored in zip(wanted.keys.tolist(), wanted.stored.tolist(), strict=True)
               if not stored and key not in chosen.places]  # fmt: skip
    if missing:
        names = [str(row["doc_id"]) for row in old.documents(missing[:_SHOWN]).values()]
        raise UsageError(
            f"the texts of {len(missing)} of {len(wanted.keys)} documents are not known",
            value=sorted(names) + (["…"] if len(missing) > _SHOWN else []),
            cause="the bank was made without --keep-text, and no source that was given holds them",
            fix="name the files they came from with --source; texts cannot be made from codes",
        )


# -------------------------------------------------------------------------------------------------------- the new bank


def _settings(old: Bank, given: IngestSettings, stored: bool) -> IngestSettings:
    name = hashlib.blake2b(old.manifest.salt, digest_size=8).hexdigest()
    replay = old.replay_policy()
    return replace(
        given,
        replay_per_window=replay.per_window if given.replay_per_window is None else given.replay_per_window,
        replay_lifetime=replay.lifetime if given.replay_lifetime is None else given.replay_lifetime,
        profile=given.profile or old.manifest.profile,
        window_seconds=old.manifest.window_seconds,
        ingest_id=f"migrate-{name}",
        key_salt=old.manifest.key_salt,
        keep_text=given.keep_text or stored,
    )


def _require_empty(old: Bank, to: str, given: IngestSettings) -> None:
    """The new place must be empty, or hold this very migration, interrupted."""
    place = Storage(to)
    if place.uri == old.uri:
        raise UsageError(
            "a bank cannot be migrated onto itself",
            value=to,
            cause="--bank and --to name the same place",
            fix="name a new place with --to; move it to the old one's when it is done",
        )
    if not place.exists("manifest.json"):
        return
    there = Bank.open(to)
    others = set(there.read("ledger", ["ingest_id"])["ingest_id"].to_pylist()) - {given.ingest_id}
    if there.manifest.key_salt != old.manifest.key_salt or others:
        raise UsageError(
            "another bank is there already",
            value=to,
            cause="documents were ingested into it, or it was made by another migration",
            fix="name a new place with --to",
        )


def _carry_tombstones(old: Bank, new: Bank) -> int:
    """Copy what says which documents were forgotten, with its receipts; keyed by the salt that both banks have."""
    from mbc_core.bank.tombstones import load_tombstones

    for folder in (TOMBSTONES, RECEIPTS):
        for one in old.storage.list(folder):
            new.storage.write_new(one.path, old.storage.read_bytes(one.path))
    return len(load_tombstones(new))


def _carry_canary(old: Bank, new: Bank) -> None:
    """Copy the canary set that counts: its lines are text, so no other codebook or profile changes it."""
    from mbc_core.canary import canary_files

    for path in canary_files(old)[-1:]:
        new.storage.write_new(path, old.storage.read_bytes(path))


@dataclass(frozen=True, slots=True)
class _Stored(Document):
    """A document read back from a bank: its content hash is the one of what was once ingested."""

    stored_hash: bytes = b""

    def content_hash(self, salt: bytes) -> bytes:
        """16 bytes, as stored: the same document from its source is a duplicate of this one."""
        return self.stored_hash


def _records(old: Bank, wanted: _Wanted, chosen: _Chosen) -> Iterator[Document]:
    """Every document once: from the sources first, then from the bank's own texts."""
    for where, record in _numbered(chosen.sources):
        if isinstance(record, Document) and chosen.places.get(record.key(old.manifest.salt)) == where:
            yield record
    if len(chosen.places) < len(wanted.keys):
        yield from _stored_documents(old, wanted, chosen)


def _stored_documents(old: Bank, wanted: _Wanted, chosen: _Chosen) -> Iterator[Document]:
    import zstandard

    unpacker, questions, seen = zstandard.ZstdDecompressor(), _questions(old), set(chosen.places)
    for rows in _document_files(old):
        for _, row in _visible_rows(wanted, rows):
            key = row["key"]
            if key in seen or row["text_zstd"] is None:
                continue
            seen.add(key)
            yield _Stored(
                row["doc_id"],
                unpacker.decompress(row["text_zstd"]).decode(),
                row["title"],
                row["uri"],
                None if row["event_time"] is None else _microseconds(row["event_time"]),
                tuple(questions.get(key, ())),
                row["content_hash"],
            )


def _questions(old: Bank) -> dict[int, list[tuple[str, str]]]:
    """The questions that the old bank keeps, by document: the new one asks the same."""
    found: dict[int, list[tuple[str, str]]] = {}
    for row in old.replay().select(["key", "question", "answer"]).to_pylist():
        found.setdefault(row["key"], []).append((row["question"], row["answer"]))
    return found


def _microseconds(moment: datetime) -> int:
    return int(np.datetime64(moment.replace(tzinfo=None), "us").astype(np.int64))


def _require_all(wanted: _Wanted, new: Bank, done: dict[str, Any]) -> None:
    there = np.unique(new.read("codes", ["key"])["key"].to_numpy())
    missing = int((~np.isin(wanted.keys, there)).sum())
    if missing != done["dead_letters"]:
        raise MbcError(
            "the new bank does not hold every document of the old one",
            value=f"{len(wanted.keys)} there, {missing} missing, {done['dead_letters']} of them dead letters",
            cause="the old bank or the sources were changed while it was migrated",
            fix="run the same command again",
        )
