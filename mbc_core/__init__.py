"""The mathematics and the meaning of memory bank compression. Never imports Beam.

The names below are imported when they are first used, so that `import mbc_core` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbc_core.answering import Reader
    from mbc_core.bank import Bank
    from mbc_core.memory import Memory

# torch's OpenMP threads spin while they wait for each other. Beside any other load on the same cores that costs most
# of their time (300 passages on two shared cores: 8-24 a second, against 58-67 when they sleep). torch reads this when
# it is first imported; whoever has set it keeps it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["Bank", "Memory", "Reader"]

_HOMES = {"Bank": "mbc_core.bank", "Memory": "mbc_core.memory", "Reader": "mbc_core.answering"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
