"""`mbc eval` with the pipeline behind it: it builds the banks it reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core.cli.evaluate import make

if TYPE_CHECKING:
    from pipelines.evaluate import PipelineBanks


def build(folder: Path, device: str, say: Callable[[str], None]) -> PipelineBanks:
    """A builder with the release's own encoder and codebooks."""
    from pipelines.evaluate import PipelineBanks

    return PipelineBanks(folder, device, say=say)


evaluate = make(build)
