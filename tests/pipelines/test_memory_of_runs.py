"""Memory over many slices: new threads must not each keep their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.memory import give_memory_back, keep_memory_flat

_CHILD = """
import sys, threading
from pathlib import Path
import pyarrow as pa
from pipelines.memory import keep_memory_flat
if sys.argv[1] == "bounded":
    assert keep_memory_flat()

def work():  # many small blocks, and one that outlives the rest: an arena of one's own could not shrink
    blocks = [bytes(900) for _ in range(4_000)]
    barrier.wait()
    kept.append(blocks[-1])
    pa.array(range(20_000)).cast(pa.string())

kept = []
for _ in range(12):
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=work) for _ in range(8)]
    [one.start() for one in threads]
    [one.join() for one in threads]
print(sum("rw-p" in line and "00:00 0" in line for line in Path("/proc/self/maps").read_text().splitlines()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has arenas")
def test_threads_share_two_arenas():
    """Anonymous mappings of a child process after 96 threads in 12 rounds: arenas are mappings that stay."""
    places = {}
    for kind in ("plain", "bounded"):
        environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
        ran = subprocess.run(
            [sys.executable, "-c", _CHILD, kind], env=environment, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        places[kind] = int(ran.stdout)
    assert places["bounded"] < places["plain"]


def test_arrow_allocates_from_them():
    keep_memory_flat()
    assert pa.default_memory_pool().backend_name == "system"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    """Small blocks freed below one that stays: without a trim the heap cannot shrink."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    blocks = [bytearray(4_000) for _ in range(30_000)]
    last = bytearray(4_000)
    del blocks
    give_memory_back()
    before = resident()
    blocks = [bytearray(4_000) for _ in range(30_000)]
    last += bytearray(4_000)
    del blocks
    held = resident()
    give_memory_back()
    assert resident() < before + (16 << 20)
    assert resident() <= held
