"""Memory that stays flat over many slices: every slice runs in new threads, and allocators keep memory a thread.

glibc gives new threads new arenas and never gives an arena back; Arrow's own allocator keeps a heap a thread too. A
run of 40 slices grew by 8 MiB each, with nothing left that Python could see. With two arenas, and with Arrow
allocating from them, it grows by less than one, and what a slice freed is given back when it is durable.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import pyarrow as pa

_M_ARENA_MAX = -8
_ARENAS = 2


def keep_memory_flat() -> bool:
    """Bound the allocators of this process, for good; call it before the work begins.

    Returns:
        Whether the C library took the bound: only glibc, on Linux, has arenas to bound.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt is not None and mallopt(_M_ARENA_MAX, _ARENAS))


def give_memory_back() -> None:
    """Collect what a finished pipeline left in cycles, and return freed memory to the system where the C library can.

    Without a full collection the arrays of several slices wait for the next one, which Python puts off the longer the
    more objects live. Takes some tenths of a second.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
