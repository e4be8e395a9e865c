"""What ``distclip bench`` measures: on every rank, ways to clip the same gradients.

Each case builds a model with gradients and gives named functions. The peers that the ratios are
against are measured in the same run, in turn with ours.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from distclip import GradClipper, clip_grad_norm_, policies

Ways = dict[str, Callable[[], object]]

LOOSE, TIGHT = 1e9, 1e-3
"""Thresholds that never and always clip."""


@dataclass(frozen=True)
class Case:
    """One table: a model, and the rows measured on it. ``peer`` is the row ratios are against."""

    name: str
    title: str
    build: Callable[[], Ways]
    peer: str


def transformer(layers: int, width: int) -> list[Tensor]:
    """Parameters of an FSDP2-sharded encoder, with the gradients of a real backward."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(layers)
    )
    for block in blocks:
        fully_shard(block)
    for block in blocks:
        block(torch.randn(2, 4, width)).square().sum().backward()
    return list(blocks.parameters())


def _against_torch(parameters: Sequence[Tensor], threshold: float) -> Ways:
    listed = list(parameters)
    clipper = GradClipper(listed, policies.global_norm(threshold))
    bare = GradClipper(listed, policies.global_norm(threshold), on_nonfinite="pass")
    return {
        "torch clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(listed, threshold),
        "distclip clip_grad_norm_": lambda: clip_grad_norm_(listed, threshold),
        "GradClipper(global_norm)": clipper.clip_,
        'GradClipper(global_norm, on_nonfinite="pass")': bare.clip_,
        "one all-reduce of as many numbers": _all_reduce(len(listed)),
        "one read of the gradients: sum()": lambda: [_local(p).sum() for p in listed],
    }


def small() -> Ways:
    """288 parameters, 1.2 M elements, nothing clipped."""
    return _against_torch(transformer(24, 64), LOOSE)


def small_clipped() -> Ways:
    """The same, clipped."""
    return _against_torch(transformer(24, 64), TIGHT)


def large() -> Ways:
    """144 parameters, 38 M elements, nothing clipped."""
    return _against_torch(transformer(12, 512), LOOSE)


def large_clipped() -> Ways:
    """The same, clipped."""
    return _against_torch(transformer(12, 512), TIGHT)


def adaptive() -> Ways:
    """The adaptive policies on the small model: torch has none under sharding."""
    parameters = transformer(24, 64)
    ways: Ways = {"one read of gradients and weights: sum()": lambda: _read_both(parameters)}
    for policy in (policies.agc(LOOSE), policies.agc(0.01), policies.dreamer_agc(LOOSE)):
        ways[repr(policy)] = GradClipper(parameters, policy).clip_
    return ways


def count(parameters: int) -> Ways:
    """Many DTensor parameters of 64 elements: what one parameter costs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ones = torch.ones(64 // dist.get_world_size())
    made = [nn.Parameter(_dtensor(ones, mesh)) for _ in range(parameters)]
    for parameter in made:
        parameter.grad = _dtensor(ones, mesh)
    ways: Ways = {"GradClipper(global_norm)": GradClipper(made, policies.global_norm(LOOSE)).clip_}
    if parameters <= 1000:  # torch stacks K DTensors at a cost of K * K (pytorch#169445)
        ways["torch clip_grad_norm_"] = lambda: torch.nn.utils.clip_grad_norm_(made, LOOSE)
    return ways


def zero(stage: int) -> Ways:
    """Steps of two DeepSpeed engines of a stage, one of which clips by itself."""
    from distclip.cli import bench_zero

    return bench_zero.ways(stage)


def fold() -> Ways:
    """A fused optimizer's step, with the clipping before it or folded into it."""
    from distclip.cli import bench_fold

    return {**bench_fold.ways()}


def _dtensor(local: Tensor, mesh: object) -> DTensor:
    return DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)  # type: ignore[arg-type]


def _local(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else torch.zeros(())


def _read_both(parameters: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            _local(parameter).sum()
            if isinstance(parameter, DTensor):
                parameter.to_local().sum()


def _all_reduce(size: int) -> Callable[[], object]:
    numbers = torch.zeros(size, dtype=torch.float64)
    return lambda: dist.all_reduce(numbers)


CASES = {
    case.name: case
    for case in (
        Case("small", "FSDP2, 288 parameters, 1.2 M elements, not clipping", small,
             "torch clip_grad_norm_"),
        Case("small-clipped", "FSDP2, 288 parameters, 1.2 M elements, clipping", small_clipped,
             "torch clip_grad_norm_"),
        Case("large", "FSDP2, 144 parameters, 38 M elements, not clipping", large,
             "torch clip_grad_norm_"),
        Case("large-clipped", "FSDP2, 144 parameters, 38 M elements, clipping", large_clipped,
             "torch clip_grad_norm_"),
        Case("adaptive", "FSDP2, 288 parameters, adaptive policies", adaptive,
             "one read of gradients and weights: sum()"),
        Case("fold", "fused AdamW, 82 parameters, 33.6 M elements: optimizer.step(), clipping",
             fold, "step + one read: sum()"),
    )
}  # fmt: skip
for _stage in (1, 2, 3):
    CASES[f"zero-{_stage}"] = Case(
        f"zero-{_stage}",
        f"DeepSpeed ZeRO-{_stage}, 96 parameters, 6.3 M elements: engine.step(), clipping",
        functools.partial(zero, _stage),
        "DeepSpeed's own clipping",
    )
GROUPS = {"zero": tuple(name for name in CASES if name.startswith("zero-"))}
"""What stands for several cases."""
COUNTS = (1_000, 5_000, 20_000)


def run_case(name: str, rounds: int) -> dict[str, list[float]]:
    """On one rank: every way's wall times in ms, taken in turn after a common barrier.

    A way may have a method ``before``, which is not part of what is measured.
    """
    return _time(CASES[name].build(), rounds)


def run_count(parameters: int, rounds: int) -> dict[str, list[float]]:
    """As :func:`run_case`, for a number of parameters."""
    return _time(count(parameters), rounds)


def _nothing() -> None:
    pass


def _time(ways: Ways, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            getattr(way, "before", _nothing)()
            dist.barrier()
            start = time.perf_counter()
            way()
            if turn >= 2:  # the first two warm caches and compile plans
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


@dataclass(frozen=True)
class Row:
    """One way's result: per round the slowest rank's time; ratio = peer / way, round by round."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float


def rows(ranks: Sequence[dict[str, list[float]]], peer: str) -> list[Row]:
    """Combine the ranks' times."""
    slowest = {
        name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }
    result = []
    for name, times in slowest.items():
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        against = slowest.get(peer)
        ratio = math.nan
        if against is not None:
            ratio = statistics.median(a / b for a, b in zip(against, times, strict=True))
        result.append(Row(name, statistics.median(times), low, high, ratio))
    return result
