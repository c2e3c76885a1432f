"""What an adaptation starts from: the base model, its live adapter, and the device. Needs torch and peft alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.errors import DamagedFile, UsageError

if TYPE_CHECKING:
    from mbc_core.reader.language_model import LanguageModel
    from mbc_core.training.adapt import Start
    from mbc_core.training.set_file import SetHeader

WEIGHTS = "adapter_model.safetensors"
_SHIPPED = "shipped"


def start_from(base: LanguageModel, header: SetHeader, folder: Path | None) -> tuple[LanguageModel, Start]:
    """The model that training goes on from.

    Args:
        header: names the live adapter. folder: of the adapter; None: the shipped one for this base, or fresh weights.
    """
    from mbc_core import defaults
    from mbc_core.reader.kv_lora import adapter_base, load_adapter
    from mbc_core.training.adapt import Start

    shipped = defaults.reader_adapter() if folder is None else None
    if shipped is not None and adapter_base(shipped) == base.digest:
        folder = shipped
    if folder is None:
        return base, Start()
    model, _ = load_adapter(base.model, folder, base_digest=base.digest)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    live = header.live.get(base.digest, {})
    name = live["version"] if live.get("weights_sha256") == digest else folder.name
    return replace(base, model=model.eval()), Start(_SHIPPED if folder == shipped else name, digest)


def named_model(name: str | None, gguf_file: str | None, device: str) -> LanguageModel | None:
    """The base model that ``--lm`` names; None without it.

    Raises:
        AssetError: there is no such model.
    """
    if name is None:
        return None
    from mbc_core import defaults

    return defaults.language_model(name, gguf_file=gguf_file, device=resolve_device(device))


def adapt_base(name: str | None, gguf_file: str | None, device: str) -> LanguageModel:
    """The base model that ``--lm`` names, SmolLM2-135M-Instruct without it."""
    from mbc_core import defaults

    device = resolve_device(device)
    return named_model(name, gguf_file, device) or defaults.language_model(device=device)


def resolve_device(device: str) -> str:
    """``auto`` → ``cuda`` when there is one, else ``cpu``."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def beside(source: Path) -> Path:
    """Where the first step copies live adapters to."""
    return source.with_name(f"{source.name}.adapter")


def live_beside(source: Path, header: SetHeader, base_digest: str) -> Path | None:
    """Folder of the live adapter that the first step put beside its file; None when none was live."""
    live = header.live.get(base_digest)
    if live is None:
        return None
    folder = beside(source) / live["version"]
    if not (folder / WEIGHTS).is_file():
        raise UsageError(
            "the live adapter is not beside the training set",
            value=str(folder),
            cause="only the set was copied to this machine",
            fix=f"copy the folder {beside(source).name} too, or name an adapter's folder with --adapter",
        )
    if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != live["weights_sha256"]:
        raise DamagedFile(
            f"the adapter {folder} is not the one that the set names",
            cause="it was cut short or replaced",
            fix="write the set again, or copy the folder again",
        )
    return folder
