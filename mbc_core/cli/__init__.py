"""The command line without Beam: ask, recall, inspect, export, forget, compact, eval, adapters, train.

`mbc` (pipelines/main.py) adds ingest, adapt and demo, and lets eval build banks; ``python -m mbc_core.cli`` is this
half alone, and ``python -m mbc_core.cli.train`` the trainings alone, on machines that have little but torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbc_core.cli.app import cli, run

__all__ = ["cli", "run"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # any member
    """The commands, loaded when they are first asked for: a training needs none of what prints tables."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mbc_core.cli import app

    return getattr(app, name)
