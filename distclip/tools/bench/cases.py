"""What ``distclip bench`` measures: on every rank, ways to clip the same gradients.

Each case builds a model with gradients and gives named functions. The peers that the ratios are
against are measured in the same run. A new case is one line in ``CASES``: its name, its title, a
function that every rank calls for its :class:`Bench`, and the way that ratios are against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard

from distclip import GradClipper, clip_grad_norm_, policies
from distclip.tools.bench import peers
from distclip.tools.bench.timing import Bench, Taken, Ways, measure

LOOSE, TIGHT = 1e9, 1e-3
"""Thresholds that never and always clip."""
TORCH = "torch clip_grad_norm_"
READ = "one read of the gradients: sum()"
READ_BOTH = "one read of gradients and weights: sum()"
REDUCE = "one all-reduce of as many numbers"
OURS = "GradClipper(global_norm)"
TORCH_ROWS = "torch vector_norm(dtype=float32)"
FOLD_PEER = "step + one read: sum()"


@dataclass(frozen=True)
class Case:
    """One table: a model, and the ways measured on it. ``peer`` is the one ratios are against."""

    name: str
    title: str
    build: Callable[[], Bench]
    peer: str


def transformer(layers: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of an FSDP2-sharded encoder, with the gradients of a real backward."""
    blocks = _blocks(layers, width).to(dtype)
    for block in blocks:
        fully_shard(block)
        _backward(block, width, dtype)
    return list(blocks.parameters())


def _blocks(layers: int, width: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(layers)
    )


def _backward(block: nn.Module, width: int, dtype: torch.dtype = torch.float32) -> None:
    """Of a random projection of the output, on 64 tokens.

    The square of what a LayerNorm gives is a constant: its gradients would be rounding errors. And
    with few tokens some units are never active, so that their rows are zero.
    """
    given = block(torch.randn(4, 16, width, dtype=dtype)).float()
    given.backward(torch.randn_like(given))


def bench_of(
    parameters: Sequence[Tensor],
    ways: Mapping[str, Callable[[], object]],
    *,
    clipping: bool,
    optional: Mapping[str, Callable[[], Callable[[], object]]] | None = None,
) -> Bench:
    """Ways beside the floor: one read of the local gradients, and one all-reduce.

    Args:
        parameters: with gradients.
        ways: that act on them.
        clipping: put the gradients back before each way, since the one before has clipped them.
        optional: makers of further ways, which may find that their package is not there.
    """
    gradients = local_gradients(parameters)
    found: Ways = {**ways}
    missing: dict[str, str] = {}
    for name, make in (optional or {}).items():
        try:
            found[name] = make()
        except ImportError as error:
            missing[name] = f"not measured: {error}"
    found[REDUCE] = _all_reduce(len(parameters))
    found[READ] = lambda: [gradient.sum() for gradient in gradients]
    before: Callable[[], object] = lambda: None  # noqa: E731
    if clipping:
        originals = [gradient.clone() for gradient in gradients]
        before = functools.partial(torch._foreach_copy_, gradients, originals)
    size = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return Bench(found, before, size, missing)


def against_torch(parameters: Sequence[Tensor], threshold: float) -> Bench:
    """Clipping by the global norm: distclip, and who else does it."""
    listed = list(parameters)
    policy = policies.global_norm(threshold)
    return bench_of(
        listed,
        {
            TORCH: peers.torch_clip(listed, threshold),
            "torchtitan's algorithm": peers.titan_clip(listed, threshold),
            "distclip clip_grad_norm_": lambda: clip_grad_norm_(listed, threshold),
            OURS: GradClipper(listed, policy).clip_,
            'GradClipper(global_norm, on_nonfinite="pass")': GradClipper(
                listed, policy, on_nonfinite="pass"
            ).clip_,
        },
        clipping=threshold == TIGHT,
        optional={"Accelerate clip_grad_norm_": lambda: peers.accelerate_clip(listed, threshold)},
    )


def model(layers: int, width: int, threshold: float) -> Bench:
    """Of an encoder under FSDP2."""
    return against_torch(transformer(layers, width), threshold)


def plain(count: int, numel: int, dtype: torch.dtype = torch.float32) -> Bench:
    """Parameters that are whole on each rank, each in memory of its own: one process, or DDP."""
    parameters: list[Tensor] = []
    for _ in range(count):
        parameter = nn.Parameter(torch.randn(numel, dtype=dtype))
        parameter.grad = torch.randn(numel, dtype=dtype)
        parameters.append(parameter)
    return against_torch(parameters, LOOSE)


def embedding() -> list[Tensor]:
    """An FSDP2-sharded bf16 table of a vocabulary, with the gradient of a real backward."""
    torch.manual_seed(0)
    table = nn.Embedding(32_000, 1024, dtype=torch.bfloat16)
    fully_shard(table)
    table(torch.arange(32_000)).float().square().sum().backward()
    return list(table.parameters())


def bf16(build: Callable[[], list[Tensor]]) -> Bench:
    """Measuring bf16 gradients; torch's function in float32 sees local shards only."""
    parameters = build()
    gradients = local_gradients(parameters)

    def rows() -> list[Tensor]:
        return [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]

    return bench_of(
        parameters,
        {
            TORCH_ROWS: rows,
            TORCH: peers.torch_clip(parameters, LOOSE),
            OURS: GradClipper(parameters, policies.global_norm(LOOSE)).clip_,
        },
        clipping=False,
    )


def adaptive(layers: int, width: int) -> Bench:
    """The adaptive policies under FSDP2, where nobody else has them."""
    parameters = transformer(layers, width)
    both = [*local_gradients(parameters), *local_weights(parameters)]
    ways: Ways = {READ_BOTH: lambda: [tensor.sum() for tensor in both]}
    for policy in (
        policies.agc(LOOSE), policies.agc(0.01), policies.dreamer_agc(LOOSE),
        policies.dreamer_agc(0.01),
    ):  # fmt: skip
        ways[repr(policy)] = GradClipper(parameters, policy).clip_
    return bench_of(parameters, ways, clipping=True)


def adaptive_plain() -> Bench:
    """Row AGC where its peers work: on tensors that are whole on every rank."""
    parameters = list(_blocks(12, 512).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ways: Ways = {
        "timm's formula": peers.agc_where(parameters, 0.01),
        "Composer's formula": peers.agc_coefficient(parameters, 0.01),
        repr(policies.agc(0.01)): GradClipper(parameters, policies.agc(0.01)).clip_,
    }
    return bench_of(parameters, ways, clipping=True)


def fsdp1() -> Bench:
    """A model under FSDP1, one flat parameter a layer."""
    blocks = _blocks(24, 64)
    wrapped = FullyShardedDataParallel(
        nn.Sequential(*blocks),
        auto_wrap_policy=ModuleWrapPolicy({nn.TransformerEncoderLayer}),
        device_id=torch.device("cpu"),
    )
    _backward(wrapped, 64)
    parameters = list(wrapped.parameters())
    clipper = GradClipper(wrapped, policies.global_norm(TIGHT))
    return bench_of(
        parameters,
        {"FSDP1's clip_grad_norm_": peers.fsdp1_clip(wrapped, TIGHT), OURS: clipper.clip_},
        clipping=True,
    )


def gigabyte() -> Bench:
    """One gibibyte of gradients in all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = 2048 // dist.get_world_size()
    parameters = [
        nn.Parameter(_dtensor(torch.ones(rows, 2048), mesh), requires_grad=True) for _ in range(64)
    ]
    for parameter in parameters:
        parameter.grad = _dtensor(torch.randn(rows, 2048), mesh)
    return against_torch(parameters, LOOSE)


def every_policy() -> Bench:
    """What one policy costs beside another."""
    parameters = transformer(24, 64)
    chosen: dict[str, Any] = {
        "measure": policies.measure(),
        "global_norm": policies.global_norm(TIGHT),
        "value": policies.value(TIGHT),
        "parameter_norm": policies.parameter_norm(TIGHT),
        "group_norm": policies.group_norm(TIGHT),
        "block_rms": policies.block_rms(TIGHT),
        "agc, rows": policies.agc(0.01),
        "agc, tensors": policies.agc(0.01, unit="tensor"),
        "dreamer_agc": policies.dreamer_agc(0.01),
        "autoclip": policies.autoclip(),
        "zclip": policies.zclip(),
        "adagc": policies.adagc(),
    }
    optimizer = torch.optim.SGD(parameters)  # whose parameter groups group_norm means
    ways = {
        name: GradClipper(parameters, policy, optimizer=optimizer).clip_
        for name, policy in chosen.items()
    }
    return bench_of(parameters, ways, clipping=True)


def count(parameters: int) -> Bench:
    """Many DTensor parameters of 64 elements: what one parameter costs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ones = torch.ones(64 // dist.get_world_size())
    made = [nn.Parameter(_dtensor(ones, mesh)) for _ in range(parameters)]
    for parameter in made:
        parameter.grad = _dtensor(ones, mesh)
    ways: Ways = {OURS: GradClipper(made, policies.global_norm(LOOSE)).clip_}
    missing = {}
    if parameters <= 1000:
        ways[TORCH] = peers.torch_clip(made, LOOSE)
    else:  # torch stacks K DTensors at a cost of K * K (pytorch#169445)
        missing[TORCH] = "not measured: its time grows as the square of the number of parameters"
    return Bench(ways, gradient_bytes=4 * len(ones) * parameters, missing=missing)


def zero(stage: int) -> Bench:
    """Steps of DeepSpeed engines of a stage, one of which clips by itself."""
    from distclip.tools.bench import zero as bench_zero

    return Bench(bench_zero.ways(stage))


def fold() -> Bench:
    """A fused optimizer's step, with the clipping before it or folded into it."""
    from distclip.tools.bench import fold as bench_fold

    return Bench(bench_fold.ways())


def _dtensor(local: Tensor, mesh: object) -> DTensor:
    return DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False)  # type: ignore[arg-type]


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts, without what makes a DTensor of them; fetched once, not in a round."""
    return [_local(p.grad) for p in parameters if p.grad is not None]


def local_weights(parameters: Sequence[Tensor]) -> list[Tensor]:
    """See :func:`local_gradients`."""
    return [_local(parameter.detach()) for parameter in parameters]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _all_reduce(size: int) -> Callable[[], object]:
    numbers = torch.zeros(size, dtype=torch.float64)
    return lambda: dist.all_reduce(numbers)


_SMALL = "FSDP2, 288 parameters, 1.2 M elements"
_LARGE = "FSDP2, 144 parameters, 38 M elements"

CASES = {
    case.name: case
    for case in (
        Case("small", f"{_SMALL}, not clipping", functools.partial(model, 24, 64, LOOSE), TORCH),
        Case("small-clipped", f"{_SMALL}, clipping", functools.partial(model, 24, 64, TIGHT),
             TORCH),
        Case("large", f"{_LARGE}, not clipping", functools.partial(model, 12, 512, LOOSE), TORCH),
        Case("large-clipped", f"{_LARGE}, clipping", functools.partial(model, 12, 512, TIGHT),
             TORCH),
        Case("bf16", f"{_LARGE} in bf16, not clipping",
             functools.partial(bf16, functools.partial(transformer, 12, 512, torch.bfloat16)),
             TORCH_ROWS),
        Case("bf16-embedding", "FSDP2, one embedding of 32,000 x 1,024 in bf16, not clipping",
             functools.partial(bf16, embedding), TORCH_ROWS),
        Case("agc-small", f"{_SMALL}, adaptive policies", functools.partial(adaptive, 24, 64),
             READ),
        Case("agc-large", f"{_LARGE}, adaptive policies", functools.partial(adaptive, 12, 512),
             READ),
        Case("agc-plain", "144 plain parameters, 38 M elements on each rank, clipping rows",
             adaptive_plain, "timm's formula"),
        Case("fsdp1", "FSDP1, 24 flat parameters of 288, 1.2 M elements, clipping", fsdp1,
             "FSDP1's clip_grad_norm_"),
        Case("gigabyte", "64 DTensors, 1 GiB of gradients, not clipping", gigabyte, TORCH),
        Case("policies", f"{_SMALL}, each policy, clipping", every_policy, "global_norm"),
        Case("fold", "fused AdamW, 82 parameters, 33.6 M elements: optimizer.step(), clipping",
             fold, FOLD_PEER),
    )
}  # fmt: skip
for _name, _count, _numel, _dtype in (
    ("small", 288, 4096, torch.float32),
    ("many", 2000, 1024, torch.float32),
    ("large", 144, 262_144, torch.float32),
    ("bf16", 144, 262_144, torch.bfloat16),
    ("fp16", 144, 262_144, torch.float16),
):
    CASES[f"plain-{_name}"] = Case(
        f"plain-{_name}",
        f"{_count:,} plain parameters of {_numel:,} elements, {str(_dtype)[6:]}, not clipping",
        functools.partial(plain, _count, _numel, _dtype),
        TORCH,
    )
for _stage in (1, 2, 3):
    CASES[f"zero-{_stage}"] = Case(
        f"zero-{_stage}",
        f"DeepSpeed ZeRO-{_stage}, 96 parameters, 6.3 M elements: engine.step(), clipping",
        functools.partial(zero, _stage),
        "DeepSpeed's own clipping",
    )
for _number in (1_000, 5_000, 20_000):
    CASES[f"count-{_number}"] = Case(
        f"count-{_number}",
        f"{_number:,} DTensor parameters of 64 elements, not clipping",
        functools.partial(count, _number),
        TORCH,
    )
GROUPS = {
    group: tuple(name for name in CASES if name.startswith(f"{group}-"))
    for group in ("plain", "zero", "count")
}
"""What stands for several cases."""


def run_case(name: str, rounds: int, budget: float) -> Taken:
    """On one rank: all ways of a case, measured."""
    return measure(CASES[name].build(), rounds, budget)
