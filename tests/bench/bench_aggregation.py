"""Cost of the paper's read as the bank grows. Prints figures, asserts none. `make bench`, or alone, without pytest:

    python -m tests.bench.bench_aggregation

One question against N passages of T = 12 codes, at the sizes of the shipped weights (d_c = 32, width 384, four blocks,
eight heads), float32: the histogram of K = 512 codewords, every vector one by one (flat, as far as memory allows), and
groups of M = 256 passages (hierarchical, as far as a minute allows). Once as in the paper, once with slot marks, which
the shipped weights have: their histogram has a cell for each slot and code. On a GPU when there is one.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from mbc_core.paper.aggregation import Aggregator, Memory, cell_counts, code_counts, flat_memory, histogram_memory

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TOKENS, CODEWORDS, WIDTH, GROUP, ROUNDS = 12, 512, 384, 256, 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_PAGE, _MIB = 4096, 1 << 20


MARKED = pytest.mark.parametrize("marked", [False, True], ids=["paper", "slot-marks"])
"""Whether codes carry a mark of their slot."""


@cache
def setting(marked: bool) -> tuple[Aggregator, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Aggregator, one question's queries, codewords, and codes of the largest bank, unevenly used as real ones are."""
    torch.manual_seed(0)
    made = Aggregator(WIDTH // TOKENS, WIDTH, slots=TOKENS if marked else 0).eval().to(DEVICE)
    codes = (torch.rand(SIZES[-1], TOKENS).square() * CODEWORDS).long()
    parts = torch.randn(1, TOKENS, WIDTH), torch.randn(CODEWORDS, WIDTH // TOKENS), codes
    return made, *(one.to(DEVICE) for one in parts)


def counted(words: torch.Tensor, codes: torch.Tensor, marked: bool) -> Memory:
    """The bank's histogram."""
    return histogram_memory([(words, cell_counts(codes, CODEWORDS) if marked else code_counts(codes, CODEWORDS))])


def seconds(work: Callable[[], object]) -> float:
    """Wall time, the device's queue drained."""
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measured(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """Result, seconds, and MiB that ``work`` takes at most beside what is held already."""
    results: list[torch.Tensor] = []
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds(lambda: results.append(work()))
        return results[0], spent, (torch.cuda.max_memory_allocated() - before) / _MIB
    ctypes.CDLL(None).malloc_trim(0)  # or the allocator would serve the work from what it kept of earlier work
    before, highest, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            highest.append(_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    spent = seconds(lambda: results.append(work()))
    highest.append(_resident())
    done.set()
    watcher.join()
    return results[0], spent, max(0, max(highest) - before) / _MIB


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((found - wanted).norm() / wanted.norm())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def room(passages: int) -> bool:
    """Whether a flat read fits half of the free memory: context, its norm, keys, values and one copy."""
    need = 5 * passages * TOKENS * WIDTH * 4
    if DEVICE.type == "cuda":
        return need < torch.cuda.mem_get_info()[0] / 2
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return need < free / 2


@MARKED
@torch.inference_mode()
def test_the_histogram_read_does_not_grow_with_the_bank(marked):
    made, queries, words, codes = setting(marked)
    print("\nwith slot marks" if marked else "\nas in the paper", end="")
    memories: dict[int, Memory] = {}
    for passages in SIZES:
        spent = seconds(lambda n=passages: memories.update({n: counted(words, codes[:n], marked)}))
        cells = len(memories[passages].vectors)
        print(f"\n{passages:>9,} passages: {cells:,} cells counted in {1e3 * spent:.2f} ms, once a bank", end="")
    taken: dict[int, list[float]] = {passages: [] for passages in SIZES}
    for _ in range(ROUNDS):  # in turns, so that a busy moment of the machine meets all sizes
        for passages in SIZES:
            taken[passages].append(seconds(lambda held=memories[passages]: made(queries, held)))
    for passages, times in taken.items():
        _, _, most = measured(lambda n=passages: made(queries, memories[n]))
        print(
            f"\n{passages:>9,} passages: histogram read {1e3 * statistics.median(times):.2f} ms "
            f"(best {1e3 * min(times):.2f}), peak {most:.1f} MiB",
            end="",
        )
    ratio = statistics.median(taken[SIZES[-1]]) / statistics.median(taken[SIZES[0]])
    print(f"\ntime(10^6) / time(10^3) = {ratio:.3f} (goal: at most 1.1); device {DEVICE.type}, one question")


@MARKED
@torch.inference_mode()
def test_beside_the_flat_and_the_hierarchical_read(marked):
    made, queries, words, codes = setting(marked)
    print("\nwith slot marks" if marked else "\nas in the paper", end="")
    for passages in SIZES:
        held = codes[:passages]
        memory = counted(words, held, marked)
        exact = made(queries, memory)
        histogram = statistics.median(seconds(lambda m=memory: made(queries, m)) for _ in range(ROUNDS))
        if not room(passages):
            print(f"\n{passages:>9,} passages: a flat read would not fit half of the free memory; left out", end="")
            continue
        flat, spent, most = measured(lambda h=held: made(queries, flat_memory(words, h)))
        print(
            f"\n{passages:>9,} passages: flat {1e3 * spent:,.1f} ms, peak {most:,.0f} MiB; flat / histogram = "
            f"{spent / histogram:,.0f}; they differ by {apart(flat, exact):.1e}",
            end="",
        )
        if marked:  # the paper's read in groups knows no slots
            continue
        grouped, spent, most = measured(lambda h=held: made.hierarchical(queries, words, h, GROUP))
        print(
            f"; hierarchical (M = {GROUP}) {1e3 * spent:,.1f} ms, peak {most:,.0f} MiB, "
            f"{apart(grouped, exact):.2f} away from the exact read",
            end="",
        )
    print(f"\ngoal: at 10^5 passages, flat / histogram of at least 100; device {DEVICE.type}")


if __name__ == "__main__":
    for with_marks in (False, True):
        test_the_histogram_read_does_not_grow_with_the_bank(with_marks)
        test_beside_the_flat_and_the_hierarchical_read(with_marks)
