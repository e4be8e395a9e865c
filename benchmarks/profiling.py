"""Where one step's time goes on the host: the functions by the time in themselves.

    python -m benchmarks.profiling plain-small
    python -m benchmarks.profiling small --way "distclip clip_grad_norm_" --steps 500 --lines 40

The case and the way are those of ``distclip bench``. First come steps without a profiler, whose
median is what a step takes; then as many under cProfile, which adds some 0.1 to 0.3 us to each call
of a function: read its shares, and the time from the median. What puts the gradients back before a
step is neither timed nor profiled. Rank 0 is shown; the others take the same steps.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from distclip.testing import run_on_ranks
from distclip.tools.bench.cases import CASES
from distclip.tools.bench.timing import Bench
from distclip.tools.bench.ways import OURS

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
WARM = 20
"""Steps that are not counted: plans are made there, and loops compiled."""
Line = tuple[str, float, float, float]
"""A function; its calls in a step; time of a step in itself, and with what it calls, in us."""


def take(case: str, way: str, steps: int) -> tuple[float, float, list[Line]]:
    """On every rank: median ms of a step without and with the profiler, and its functions."""
    bench = CASES[case].build()
    act = bench.ways[way]
    _steps(bench, way, act, WARM)
    plain = statistics.median(_steps(bench, way, act, steps))
    profiler = cProfile.Profile()
    profiled = statistics.median(_steps(bench, way, lambda: profiler.runcall(act), steps))
    found: list[Line] = []
    for (path, line, name), (_, calls, own, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = f"{path.removeprefix(ROOT)}:{line} {name}" if line else name
        found.append((where, calls / steps, 1e6 * own / steps, 1e6 * total / steps))
    return plain, profiled, sorted(found, key=lambda each: -each[2])


def _steps(bench: Bench, name: str, act: Callable[[], object], steps: int) -> list[float]:
    """Time of each in ms."""
    spent = []
    before = getattr(bench.ways[name], "before", None)
    for _ in range(steps):
        bench.before()
        if before is not None:
            before()
        dist.barrier()
        start = time.perf_counter()
        act()
        spent.append(1e3 * (time.perf_counter() - start))
    return spent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", nargs="*", default=["plain-small", "small"], help="of the bench")
    parser.add_argument("--way", default=OURS, help="of the case")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lines", type=int, default=25, help="functions that are shown")
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for case in given.case:
        if case not in CASES:
            parser.error(f"no case {case!r}; there are {', '.join(CASES)}")
        ranks = CASES[case].ranks or given.ranks
        plain, profiled, lines = run_on_ranks(
            take, ranks, case, given.way, given.steps, timeout=600.0
        )[0]
        own = sum(line[2] for line in lines)
        print(f"{CASES[case].title}, {ranks} rank(s): {given.way}")
        print(f"{plain:.3f} ms a step, {profiled:.3f} ms under the profiler, {given.steps} steps")
        print(f"{'calls':>8} {'own, us':>9} {'share':>6} {'all, us':>9}  function")
        for where, calls, alone, total in lines[: given.lines]:
            print(f"{calls:8.1f} {alone:9.1f} {alone / own:6.1%} {total:9.1f}  {where}")
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
