"""Rounds of ``distclip bench``: every way once, in an order drawn anew, on all ranks together."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from distclip.tools.launch.leaving import let_gloo_finish

Ways = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class PreparedWay:
    """A way with a preparation of its own, which is not timed."""

    act: Callable[[], object]
    before: Callable[[], object]

    def __call__(self) -> None:
        """Clip once; this call is timed."""
        self.act()


WARM = 2
"""Rounds before those that count: caches are cold there, and plans are made."""
LEAST_ROUNDS = 3
"""Measured rounds of a case whatever its budget."""


@dataclass(frozen=True)
class Bench:
    """What one case measures on a rank.

    Attributes:
        ways: name -> what is timed. A way may have a method ``before``, which is not.
        before: called before every way, not timed: puts the gradients back.
        gradient_bytes: of the local gradients.
        missing: name of a peer that cannot be measured here -> why.
        numbers: what is found out beside times, the same on every rank.
    """

    ways: Mapping[str, Callable[[], object]]
    before: Callable[[], object] = lambda: None
    gradient_bytes: int = 0
    missing: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Taken:
    """One rank's measurements, by way.

    Attributes:
        wall: ms of each round.
        cpu: ms that all threads of this process computed, of each round.
        extra: bytes, the largest amount held at once in a round beyond what was held before it.
        orders: of each round, the ways as they were taken.
        gradient_bytes: of the local gradients.
        missing: see :class:`Bench`.
        numbers: see :class:`Bench`.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    extra: dict[str, int]
    orders: list[list[str]]
    gradient_bytes: int
    missing: dict[str, str]
    numbers: dict[str, float] = field(default_factory=dict)


def time_ways(bench: Bench, rounds: int, budget: float) -> Taken:
    """Time every way in turn after a common barrier.

    Args:
        bench: on every rank the same ways.
        rounds: measured rounds.
        budget: seconds after which no new round begins, on any rank.
    """
    names = list(bench.ways)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    orders: list[list[str]] = []
    began = time.monotonic()
    for number in range(-WARM, rounds):
        if number >= LEAST_ROUNDS and _anywhere(time.monotonic() - began > budget):
            break
        order = drawn(names, number)
        for name in order:
            spent, computed = _once(bench, name)
            if number >= 0:
                wall[name].append(spent)
                cpu[name].append(computed)
        if number >= 0:
            orders.append(order)
    extra = {}
    for name in names:
        _prepare(bench, name)
        extra[name] = extra_bytes(bench.ways[name])
    size, missing, numbers = bench.gradient_bytes, dict(bench.missing), dict(bench.numbers)
    return Taken(wall, cpu, extra, orders, size, missing, numbers)


def drawn(names: list[str], number: int) -> list[str]:
    """The order of a round, the same on every rank: no way always follows the same other one."""
    order = list(names)
    random.Random(number).shuffle(order)
    return order


def _anywhere(true: bool) -> bool:
    """Whether any rank says so: all have to stop after the same round."""
    if not dist.is_initialized():
        return true
    flag = torch.tensor(float(true))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _prepare(bench: Bench, name: str) -> None:
    bench.before()
    before = getattr(bench.ways[name], "before", None)
    if before is not None:
        before()
    if dist.is_initialized():
        dist.barrier()


def _once(bench: Bench, name: str) -> tuple[float, float]:
    """Run once; wall and CPU time in ms."""
    way = bench.ways[name]
    _prepare(bench, name)
    computed = time.process_time()
    start = time.perf_counter()
    way()
    end = time.perf_counter()
    return 1e3 * (end - start), 1e3 * (time.process_time() - computed)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's C++ writes to standard error whenever it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _let_gloo_finish() -> None:
    """Wait until gloo's threads have let go of the tensors of the last collective.

    A thread that drops the last reference to one takes the GIL for it. Where tracemalloc (CPython
    3.11) or the profiler (torch 2.13) starts or stops meanwhile, the process crashes.
    """
    time.sleep(0.05)
    let_gloo_finish()  # on a busy machine they may not have run yet


def extra_bytes(act: Callable[[], object]) -> int:
    """The most that is allocated at once while ``act`` runs: tensors, and what Python traces.

    Tensors that ``act`` frees but did not allocate count for nothing. The two peaks are added up,
    though they need not fall together.
    """
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    _let_gloo_finish()
    with _silent():
        profile.start()
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    start, _ = tracemalloc.get_traced_memory()
    act()
    _, peak = tracemalloc.get_traced_memory()
    _let_gloo_finish()
    if not tracing:
        tracemalloc.stop()
    with _silent():
        profile.stop()
    results: Any = profile.profiler
    events = results.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most + peak - start
