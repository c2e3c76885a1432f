"""Opening a bank for an ingest, in batch or live: made with the settings, or checked against them."""

from __future__ import annotations

from dataclasses import dataclass

from mbc_core.bank import Bank, Storage
from mbc_core.bank.replay import ReplayPolicy, set_policy
from mbc_core.codebook.files import Codebook
from mbc_core.codes import Rotation
from mbc_core.windows import DAY
from pipelines.encoding import EncoderSource, acquire, resolve, resolve_device
from pipelines.graph import Job
from pipelines.options import IngestSettings, codebook_of, encoder_of, rotation_of
from pipelines.plain import EncodeRule
from schemas.manifest import PROFILES, Manifest


@dataclass(frozen=True)
class Opened:
    """A bank, and what encodes for it."""

    bank: Bank
    encoder: EncoderSource
    rotation: Rotation
    replay: ReplayPolicy | None
    """None: this run makes no replay."""


def open_bank(uri: str, settings: IngestSettings) -> Opened:
    """The bank, made with these settings or checked against them before anything is read.

    Raises:
        IncompatibleBank: it was made with other settings. UsageError, StorageError: it cannot be opened.
    """
    storage = Storage(uri)
    there = Bank.open(uri).manifest if storage.exists("manifest.json") else None
    profile = PROFILES[settings.profile or (there.profile if there else "default")]
    precision = settings.precision
    if precision == "auto" and there is not None and there.encoder.count("/") >= 2:
        precision = there.encoder.rsplit("/", 2)[1]  # a bank keeps the precision it was made with
    source = encoder_of(settings, profile, resolve_device(settings.device), precision)
    loaded = acquire(source)
    rotation = Rotation.load(resolve(rotation_of(settings)))
    book_path = resolve(codebook_of(settings, profile))
    book = Codebook.from_bytes(book_path.read_bytes(), str(book_path))
    words = profile.words > 0 and loaded.lexicon is not None
    salt = {"key_salt": settings.key_salt} if settings.key_salt is not None else {}
    manifest = Manifest(
        profile=profile.name,
        encoder=loaded.encoder.encoder_id,
        slots=profile.slots,
        codewords=book.size,
        width=book.width,
        words=profile.words,
        rotation=rotation.digest,
        salience=loaded.encoder.salience_digest if words else "",
        lexicon=loaded.lexicon.digest if words and loaded.lexicon is not None else "",
        window_seconds=settings.window_seconds or (there.window_seconds if there else DAY),
        **salt,
    )
    bank = Bank.open_or_create(uri, manifest, book)
    off = settings.replay_per_window == 0
    policy = set_policy(bank, None if off else settings.replay_per_window, settings.replay_lifetime)
    return Opened(bank, source, rotation, None if off else policy)


def job_of(opened: Opened, settings: IngestSettings) -> Job:
    """What the graph needs to know."""
    rule = EncodeRule(opened.bank.manifest.words, settings.keep_text, replay=opened.replay is not None)
    return Job(opened.bank, opened.encoder, opened.rotation, rule, settings.update_rule, settings.shards)
