"""Checkpoints of `mbc train paper`: weights, moments, codebook statistics, progress, weights of its best look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mbc_core.errors import DamagedFile

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BEST = "best/"


@dataclass(slots=True)
class PaperProgress:
    """Where a run stands.

    Attributes:
        step, seconds: steps done, and seconds of training alone.
        looks: (step, held-out loss) of every look.
        cool_from, cool_steps: where the learning rate began to fall, and over how many steps; None before that.
        ended_by: ``flat``, ``steps`` or ``minutes``, once the learning rate falls.
        kept: step of the look whose weights a finished run went back to; None when it kept its last ones.
    """

    step: int = 0
    seconds: float = 0.0
    looks: list[tuple[int, float]] = field(default_factory=list)
    cool_from: int | None = None
    cool_steps: int = 0
    ended_by: str | None = None
    kept: int | None = None

    @property
    def best(self) -> int | None:
        """Step of the look with the lowest held-out loss, the first one among equals; None before the first look."""
        return min(self.looks, key=lambda look: look[1])[0] if self.looks else None

    @property
    def finished(self) -> bool:
        """Whether the learning rate has fallen all the way."""
        return self.cool_from is not None and self.step >= self.cool_from + self.cool_steps


def snapshot(parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of everything that learns, on the same device, named as in a checkpoint."""
    return {name: one.clone() for name, one in _named(parameters, buffers).items()}


def _named(parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"weights/{name}": one.detach() for name, one in parameters.items()}
    return tensors | {f"buffers/{name}": one for name, one in buffers.items()}


def restore(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor]
) -> None:
    """Put what :func:`snapshot` copied back in place.

    Raises:
        KeyError, RuntimeError: it belongs to another model.
    """
    with torch.no_grad():
        for name, one in parameters.items():
            one.copy_(tensors[f"weights/{name}"])
        for name, held in buffers.items():
            held.copy_(tensors[f"buffers/{name}"])


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: PaperProgress,
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write everything a resumed run needs; ``state.json`` names the file and is replaced last, so a crash loses
    nothing.

    Args:
        best: what :func:`snapshot` copied at the best look.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = _named(parameters, buffers) | {f"{_BEST}{name}": one for name, one in (best or {}).items()}
    for name, one in parameters.items():
        tensors |= {f"{key}/{name}": held for key, held in optimizer.state[one].items() if key in _MOMENTS}
    file = f"state-{progress.step:08d}.safetensors"
    save_file({name: one.cpu().contiguous() for name, one in tensors.items()}, folder / file)
    staging = folder / ".state.json.writing"
    staging.write_text(json.dumps({"file": file, "progress": asdict(progress)}, indent=2) + "\n")
    staging.replace(folder / "state.json")
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def load_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[PaperProgress, dict[str, Tensor] | None] | None:
    """Take up the checkpoint of ``folder``; None when there is none.

    Returns:
        where the run stands, and the best look's weights where they were saved.

    Raises:
        DamagedFile: it cannot be read or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "state.json").exists():
        return None
    try:
        told = json.loads((folder / "state.json").read_text())
        told["progress"]["looks"] = [(int(step), float(loss)) for step, loss in told["progress"]["looks"]]
        progress = PaperProgress(**told["progress"])
        tensors = load_file(folder / told["file"])
        restore(tensors, parameters, buffers)
        for name, one in parameters.items():
            if f"exp_avg/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].to(one.device) for key in _MOMENTS}
                count = torch.tensor(float(progress.step), device=one.device if one.is_cuda else "cpu")
                optimizer.state[one] = {"step": count, **moments}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DamagedFile(
            "the checkpoint cannot be taken up",
            value=str(folder),
            cause=f"{type(error).__name__}: {error}",
            fix="remove the folder to start again",
        ) from error
    best = {name.removeprefix(_BEST): one for name, one in tensors.items() if name.startswith(_BEST)}
    return progress, best or None
