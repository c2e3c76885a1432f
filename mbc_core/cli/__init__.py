"""The command line without Beam: ask, recall, inspect, export, forget, compact, eval, adapters, train.

`mbc` (pipelines/main.py) adds ingest, adapt and demo, and lets eval build banks; ``python -m mbc_core.cli`` is this
half alone.
"""

from mbc_core.cli.app import cli, run

__all__ = ["cli", "run"]
