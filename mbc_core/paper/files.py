"""A paper model on disk: one safetensors file and one JSON file, nothing pickled.

Stored is what was trained: networks, codebook with usage, KV-LoRA; also the weights of an encoder that was trained
along. The language model and frozen encoders are named by digest and must be given when the folder is loaded.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mbc_core.errors import DamagedFile, ModelError
from mbc_core.paper.config import FORMAT_VERSION, PaperConfig
from mbc_core.paper.model import PaperModel
from mbc_core.reader.kv_lora import adapter_state, set_adapter_state
from mbc_core.reader.language_model import HfModel, LanguageModel

WEIGHTS_FILE = "paper.safetensors"
CONFIG_FILE = "paper.json"
_LORA = "kv_lora/"


def save_paper_model(model: PaperModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write ``paper.safetensors`` and ``paper.json``, each beside its place and then moved there whole.

    Args:
        dtype: of the stored networks, such as float16; the codebook and its usage always stay float32, so that no
            code changes. None stores what the model holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: _stored(name, value, dtype) for name, value in sorted(paper_state(model).items())})
    told = {
        "format": FORMAT_VERSION,
        "config": json.loads(model.config.to_json()),
        "language_model": {"digest": model.language_model.digest, "name": model.language_model.name},
        "encoders": _encoder_digests(model),
        "weights_sha256": hashlib.sha256(data).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    _write_whole(folder / WEIGHTS_FILE, data)
    _write_whole(folder / CONFIG_FILE, (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())


def load_paper_model(
    folder: Path,
    language_model: LanguageModel,
    *,
    encoder: HfModel | None = None,
    question_encoder: HfModel | None = None,
) -> PaperModel:
    """Read :func:`save_paper_model`; the model comes in evaluation mode.

    Args:
        language_model: the base it was trained on, without adapter.
        encoder, question_encoder: as for :class:`~mbc_core.paper.model.PaperModel`; a trained one gets its weights.

    Raises:
        DamagedFile: a file is missing, cut, changed or of another format, or weights are missing, left over or of
            another shape.
        ModelError: another language model, or another frozen encoder.
        UsageError: a needed encoder is not given.
    """
    told, weights = _read(folder)
    config = PaperConfig.from_json(json.dumps(told["config"]), str(folder / CONFIG_FILE))
    _require_same("language model", language_model.digest, told["language_model"]["digest"])
    model = PaperModel(
        config, language_model, encoder=encoder, question_encoder=question_encoder,
        codewords=weights.get("codewords"),
    )  # fmt: skip
    found = _encoder_digests(model)
    for name, digest in told["encoders"].items():
        _require_same(f"{name} encoder", found.get(name, ""), digest)
    set_paper_state(model, weights, str(folder))
    return model.eval()


def trained_on(folder: Path) -> str:
    """Digest of the language model that the paper model in ``folder`` was trained on.

    Raises:
        DamagedFile: the folder cannot be read.
    """
    return str(_read(folder)[0]["language_model"]["digest"])


def paper_state(model: PaperModel) -> dict[str, Tensor]:
    """What was trained, by name: networks, codebook and its usage, trained encoders, KV-LoRA (as ``kv_lora/…``)."""
    frozen = {id(one) for part in _frozen_encoders(model).values() for one in (*part.parameters(), *part.buffers())}
    frozen |= {id(one) for one in (*model.reader.parameters(), *model.reader.buffers())}
    kept = model.state_dict(keep_vars=True)
    names = dict.fromkeys(name for name, _ in (*model.named_parameters(), *model.named_buffers()))  # each once
    state = {name: kept[name].detach() for name in names if name in kept and id(kept[name]) not in frozen}
    if model.config.kv_lora:
        state |= {f"{_LORA}{name}": value for name, value in adapter_state(model.language_model.model).items()}
    return state


def set_paper_weights(model: PaperModel, folder: Path) -> None:
    """Give ``model`` the weights that ``folder`` holds.

    Raises:
        DamagedFile: the folder cannot be read, or its weights are of another shape.
        ModelError: they were trained with another language model.
    """
    told, weights = _read(folder)
    _require_same("language model", model.language_model.digest, told["language_model"]["digest"])
    set_paper_state(model, weights, str(folder))


@torch.no_grad()
def set_paper_state(model: PaperModel, state: dict[str, Tensor], where: str) -> None:
    """Copy what :func:`paper_state` gave into ``model``.

    Raises:
        DamagedFile: names or shapes differ.
    """
    own = paper_state(model)
    differing = sorted(set(own) ^ set(state)) or sorted(name for name in own if own[name].shape != state[name].shape)
    if differing:
        raise DamagedFile(
            "the paper model's weights do not match its configuration",
            value=f"{len(differing)} names, first {differing[0]}",
            cause="weights are missing, left over or of another shape",
            fix=f"restore {where}, or train the model again with `mbc train paper`",
        )
    for name, value in own.items():
        if not name.startswith(_LORA):
            value.copy_(state[name])
    lora = {name.removeprefix(_LORA): value for name, value in state.items() if name.startswith(_LORA)}
    if lora:
        set_adapter_state(model.language_model.model, {name: value.float() for name, value in lora.items()}, where)


def _stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    exact = name.startswith("quantizer.") or name == "codewords" or not value.is_floating_point()
    return (value if exact or dtype is None else value.to(dtype)).contiguous().cpu().clone()


def _frozen_encoders(model: PaperModel) -> dict[str, Any]:
    parts = {"passage": model.amortizer, "question": model.question}
    encoders = {name: getattr(part, "encoder", None) for name, part in parts.items()}
    return {} if model.config.train_encoder else {name: one for name, one in encoders.items() if one is not None}


def _encoder_digests(model: PaperModel) -> dict[str, str]:
    """sha256 (hex) over names and bytes of each frozen encoder's weights."""
    digests = {}
    for name, encoder in _frozen_encoders(model).items():
        found = hashlib.sha256()
        for key, value in encoder.named_parameters():
            if not key.startswith("pooler."):  # never read, and not every file has it
                found.update(key.encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests[name] = found.hexdigest()
    return digests


def _require_same(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ModelError(
            f"the paper model was trained with another {what}",
            value=found[:12],
            cause=f"its folder names {wanted[:12]}",
            fix=f"give the {what} it was trained with, or train it again with `mbc train paper`",
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        told = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        data = (folder / WEIGHTS_FILE).read_bytes()
        if told["format"] != FORMAT_VERSION:
            raise ValueError(f"format {told['format']}, this release reads {FORMAT_VERSION}")
        if hashlib.sha256(data).hexdigest() != told["weights_sha256"]:
            raise ValueError(f"{WEIGHTS_FILE} does not match the digest in {CONFIG_FILE}")
        if not {"config", "language_model", "encoders"} <= set(told):
            raise ValueError("entries are missing")
        return told, load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedFile(
            "the paper model cannot be read",
            value=str(folder),
            cause=f"{type(error).__name__}: {error}",
            fix="restore the folder, or train the model again with `mbc train paper`",
        ) from error


def _write_whole(path: Path, data: bytes) -> None:
    staging = path.with_name(f".{path.name}.writing")
    staging.write_bytes(data)
    staging.replace(path)
