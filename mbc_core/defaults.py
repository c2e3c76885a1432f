"""The pieces used when nobody names others: the fetched models and the weights that come with the release.

A bank's manifest says which pieces its codes need; the functions that take one check it, by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core import weights
from mbc_core.assets import ASSETS, GgufModel, cache_root, ensure
from mbc_core.errors import DamagedFile, IncompatibleBank, ModelError

if TYPE_CHECKING:
    from mbc_core.codebook.files import Codebook
    from mbc_core.codes import Rotation
    from mbc_core.encoder import PassageEncoder
    from mbc_core.lexicon import Lexicon
    from mbc_core.query_map import QueryMap
    from mbc_core.reader.language_model import LanguageModel
    from schemas.manifest import Manifest

LEXICON = "lexicon.json.gz"
SALIENCE = "salience.safetensors"
ROTATION = "rotation.safetensors"
READER = "reader"
ATTEND = "attend"
PAPER = "paper_t{slots}"
"""Weights of the aggregate read, one folder a T."""
_CARDS = {LEXICON: "lexicon.card.json"}
"""Cards that are not named like their file; a card holds the file's digest."""


def shipped(name: str) -> Path:
    """A file of shipped weights, compared with the digest on its card.

    Raises:
        ModelError: this installation lacks it.
        DamagedFile: it is not the file that its card describes.
    """
    path = weights.path(name)
    if not path.exists():
        raise ModelError(
            "the installation lacks a weight file",
            value=str(path),
            cause="the package was built without its data files, or they were removed",
            fix="reinstall mbc, or make the file with `mbc train`",
        )
    _check_digest(path, weights.path(_CARDS.get(name, f"{name.split('.')[0]}.json")))
    return path


def _check_digest(file: Path, card: Path) -> None:
    try:
        told = json.loads(card.read_text("utf-8"))
        wanted = str(told.get("files", {}).get(file.name) or told.get("file_sha256") or told["digest"])
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as error:
        raise DamagedFile(
            "a weight file cannot be compared with its card",
            value=str(file),
            cause=f"{card.name}: {error!r}",
            fix="reinstall mbc, or make the weights and their card anew with `mbc train`",
        ) from error
    if found != wanted:
        raise DamagedFile(
            f"the weight file {file} does not match its card",
            value=f"{found[:12]}…",
            cause=f"{card.name} records {wanted[:12]}…: the file was damaged, or replaced without its card",
            fix="reinstall mbc, or make the weights and their card anew with `mbc train`",
        )


def lexicon() -> Lexicon:
    """The shipped lexicon."""
    from mbc_core.lexicon import Lexicon

    return Lexicon.load(shipped(LEXICON))


def lexicon_for(manifest: Manifest) -> Lexicon | None:
    """The lexicon that a bank's word codes need; None when it has none.

    Raises:
        IncompatibleBank: the bank was made with another lexicon than the shipped one.
    """
    if not manifest.words:
        return None
    found = lexicon()
    _require("lexicon", found.digest, manifest.lexicon)
    return found


def rotation() -> Rotation:
    """The shipped rotation R."""
    from mbc_core.codes import Rotation

    return Rotation.load(shipped(ROTATION))


def codebook(slots: int) -> Codebook:
    """The shipped codebook version 0 for ``slots`` (T) codes a passage.

    Raises:
        ModelError: none is shipped for this T.
    """
    from mbc_core.codebook.files import Codebook

    path = shipped(f"codebook_t{slots}.safetensors")
    return Codebook.from_bytes(path.read_bytes(), str(path))


def query_map(rotation: Rotation, slots: int) -> QueryMap | None:
    """The shipped query map for codes of this rotation and T; None when there is none, and the plain score serves.

    Raises:
        DamagedFile: the file is not the one that its card describes.
    """
    from mbc_core.query_map import QueryMap

    name = f"query_map_t{slots}.safetensors"
    if not weights.path(name).exists():
        return None
    found = QueryMap.load(shipped(name))
    return found if found.serves(rotation, slots) else None


def encoder(*, device: str = "cpu", precision: str = "auto") -> PassageEncoder:
    """all-MiniLM-L6-v2 with the shipped salience head, fetched if need be."""
    from mbc_core.encoder import PassageEncoder

    folder = ensure("minilm") / ASSETS["minilm"].inside
    return PassageEncoder.load(folder, shipped(SALIENCE), precision=precision, device=device)  # type: ignore[arg-type]


def encoder_for(manifest: Manifest, *, device: str = "cpu") -> PassageEncoder:
    """The encoder that a bank's codes were made with, in the precision they were made with.

    Raises:
        IncompatibleBank: they were made with another model.
    """
    parts = manifest.encoder.split("/")
    found = encoder(device=device, precision=parts[1] if len(parts) == 3 else "auto")
    _require("encoder", found.encoder_id, manifest.encoder)
    return found


def language_model_source() -> GgufModel:
    """Folder and file of SmolLM2-135M-Instruct, fetched if need be."""
    path = ensure("smollm2") / ASSETS["smollm2"].inside
    return GgufModel(path.parent, path.name)


def language_model(
    source: str | None = None, *, gguf_file: str | None = None, device: str = "cpu", dtype: str = "auto"
) -> LanguageModel:
    """SmolLM2-135M-Instruct, or the model named by ``source`` (a folder or a Hugging Face name)."""
    from mbc_core.reader.language_model import load_language_model

    cache = cache_root() / "language-models"
    if source is None:
        found = language_model_source()
        return load_language_model(found.folder, found.file, dtype=dtype, device=device, cache=cache)
    return load_language_model(source, gguf_file, dtype=dtype, device=device, cache=cache)


def reader_adapter() -> Path | None:
    """Folder of the shipped KV-LoRA adapter; None when this installation has none.

    Raises:
        DamagedFile: it is not the adapter that its card describes.
    """
    path = weights.path(READER)
    if not path.exists():
        return None
    _check_digest(path / "adapter_model.safetensors", path / "card.json")
    return path


def attend_weights(*, given: Path | None = None) -> Path | None:
    """Folder of the weights that the read `attend` uses: the one given, or the shipped one; None when there is none.

    Raises:
        DamagedFile: the shipped weights are not those that their card describes.
    """
    path = given or weights.path(ATTEND)
    if not path.exists():
        return None
    if given is None:
        for name in ("projector.safetensors", "adapter_model.safetensors"):
            _check_digest(path / name, path / "card.json")
    return path


def has_paper_weights(slots: int) -> bool:
    """Whether this installation has weights of the aggregate read for ``slots`` (T) codes a passage."""
    return weights.path(PAPER.format(slots=slots)).exists()


def paper_weights(slots: int) -> Path:
    """Folder of the shipped weights of the aggregate read for ``slots`` (T) codes a passage.

    Raises:
        ModelError: none are shipped for this T.
        DamagedFile: they are not those that their card describes.
    """
    path = weights.path(PAPER.format(slots=slots))
    if not path.exists():
        raise ModelError(
            f"there are no weights of the aggregate read for T = {slots}",
            value=str(path),
            cause="this release ships none for it, or the installation lacks its data files",
            fix="reinstall mbc, ask with another --read, or train some with `mbc train paper --codes address` and "
            "name them with --paper",
        )
    _check_digest(path / "paper.safetensors", path / "card.json")
    return path


def _require(what: str, ours: str, theirs: str) -> None:
    if ours != theirs:
        raise IncompatibleBank(
            f"the bank was made with another {what}",
            value=theirs,
            cause=f"this release would use {ours}",
            fix=f"use the release that made the bank, or ingest its sources again into a new bank with this {what}",
        )
