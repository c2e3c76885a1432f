"""The language model that reads the memory: any causal Hugging Face model, from a folder, a name or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError

from mbc_core.errors import AssetError

HfModel: TypeAlias = Any
"""A transformers or peft model: their common base has no useful static type."""

HfTokenizer: TypeAlias = Any
"""A transformers tokenizer, likewise."""

SOURCE_FILE = "mbc_source.json"
_CHUNK = 1 << 16
_SAMPLED_CHUNKS = 256


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: transformers model in evaluation mode (or a peft model around it), on its device.
        tokenizer: its fast tokenizer.
        digest: sha256 (hex) that tells base models apart; adapters are kept by it.
        name: for people and cards.
    """

    model: HfModel
    tokenizer: HfTokenizer
    digest: str
    name: str

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def context(self) -> int:
        """Most tokens the model was made for; 1024 when its configuration does not say."""
        config = self.model.config
        return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1024)

    @property
    def pad_id(self) -> int:
        """Token that fills batches; never attended."""
        for found in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        return 0


def load_language_model(
    source: Path | str,
    gguf_file: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> LanguageModel:
    """Load a model for reading.

    A GGUF file is dequantised to plain bfloat16 weights once; with ``cache`` they are kept there as
    safetensors, so that the next start takes a second instead of twenty.

    Args:
        source: folder with config and safetensors, folder of a GGUF file, or a Hugging Face name.
        gguf_file: name of the GGUF file inside ``source``.
        dtype: of the weights in memory; ``auto`` is bfloat16 where the device computes it natively (a question then
            takes about a tenth less time on a CPU, a training step a third less), float32 elsewhere.
        device: where the model is put.
        cache: folder for the converted weights; made when missing.

    Raises:
        AssetError: no such model, or its files cannot be read.
        UsageError: an unknown precision.
    """
    wanted = _resolve_dtype(dtype, device)
    if gguf_file is not None:
        converted = _converted_folder(Path(source) / gguf_file, cache)
        if converted is None:
            return _load_gguf(Path(source), gguf_file, wanted, device)
        return _load_folder(converted, wanted, device)
    folder = Path(source)
    return _load_folder(folder if folder.is_dir() else _download(str(source)), wanted, device)


def weights_digest(folder: Path) -> str:
    """Identity of a model folder: sha256 over names, sizes and evenly spaced pieces of its weights.

    It tells models apart in milliseconds even at 8B parameters; it does not prove that every byte is whole.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            for start in range(0, size, max(_CHUNK, size // _SAMPLED_CHUNKS)):
                stream.seek(start)
                digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


def _resolve_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    from mbc_core.encoder.passage_encoder import resolve_precision

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[resolve_precision(dtype, str(device))]


def _load_folder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a second of loading needs no bar on a command's output
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AssetError(
            "the language model cannot be loaded",
            value=str(folder),
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="name a folder with config.json, tokenizer.json and *.safetensors, or fetch the model again",
        ) from error
    source = folder / SOURCE_FILE
    told = json.loads(source.read_text()) if source.exists() else {}
    digest = str(told["digest"]) if told else weights_digest(folder)
    return LanguageModel(_frozen(model, device), tokenizer, digest, str(told.get("name", folder.name)))


def _load_gguf(folder: Path, gguf_file: str, dtype: torch.dtype, device: torch.device | str) -> LanguageModel:
    model, tokenizer = _read_gguf(folder, gguf_file)
    path = folder / gguf_file
    return LanguageModel(_frozen(model.to(dtype), device), tokenizer, _file_digest(path), path.stem)


def _read_gguf(folder: Path, gguf_file: str) -> tuple[HfModel, HfTokenizer]:
    """Dense bfloat16 model and tokenizer of a GGUF file."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Newer transformers keep GGUF weights packed unless told otherwise; older ones know no such option.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError) as error:
        raise AssetError(
            "the GGUF file cannot be loaded",
            value=str(folder / gguf_file),
            cause=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="install the package `gguf`, or fetch the model again",
        ) from error
    model = model.bfloat16()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dense now, and must be loaded as such
    return model, tokenizer


def _converted_folder(gguf: Path, cache: Path | None) -> Path | None:
    """Folder of the converted weights of ``gguf`` below ``cache``, made once and moved into place whole."""
    if cache is None:
        return None
    digest = _file_digest(gguf)
    target = cache / f"{gguf.stem}-{digest[:12]}-bf16"
    if (target / SOURCE_FILE).exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _read_gguf(gguf.parent, gguf.name)
    staging = Path(tempfile.mkdtemp(dir=cache, prefix=".converting-"))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / SOURCE_FILE).write_text(json.dumps({"digest": digest, "name": gguf.stem}) + "\n")
        staging.replace(target)
    except OSError as error:
        if not (target / SOURCE_FILE).exists():  # else another process was quicker: use its folder
            raise AssetError(
                "the converted language model cannot be kept",
                value=str(target),
                cause=str(error),
                fix="free some disk (about 270 MB are needed) or set another cache folder",
            ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the hub's errors share no public base
        raise AssetError(
            "there is no such language model",
            value=name,
            cause=f"not a folder here, and the hub says: {str(error).splitlines()[0]}",
            fix="check the name or the connection, or name a local folder",
        ) from error


def _frozen(model: HfModel, device: torch.device | str) -> HfModel:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(device).eval()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AssetError(
            "the model file cannot be read", value=str(path), cause=str(error), fix="fetch the model again"
        ) from error
