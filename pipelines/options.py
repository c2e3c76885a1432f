"""What a run may be told: one frozen value for programs, and its command-line form for ``python -m``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.defaults import LEXICON, ROTATION, SALIENCE
from mbc_core.errors import UsageError
from mbc_core.windows import parse_length
from pipelines.encoding import MINILM, SHIPPED, EncoderSource, EncoderSpec
from pipelines.plan import SLICE_DOCUMENTS
from pipelines.read import BATCH_DOCUMENTS
from schemas.manifest import PROFILES, Profile

if TYPE_CHECKING:
    from mbc_core.codebook.update import UpdateRule


@dataclass(frozen=True)
class IngestSettings:
    """How documents are ingested; the defaults fit one machine.

    Attributes:
        profile: name in ``schemas.manifest.PROFILES``; None takes the bank's, or ``default`` for a new bank.
        window_seconds: length of a window; None takes the bank's, or a day for a new bank.
        ingest_id: names the run; None derives it from the documents, so that the same command resumes.
        device: ``cpu``, ``cuda`` or ``auto``. precision: ``auto``, ``float32`` or ``bfloat16``; ``auto`` takes the
            bank's, or what the machine computes natively for a new bank.
        slice_documents: most documents of a slice. shards: files a table and commit (distributed runs).
        batch_documents: most documents an encoder call takes; codes do not depend on it.
        keep_text: store texts too, compressed.
        replay_per_window: most question-answer rows that a window keeps for adaptation, from now on; None takes the
            bank's. 0: this run makes none; what is there stays.
        replay_lifetime: seconds for which they are kept, ``math.inf`` for ever; None takes the bank's.
        staging: folder for the texts of a run; the system's temporary folder when None.
        encoder: what encodes, if not the default. rotation, codebook: files or ``weights:`` references, if not the
            shipped ones. update_rule: when the codebook is updated.
        key_salt: 32 hex digits that key the document hashes of a new bank; random when None. Only banks that must come
            out the same each time, and are thrown away, should fix it.
    """

    profile: str | None = None
    window_seconds: int | None = None
    ingest_id: str | None = None
    device: str = "cpu"
    precision: str = "auto"
    slice_documents: int = SLICE_DOCUMENTS
    shards: int = 1
    batch_documents: int = BATCH_DOCUMENTS
    keep_text: bool = False
    replay_per_window: int | None = None
    replay_lifetime: float | None = None
    staging: Path | None = None
    encoder: EncoderSource | None = None
    rotation: str | None = None
    codebook: str | None = None
    update_rule: UpdateRule | None = None
    key_salt: str | None = None

    def __post_init__(self) -> None:
        for name in ("slice_documents", "batch_documents", "shards"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 1", value=getattr(self, name), fix="give a larger number")
        if (self.replay_per_window or 0) < 0 or not (self.replay_lifetime is None or self.replay_lifetime > 0):
            raise UsageError(
                "replay cannot be kept like this",
                value=(self.replay_per_window, self.replay_lifetime),
                cause="less than no questions, or for no time",
                fix="give a number of at least 0 and a lifetime above 0, or leave replay off",
            )
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(
                "the profile is unknown",
                value=self.profile,
                cause="a misspelt name",
                fix=f"choose one of {', '.join(PROFILES)}",
            )


@dataclass(frozen=True)
class StreamSettings:
    """What only a stream is told.

    Attributes:
        poll: seconds between two looks at a watched folder.
        allowed_lateness: seconds after the end of its window for which a document is taken; None: any time. What comes
            later is a dead letter.
        idle_exit: seconds without anything new after which the stream ends; None: it goes on until it is asked to end.
        event_time_attribute: of Pub/Sub messages; None: the documents' own ``timestamp``, or when they were published.
    """

    poll: float = 5.0
    allowed_lateness: int | None = None
    idle_exit: float | None = None
    event_time_attribute: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("poll", 0.01), ("allowed_lateness", 0), ("idle_exit", 0.01)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(
                    f"`{name}` is too small",
                    value=value,
                    cause=f"it is in seconds, and at least {least:g}",
                    fix="give it like 5s, 30m or 1h",
                )


def stream_settings(
    poll: str | None, allowed_lateness: str | None, idle_exit: str | None, event_time_attribute: str | None
) -> StreamSettings:
    """Settings as the command line gives them; what is None keeps its default.

    Raises:
        UsageError: a length that cannot be read.
    """
    plain = StreamSettings()
    zero = allowed_lateness is not None and allowed_lateness.strip().lower() in ("0", "0s")
    lateness = None if allowed_lateness is None or zero else parse_length(allowed_lateness, "--allowed-lateness")
    return StreamSettings(
        poll=plain.poll if poll is None else parse_length(poll, "--poll"),
        allowed_lateness=0 if zero else lateness,
        idle_exit=None if idle_exit is None else parse_length(idle_exit, "--idle-exit"),
        event_time_attribute=event_time_attribute,
    )


def replay_settings(per_window: int | None, lifetime: str | None, off: bool) -> tuple[int | None, float | None]:
    """``replay_per_window`` and ``replay_lifetime`` as the command line gives them.

    Args:
        lifetime: a length like 90d, or ``never``. off: make no replay.

    Raises:
        UsageError: a length that cannot be read, or a size together with ``off``.
    """
    if off and per_window is not None:
        raise UsageError(
            "--no-replay and --replay-per-window do not go together",
            value=per_window,
            cause="one leaves replay out, the other says how much",
            fix="leave out one of them",
        )
    seconds = None if lifetime is None else math.inf if lifetime == "never" else float(_lifetime(lifetime))
    return (0 if off else per_window), seconds


def _lifetime(text: str) -> int:
    return parse_length(text, "--replay-lifetime")


STREAM_OPTIONS = ("--poll", "--allowed-lateness", "--idle-exit", "--event-time-attribute")


def refuse_without_streaming(given: Mapping[str, object]) -> None:
    """Options of streams are refused in batch: they would do nothing.

    Args:
        given: option → value, None where it was not given.

    Raises:
        UsageError: names the first one given.
    """
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"{name} does nothing without --streaming",
                value=value,
                cause="--streaming was forgotten",
                fix=f"add --streaming, or leave out {name}",
            )


def encoder_of(settings: IngestSettings, profile: Profile, device: str, precision: str) -> EncoderSource:
    """The encoder that the settings name, or the shipped one for this profile."""
    if settings.encoder is not None:
        return settings.encoder
    if not profile.words:
        return EncoderSpec(MINILM, None, None, precision, device)
    return EncoderSpec(MINILM, f"{SHIPPED}{SALIENCE}", f"{SHIPPED}{LEXICON}", precision, device)


def rotation_of(settings: IngestSettings) -> str:
    """Reference to the rotation's file."""
    return settings.rotation or f"{SHIPPED}{ROTATION}"


def codebook_of(settings: IngestSettings, profile: Profile) -> str:
    """Reference to the file of codebook version 0."""
    return settings.codebook or f"{SHIPPED}codebook_t{profile.slots}.safetensors"


@dataclass(frozen=True)
class Arguments:
    """A parsed command line of ``python -m pipelines.ingest``."""

    sources: list[str]
    bank: str
    settings: IngestSettings
    beam_args: list[str]
    as_json: bool
    streaming: StreamSettings | None = None


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read our options; everything else goes to Beam.

    Raises:
        SystemExit: argparse's own, with code 2.
        UsageError: a value that cannot be.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ingest",
        description="Ingest documents into a bank. Beam's own options are written --name=value "
        "(for example --runner=DataflowRunner --temp_location=gs://bucket/tmp).",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="file, folder, glob, s3://…, gs://… or -; with --streaming pubsub://…",
    )
    parser.add_argument("--bank", required=True, help="local path, s3://… or gs://…")
    parser.add_argument("--profile", choices=list(PROFILES), help="codes a passage (a new bank: default)")
    parser.add_argument("--window", help="length of a window, like 1d or 6h (a new bank: 1d)")
    parser.add_argument("--ingest-id", help="name of the run; the same name resumes it (default: from the documents)")
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--slice-documents", type=int, default=SLICE_DOCUMENTS, help="documents made durable at once")
    parser.add_argument("--shards", type=int, default=1, help="files a table and commit")
    parser.add_argument("--keep-text", action="store_true", help="store the texts too, compressed")
    parser.add_argument("--replay-per-window", type=int, help="questions a window keeps for adaptation (bank's; 256)")
    parser.add_argument("--replay-lifetime", help="how long they are kept, like 90d, or never (bank's; 365d)")
    parser.add_argument("--no-replay", action="store_true", help="make no questions in this run")
    parser.add_argument("--staging", type=Path, help="folder for the texts of this run while it lasts")
    parser.add_argument(
        "--streaming", action="store_true", help="watch the sources until SIGTERM, Ctrl-C or --idle-exit"
    )
    parser.add_argument("--poll", help="streaming: time between two looks at a folder (5s)")
    parser.add_argument("--allowed-lateness", help="streaming: how long after its end a window takes documents (ever)")
    parser.add_argument("--idle-exit", help="streaming: end after so long without anything new (never)")
    parser.add_argument("--event-time-attribute", help="streaming: attribute of Pub/Sub messages with the event time")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on standard output")
    found, beam_args = parser.parse_known_args(argv)
    per_window, lifetime = replay_settings(found.replay_per_window, found.replay_lifetime, found.no_replay)
    settings = IngestSettings(
        replay_per_window=per_window,
        replay_lifetime=lifetime,
        profile=found.profile,
        ingest_id=found.ingest_id,
        device=found.device,
        precision=found.precision,
        slice_documents=found.slice_documents,
        shards=found.shards,
        keep_text=found.keep_text,
        staging=found.staging,
    )
    if found.window is not None:
        settings = replace(settings, window_seconds=parse_length(found.window))
    told = {name: getattr(found, name[2:].replace("-", "_")) for name in STREAM_OPTIONS}
    if not found.streaming:
        refuse_without_streaming(told)
    streaming = stream_settings(*told.values()) if found.streaming else None
    return Arguments(found.sources, found.bank, settings, beam_args, found.as_json, streaming)
