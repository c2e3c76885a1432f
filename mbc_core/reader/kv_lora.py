"""KV-LoRA (the paper's name): low-rank updates of exactly the key and value projections of a causal model.

K' = K + (alpha/r)·B_K·A_K and likewise V. Queries, outputs and everything else stay as the base has them. On models
whose query, key and value share one matrix (GPT-2's ``c_attn``) the query rows of B are zero and stay zero, so the
query output is bit-equal to the base's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from mbc_core.errors import DamagedFile, ModelError
from mbc_core.reader.language_model import HfModel

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_METADATA = "mbc"
_SEPARATE = (("k_proj", "v_proj"), ("key", "value"))
_FUSED = ("c_attn",)


@dataclass(frozen=True, slots=True)
class KVLoraConfig:
    """Size of the update: rank r, alpha (scale is alpha/r), dropout before A, and how many last layers (None: all)."""

    r: int = 32
    alpha: int = 64
    dropout: float = 0.05
    last_n: int | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules to adapt: full names, and whether each is a fused query-key-value matrix."""

    names: tuple[str, ...]
    fused: bool
    layers: int


def resolve_targets(model: HfModel, last_n: int | None = None, names: Sequence[str] | None = None) -> Targets:
    """Find K and V of every layer, or of the last ``last_n``, before peft is asked for anything.

    peft accepts a list in which only some names exist, and would then train K without V.

    Args:
        model: a transformers causal model, not yet adapted.
        names: last parts of the module names, such as ``("k_proj", "v_proj")``; found when None.

    Raises:
        ModelError: a name matches nothing, or not once in every layer.
    """
    layers = int(model.config.num_hidden_layers)
    found = _modules_by_last_name(model)
    wanted = tuple(names) if names is not None else _guess(found)
    resolved: list[str] = []
    for name in wanted:
        full = found.get(name, [])
        if len(full) != layers:
            raise ModelError(
                f"`{name}` does not name one projection in each layer",
                value=f"{len(full)} of {layers} layers",
                cause="the name is misspelt, or this architecture calls its key and value projections otherwise",
                fix=f"name the two projections yourself; this model has {sorted(found)[:12]}",
            )
        resolved += full[-last_n:] if last_n else full
    kept = min(last_n or layers, layers)
    if len(resolved) != len(wanted) * kept:
        raise ModelError(
            "not every key and value projection was found", value=f"{len(resolved)} of {len(wanted) * kept}"
        )
    return Targets(tuple(resolved), wanted[0] in _FUSED, kept)


def add_kv_lora(
    model: HfModel, config: KVLoraConfig | None = None, *, names: Sequence[str] | None = None, seed: int = 0
) -> HfModel:
    """Put fresh KV-LoRA weights on ``model``: A is Kaiming, B is zero, so nothing changes yet.

    Returns:
        the peft model; only its LoRA parameters require gradients, in float32.

    Raises:
        ModelError: the projections cannot be resolved, or peft adapted anything but them.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ModelError(
            "the language model has an adapter already",
            value=type(model).__name__,
            cause="the same loaded model was adapted before",
            fix="load the base model again, or use the model that carries the adapter",
        )
    config = config or KVLoraConfig()
    targets = resolve_targets(model, config.last_n, names)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by a deprecated name
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=list(targets.names),
                fan_in_fan_out=targets.fused,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    _check_adapted(adapted, targets)
    if targets.fused:
        _protect_query(adapted)
    return adapted


def save_adapter(model: HfModel, folder: Path, config: KVLoraConfig, *, base_digest: str, base_name: str) -> None:
    """Write ``adapter_model.safetensors`` (float16; what this project needs to know is in its metadata) and
    ``adapter_config.json``, with which plain peft loads it too.

    Each file is written beside its place and moved there whole.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(torch.float16).contiguous().cpu() for name, value in adapter_state(model).items()}
    ours = {
        "format": FORMAT_VERSION,
        "base_digest": base_digest,
        "kv_lora": asdict(config),
        "versions": {"peft": version("peft"), "transformers": version("transformers"), "torch": torch.__version__},
    }
    peft_config = next(iter(model.peft_config.values()))
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": bool(peft_config.fan_in_fan_out),
        "target_modules": sorted(peft_config.target_modules),
    }
    _write_whole(folder / WEIGHTS_FILE, save(tensors, metadata={_METADATA: json.dumps(ours, sort_keys=True)}))
    _write_whole(folder / CONFIG_FILE, (json.dumps(description, indent=2, sort_keys=True) + "\n").encode())


def load_adapter(model: HfModel, folder: Path, *, base_digest: str | None = None) -> tuple[HfModel, KVLoraConfig]:
    """Put the adapter of ``folder`` on a base model that has none.

    Args:
        base_digest: digest of ``model``; refused when the adapter was made for another. None skips the check.

    Returns:
        the peft model and its configuration.

    Raises:
        DamagedFile: a file is missing or cannot be read, or weights are missing, unexpected or of another shape.
        ModelError: the adapter belongs to another base model.
    """
    weights, config = read_adapter(folder, base_digest)
    adapted = add_kv_lora(model, config)
    set_adapter_state(adapted, weights, str(folder))
    return adapted, config


def read_adapter(folder: Path, base_digest: str | None = None) -> tuple[dict[str, Tensor], KVLoraConfig]:
    """The adapter of ``folder``, on no model yet: its weights by peft's names (float32), and its size.

    Raises:
        DamagedFile: a file is missing or cannot be read.
        ModelError: the adapter belongs to another base model than ``base_digest``.
    """
    weights, config, made_for = _read(folder)
    if base_digest is not None and made_for != base_digest:
        raise ModelError(
            "the adapter was trained for another base model",
            value=made_for[:12],
            cause=f"this model's digest is {base_digest[:12]}",
            fix="load the model it was trained for, or train one with `mbc train reader` or `mbc adapt`",
        )
    return weights, config


def adapter_base(folder: Path) -> str:
    """Digest of the base model that the adapter in ``folder`` was trained for.

    Raises:
        DamagedFile: it cannot be read.
    """
    return _read(folder)[2]


def adapter_config(model: HfModel) -> KVLoraConfig:
    """Size of the adapter that ``model`` carries."""
    told = next(iter(model.peft_config.values()))
    layers = {name.split(".lora_")[0].rpartition(".")[0] for name in adapter_state(model)}
    total = int(model.get_base_model().config.num_hidden_layers)
    last_n = None if len(layers) == total else len(layers)
    return KVLoraConfig(r=int(told.r), alpha=int(told.lora_alpha), dropout=float(told.lora_dropout), last_n=last_n)


def adapter_state(model: HfModel) -> dict[str, Tensor]:
    """The LoRA weights by peft's names (without the adapter's name)."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach() for name, value in state.items()}


def set_adapter_state(model: HfModel, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into the adapted model's LoRA weights.

    Raises:
        DamagedFile: names or shapes differ; a silently random adapter would answer nonsense.
    """
    from peft import set_peft_model_state_dict

    expected = adapter_state(model)
    differing = sorted(set(expected) ^ set(state))
    if differing:
        raise DamagedFile(
            "the adapter's weights do not match the model's projections",
            value=f"{len(differing)} names, first {differing[0]}",
            cause="missing or unexpected weights: another architecture, another peft, or a cut file",
            fix=f"restore {where} or train the adapter again",
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise DamagedFile(
                f"the adapter's weight {name} has another shape",
                value=tuple(value.shape),
                cause=f"the model's is {tuple(expected[name].shape)}",
                fix=f"restore {where} or train the adapter again",
            )
    set_peft_model_state_dict(model, dict(state))
    if any(module.fan_in_fan_out for _, module in _lora_layers(model)):
        _check_query_rows(model, where)


def trainable(model: HfModel) -> dict[str, nn.Parameter]:
    """The LoRA parameters, by name, in a fixed order."""
    return {name: parameter for name, parameter in sorted(model.named_parameters()) if parameter.requires_grad}


@contextmanager
def disabled(model: HfModel) -> Iterator[HfModel]:
    """The base model's own output while inside; a model without adapter passes through."""
    if not hasattr(model, "disable_adapter"):
        yield model
        return
    with model.disable_adapter():
        yield model


def _modules_by_last_name(model: nn.Module) -> dict[str, list[str]]:
    """Last part of the name → full names, of every matrix module, in the order of the layers."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding) and "." in name:
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def _guess(found: Mapping[str, list[str]]) -> tuple[str, ...]:
    for pair in _SEPARATE:
        if all(name in found for name in pair):
            return pair
    for fused in _FUSED:
        if fused in found:
            return (fused,)
    raise ModelError(
        "the key and value projections cannot be found",
        value=sorted(found)[:12],
        cause="this architecture has none of the known names (k_proj and v_proj, key and value, c_attn)",
        fix="pass the two names, for instance `--targets k_proj,v_proj`",
    )


def _lora_layers(model: HfModel) -> list[tuple[str, HfModel]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _check_adapted(model: HfModel, targets: Targets) -> None:
    adapted = {name.removeprefix("base_model.model.") for name, _ in _lora_layers(model)}
    if adapted != set(targets.names):
        raise ModelError(
            "peft did not adapt exactly the key and value projections",
            value=sorted(adapted ^ set(targets.names))[:4],
            cause="this version of peft resolves names otherwise",
            fix="install the pinned peft (constraints.txt)",
        )


def _protect_query(model: HfModel) -> None:
    """Keep the query rows of every fused B at zero: no gradient ever reaches them."""
    for _, module in _lora_layers(model):
        for linear in module.lora_B.values():
            width = linear.weight.shape[0] // 3
            linear.weight.register_hook(_QueryMask(width))


@dataclass(frozen=True, slots=True)
class _QueryMask:
    width: int

    def __call__(self, gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        masked[: self.width] = 0
        return masked


def _check_query_rows(model: HfModel, where: str) -> None:
    for name, module in _lora_layers(model):
        for linear in module.lora_B.values():
            if linear.weight[: linear.weight.shape[0] // 3].abs().max() != 0:
                raise DamagedFile(
                    "the adapter changes queries, not only keys and values",
                    value=name,
                    cause="it was trained as plain LoRA on the fused c_attn",
                    fix=f"train {where} again with `mbc train reader` or `mbc adapt`",
                )


def _read(folder: Path) -> tuple[dict[str, Tensor], KVLoraConfig, str]:
    """Weights in float32, size, and digest of the base model."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, "pt") as stored:
            ours = json.loads((stored.metadata() or {})[_METADATA])
            tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118  # not a dict
        if ours["format"] == FORMAT_VERSION:
            return tensors, KVLoraConfig(**ours["kv_lora"]), str(ours["base_digest"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedFile(
            "the adapter cannot be read",
            value=str(path),
            cause=f"{type(error).__name__}: {error}",
            fix="restore the folder or train the adapter again",
        ) from error
    raise DamagedFile(
        "the adapter has another format version",
        value=ours["format"],
        cause=f"this release reads version {FORMAT_VERSION}",
        fix="use the release that wrote it, or train it again",
    )


def _write_whole(path: Path, data: bytes) -> None:
    staging = path.with_name(f".{path.name}.writing")
    staging.write_bytes(data)
    staging.replace(path)
