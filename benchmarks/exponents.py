"""What it costs to count the binary exponents of gradients, beside measuring their norms.

    python -m benchmarks.exponents

Medians of this thread's own time on the CPU (`time.thread_time`), on one thread, as a Markdown
table: the norms alone; norms and counts in one reading; and the counts alone by torch's operations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from distclip.kernels import exponents, measuring
from distclip.kernels.exponents import Counting
from distclip.kernels.measuring import PlanTables

CPU = torch.device("cpu")
CASES = [
    (torch.float32, 1, 4096), (torch.float32, 288, 4096), (torch.float32, 2000, 1024),
    (torch.float32, 144, 1 << 18), (torch.bfloat16, 288, 4096), (torch.bfloat16, 144, 1 << 18),
    (torch.float16, 144, 1 << 18), (torch.float64, 36, 1 << 18),
]  # fmt: skip


def seconds(act: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        act()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def row(dtype: torch.dtype, count: int, size: int) -> str:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).mul(1e-3).to(dtype) for _ in range(count)]
    tables, elements = PlanTables(), count * size

    def norms() -> object:
        return measuring.norms(tensors, 2.0, device=CPU, tables=tables)

    def both() -> object:
        counting = Counting(count, CPU)
        measuring.norms(tensors, 2.0, device=CPU, tables=tables, counting=counting)
        return counting.rest(tensors, tables, None)

    def operations() -> object:
        return [exponents.counts(tensor) for tensor in tensors]

    rounds = max(7, min(200, int(2e7 / elements)))
    both()  # compiles the loop
    shown = []
    for act, times in ((norms, rounds), (both, rounds), (operations, max(3, rounds // 10))):
        took = seconds(act, times)
        shown.append(f"{took * 1e6:,.0f} µs, {took / elements * 1e9:.2f} ns an element")
    name = str(dtype).removeprefix("torch.")
    return f"| {count:,} of {size:,}, {name} | {' | '.join(shown)} |"


def main() -> None:
    torch.set_num_threads(1)
    print("| gradients | norms | norms and counts in one reading | counts by torch's operations |")
    print("|---|---|---|---|")
    for case in CASES:
        print(row(*case))


if __name__ == "__main__":
    main()
