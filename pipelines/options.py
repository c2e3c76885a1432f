"""What a run may be told: one frozen value for programs, and its command-line form for ``python -m``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.defaults import LEXICON, ROTATION, SALIENCE
from mbc_core.errors import UsageError
from mbc_core.windows import parse_length
from pipelines.encoding import MINILM, SHIPPED, EncoderSource, EncoderSpec
from pipelines.plan import SLICE_DOCUMENTS
from pipelines.read import BATCH_DOCUMENTS
from pipelines.sink import REPLAY_PER_WINDOW
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
        replay_per_window: most question-answer rows that a window keeps for adaptation.
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
    replay_per_window: int = REPLAY_PER_WINDOW
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
        if self.profile is not None and self.profile not in PROFILES:
            raise UsageError(
                "the profile is unknown",
                value=self.profile,
                cause="a misspelt name",
                fix=f"choose one of {', '.join(PROFILES)}",
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
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, glob, s3://…, gs://… or -")
    parser.add_argument("--bank", required=True, help="local path, s3://… or gs://…")
    parser.add_argument("--profile", choices=list(PROFILES), help="codes a passage (a new bank: default)")
    parser.add_argument("--window", help="length of a window, like 1d or 6h (a new bank: 1d)")
    parser.add_argument("--ingest-id", help="name of the run; the same name resumes it (default: from the documents)")
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--slice-documents", type=int, default=SLICE_DOCUMENTS, help="documents made durable at once")
    parser.add_argument("--shards", type=int, default=1, help="files a table and commit")
    parser.add_argument("--keep-text", action="store_true", help="store the texts too, compressed")
    parser.add_argument("--staging", type=Path, help="folder for the texts of this run while it lasts")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on standard output")
    found, beam_args = parser.parse_known_args(argv)
    settings = IngestSettings(
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
    return Arguments(found.sources, found.bank, settings, beam_args, found.as_json)
