"""The ways that a case of ``distclip bench`` measures on its model, beside the floors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.tools.bench import peers
from distclip.tools.bench.models import (
    SMALL,
    Model,
    exact_norm,
    fsdp2,
    local_gradients,
    local_weights,
    plain_tensors,
)
from distclip.tools.bench.timing import Bench, PreparedWay, Ways

LOOSE, TIGHT = 1e9, 1e-3
"""Thresholds that never and always clip."""
AGC_FACTOR = 0.01
"""A ``clip_factor`` with which the drawn gradients are clipped."""
TORCH = "torch clip_grad_norm_"
FSDP1_CLIP = "FSDP1's clip_grad_norm_"
READ = "one read of the gradients: sum()"
READ_BOTH = "one read of gradients and weights: sum()"
READ_WEIGHTS = "one read of the weights: sum()"
READ_MULTIPLY = "one read and one multiply: sum(), mul_()"
REDUCE = "one all-reduce of as many numbers"
OURS = "GradClipper(global_norm)"
PASS = 'GradClipper(global_norm, on_nonfinite="pass")'
DROP_IN = "distclip clip_grad_norm_"
OUR_AGC = "GradClipper(agc)"
AGC_DROP_IN = "distclip clip_grad_agc_"
TORCH_ROWS = "torch vector_norm(dtype=float32)"
FOLD_PEER = "step + one read: sum()"
NORM_ERROR = "relative error of the norm"


def bench_of(
    parameters: Sequence[Tensor],
    ways: Mapping[str, Callable[[], object]],
    *,
    clipping: bool,
    optional: Mapping[str, Callable[[], Callable[[], object]]] | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Bench:
    """Ways beside the floors: reads of the local gradients, and one all-reduce.

    Args:
        parameters: with gradients.
        ways: that act on them.
        clipping: put the gradients back before each way, since the one before has clipped them.
        optional: makers of further ways, which may find that their package is not there.
        numbers: what is found out beside times.
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
    found[READ] = reading(gradients)
    before = _touching(gradients)
    if clipping:
        found[READ_MULTIPLY] = _multiplying(gradients)
        originals = [gradient.clone() for gradient in gradients]
        before = functools.partial(torch._foreach_copy_, gradients, originals)
    size = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return Bench(found, before, size, missing, numbers or {})


def reading(tensors: Sequence[Tensor]) -> Callable[[], object]:
    """The floor of everything that looks at tensors."""
    return lambda: [tensor.sum() for tensor in tensors]


def _multiplying(gradients: Sequence[Tensor]) -> Callable[[], object]:
    """The floor of everything that looks at gradients and then scales them."""

    def act() -> None:
        for gradient in gradients:
            gradient.sum()
        for gradient in gradients:
            gradient.mul_(0.5)

    return act


def _touching(gradients: Sequence[Tensor]) -> Callable[[], object]:
    """Makes gradients count as changed, as after a backward, and reads and writes nothing."""
    empty = [gradient.flatten()[:0] for gradient in gradients]
    return lambda: [view.zero_() for view in empty]


def _all_reduce(size: int) -> Callable[[], object]:
    numbers = torch.zeros(size, dtype=torch.float64)
    return lambda: dist.all_reduce(numbers)


def clip_norm(build: Callable[[], Model], threshold: float, *, rows: bool = False) -> Bench:
    """Clipping by the global norm: distclip, and who else does it for this sharding.

    Args:
        build: makes the model.
        threshold: ``LOOSE`` or ``TIGHT``.
        rows: measure also torch's norm of each local gradient in float32, which half precision
            needs to be right.
    """
    model = build()
    listed = model.parameters
    ways: Ways = {}
    optional = {}
    if model.fsdp1 is not None:  # what Accelerate calls as well
        ways[FSDP1_CLIP] = peers.fsdp1_clip(model.fsdp1, threshold)
    else:
        ways[TORCH] = peers.torch_clip(listed, threshold)
        ways["torchtitan's algorithm"] = peers.titan_clip(listed, threshold)
        optional["Accelerate clip_grad_norm_"] = lambda: peers.accelerate_clip(listed, threshold)
    if rows:
        ways[TORCH_ROWS] = peers.norms_in_float32(local_gradients(listed))
    policy = policies.global_norm(threshold)
    ways[DROP_IN] = lambda: distclip.clip_grad_norm_(listed, threshold)
    ways[OURS] = GradClipper(model.target, policy).clip_
    ways[PASS] = GradClipper(model.target, policy, on_nonfinite="pass").clip_
    numbers = {}
    if threshold == LOOSE and model.fsdp1 is None:
        numbers[NORM_ERROR] = norm_error(listed)
    clipping = threshold == TIGHT
    return bench_of(listed, ways, clipping=clipping, optional=optional, numbers=numbers)


def norm_error(parameters: Sequence[Tensor]) -> float:
    """How far the norm is from that of float64, relative.

    A parameter of float64 beside the others makes the report's norm one of float64 too; it adds
    nothing, since its gradient is 0.
    """
    wide = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    wide.grad = torch.zeros_like(wide)
    report = GradClipper([*parameters, wide], policies.measure()).clip_()
    exact = exact_norm(parameters)
    return abs(float(report.total_norm) - exact) / exact


def adaptive(build: Callable[[], Model]) -> Bench:
    """Adaptive and per-parameter policies under a sharding where nobody else has them."""
    model = build()
    listed = model.parameters
    ways: Ways = {READ_BOTH: reading([*local_gradients(listed), *local_weights(listed)])}
    for policy in (
        policies.agc(LOOSE), policies.agc(AGC_FACTOR), policies.dreamer_agc(LOOSE),
        policies.dreamer_agc(AGC_FACTOR), policies.parameter_norm(LOOSE),
        policies.parameter_norm(TIGHT),
    ):  # fmt: skip
        ways[repr(policy)] = GradClipper(model.target, policy).clip_
    return bench_of(listed, ways, clipping=True)


def adaptive_plain(build: Callable[[], Model], factor: float) -> Bench:
    """Row AGC where its peers work: on tensors that are whole on every rank."""
    model = build()
    listed = model.parameters
    ways: Ways = {
        "timm's formula": peers.agc_where(listed, factor),
        "Composer's formula": peers.agc_coefficient(listed, factor),
        OUR_AGC: GradClipper(model.target, policies.agc(factor)).clip_,
        AGC_DROP_IN: lambda: distclip.clip_grad_agc_(listed, factor),
        READ_WEIGHTS: reading(local_weights(listed)),
    }
    if factor == LOOSE:
        ways[OURS] = GradClipper(model.target, policies.global_norm(LOOSE)).clip_
    return bench_of(listed, ways, clipping=factor != LOOSE)


def clip_value(build: Callable[[], Model]) -> Bench:
    """Clamping every element."""
    model = build()
    listed, policy = model.parameters, policies.value(TIGHT)
    bare = GradClipper(model.target, policy, norms=False, on_nonfinite="pass")
    ways: Ways = {
        "torch clip_grad_value_": lambda: torch.nn.utils.clip_grad_value_(listed, TIGHT),
        "distclip clip_grad_value_": lambda: distclip.clip_grad_value_(listed, TIGHT),
        "GradClipper(value)": GradClipper(model.target, policy).clip_,
        'GradClipper(value, norms=False, on_nonfinite="pass")': bare.clip_,
    }
    return bench_of(listed, ways, clipping=True)


def total_norm(build: Callable[[], Model]) -> Bench:
    """The norm of all gradients as a function, made whole where torch returns a part of it."""
    listed = build().parameters
    gradients: list[Tensor] = [p.grad for p in listed if p.grad is not None]
    ways = {
        "torch get_total_norm": peers.torch_total_norm(gradients),
        "distclip get_total_norm": lambda: distclip.get_total_norm(gradients),
    }
    return bench_of(listed, ways, clipping=False)


def each_norm(build: Callable[[], Model]) -> Bench:
    """The norm of each parameter's gradient, on tensors that are whole on every rank."""
    listed = build().parameters
    named = [(f"p{number}", parameter) for number, parameter in enumerate(listed)]
    gradients = local_gradients(listed)
    ways = {
        "torch _foreach_norm": lambda: torch._foreach_norm(gradients),
        "distclip grad_norms": lambda: distclip.grad_norms(named),
    }
    return bench_of(listed, ways, clipping=False)


def threaded(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Bench:
    """On one and on two threads, not clipping: what distclip gains, and what ``sum()`` gains."""
    model = plain_tensors(count, shape, dtype)
    listed = model.parameters
    gradients = local_gradients(listed)
    acts: dict[str, Callable[[], object]] = {
        READ: reading(gradients),
        TORCH: peers.torch_clip(listed, LOOSE),
        DROP_IN: lambda: distclip.clip_grad_norm_(listed, LOOSE),
        OURS: GradClipper(model.target, policies.global_norm(LOOSE)).clip_,
    }
    ways = {
        on_threads(name, threads): PreparedWay(
            act, functools.partial(torch.set_num_threads, threads)
        )
        for name, act in acts.items()
        for threads in (1, 2)
    }
    size = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return Bench(ways, _touching(gradients), size)


def on_threads(way: str, threads: int) -> str:
    """Name of a way in the cases of :func:`threaded`."""
    return f"{way}, {threads} thread{'s' if threads > 1 else ''}"


def every_policy() -> Bench:
    """What one policy costs beside another."""
    parameters = fsdp2(SMALL).parameters
    chosen: dict[str, Any] = {
        "measure": policies.measure(),
        "global_norm": policies.global_norm(TIGHT),
        "value": policies.value(TIGHT),
        "parameter_norm": policies.parameter_norm(TIGHT),
        "group_norm": policies.group_norm(TIGHT),
        "block_rms": policies.block_rms(TIGHT),
        "agc, rows": policies.agc(AGC_FACTOR),
        "agc, tensors": policies.agc(AGC_FACTOR, unit="tensor"),
        "dreamer_agc": policies.dreamer_agc(AGC_FACTOR),
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


def count(model: Model) -> Bench:
    """Many small DTensor parameters: what one parameter costs."""
    made = model.parameters
    size = sum(gradient.numel() * gradient.element_size() for gradient in local_gradients(made))
    ways: Ways = {OURS: GradClipper(made, policies.global_norm(LOOSE)).clip_}
    missing = {}
    if len(made) <= 1000:
        ways[TORCH] = peers.torch_clip(made, LOOSE)
    else:  # torch stacks K DTensors at a cost of K * K (pytorch#169445)
        missing[TORCH] = "not measured: its time grows as the square of the number of parameters"
    return Bench(ways, _touching(local_gradients(made)), size, missing)
