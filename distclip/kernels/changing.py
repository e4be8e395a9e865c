"""Local gradients changed in place: the door for multiplying, clamping and dropping them.

Host tensors go through the compiled loops (:mod:`distclip.kernels.host`), which multiply in float64
and round once; accelerator tensors through Triton kernels or torch's multi-tensor operations; what
neither takes through plain torch operations. Coefficients stay float32 or better until the
multiplication. (torch casts the scalar of ``_foreach_mul_``, and on accelerators a 0-dim operand,
down to a bf16 tensor's own dtype first; both are avoided here.) Torch multiplies in float32, so
there a coefficient that is no normal number of it is multiplied in several steps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.bounds import all_held, rounded_bound
from distclip.kernels.device import changes as device_changes
from distclip.kernels.device.changes import EXACT, selected, shaped
from distclip.kernels.host import choosing
from distclip.kernels.host import kernels as host
from distclip.kernels.host.choosing import Chosen, PlanTables
from distclip.kernels.host.kernels import Floats
from distclip.kernels.look import Look

_dtype, _is_cpu = map(operator.attrgetter, ("dtype", "is_cpu"))

TINY = torch.finfo(torch.float32).tiny
STEP = 2.0**-64
"""A coefficient below ``TINY`` is multiplied as ``STEP * (coefficient / STEP)``. The first product
is exact, or so small that the whole one is 0."""


def scale_(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    seen: Look | None = None,
    tables: PlanTables | None = None,
    what: str = "gradients",
) -> None:
    """``tensors[i] *= coefficients[i]``.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: float64 ``(len(tensors),)``, or one number expanded to that. Tensors whose
            coefficient is 1 cost nothing on the CPU, and are not read by the Triton kernels.
        seen: what a look at just these tensors has found.
        tables: what is remembered of them from step to step.
        what: which of the sets of tensors in ``tables`` these are.
    """
    if seen is not None and seen.kinds.on_host:
        _scale_on_host(tensors, coefficients, seen, tables, what)
        return
    for device, numbers in _by_device(tensors).items():
        some, factors = selected(tensors, coefficients, numbers)
        if device.type == "cpu":
            _scale_on_host(some, factors, None, tables, what)
        else:
            device_changes.scale_(some, factors.to(device))


def scale_all_(
    seen: Look, coefficient: Tensor, *, tables: PlanTables, what: str = "gradients"
) -> None:
    """:func:`scale_` of all tensors that a look has seen, by one number.

    Args:
        seen: the tensors.
        coefficient: 0-dim float64.
        tables: as there.
        what: as there.
    """
    table = tables.of_all(what, seen.kinds)
    if table is None:
        factors = coefficient.expand(len(seen.tensors))
        scale_(seen.tensors, factors, seen=seen, tables=tables, what=what)
        return
    host.scale_all_(table, seen.places.addresses, coefficient.item())
    torch.autograd.graph.increment_version(seen.owners)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, Sequence[int]]:
    """Which tensors, none of them empty, lie on each device."""
    if all(map(_is_cpu, tensors)):
        return {torch.device("cpu"): range(len(tensors))} if tensors else {}
    found: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            found.setdefault(tensor.device, []).append(number)
    return dict(found)


def _scale_on_host(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    seen: Look | None = None,
    tables: PlanTables | None = None,
    what: str = "gradients",
) -> None:
    chosen = choosing.choose(tensors, what, tables=tables, seen=seen, pairs=True)
    factors = coefficients.double().cpu().numpy()
    for number in _left(chosen, len(tensors)):
        if factors[number] != 1.0 and tensors[number].numel():
            for step in _steps_for(tensors[number], coefficients[number].double()):
                tensors[number].mul_(step.item())  # low precision in float32, rounded once
    if chosen is not None:
        some = factors if chosen.positions is None else factors[list(chosen.positions)]
        host.scale_whole_(chosen, some)
        _changed(chosen)


def _steps_for(tensor: Tensor, coefficients: Tensor) -> Iterable[Tensor]:
    """Factors to multiply a tensor by, one after another, for float64 coefficients."""
    return (coefficients,) if tensor.dtype in EXACT else _steps(coefficients)


def _left(chosen: Chosen | None, count: int) -> Sequence[int]:
    """Which of ``count`` tensors the compiled loops do not take."""
    if chosen is None:
        return range(count)
    if chosen.positions is None:
        return ()
    taken = set(chosen.positions)
    return [number for number in range(count) if number not in taken]


def _changed(chosen: Chosen) -> None:
    """Increase the version counters, as autograd does not see what is written to memory."""
    torch.autograd.graph.increment_version(chosen.owners)


def _steps(coefficients: Tensor) -> Iterator[Tensor]:
    """Factors whose product the float64 coefficients are, each 0 or normal in float32."""
    while True:
        small = (coefficients != 0.0) & (coefficients.abs() < TINY)
        if not bool(small.any()):
            break
        yield torch.where(small, STEP, 1.0)
        coefficients = torch.where(small, coefficients / STEP, coefficients)
    yield coefficients


def scale_units_(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    tables: PlanTables | None = None,
    seen: Look | None = None,
) -> None:
    """Multiply each unit of each local gradient by its own coefficient.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: float64 ``(sum(counts),)``: the tensors one after another, each in row-major
            order of its ``unit_dims``. Units whose coefficient is 1 are not touched.
        unit_dims: per tensor, its dims that index the units.
        counts: per tensor, how many units it has.
        tables: what is remembered of the tensors from step to step.
        seen: what a look at just these tensors has found.
    """
    left: Sequence[int] = range(len(tensors))
    if all(map(_is_cpu, tensors)) if seen is None else seen.kinds.on_host:
        chosen = choosing.choose(
            tensors,
            "scaled units",
            unit_dims=unit_dims,
            counts=counts,
            tables=tables,
            seen=seen,
            pairs=True,
        )
        coefficients = coefficients.double().cpu()
        if chosen is not None:
            host.scale_(chosen, coefficients.numpy())
            _changed(chosen)
        left = _left(chosen, len(tensors))
    if not left:
        return
    factors = torch.split(coefficients, list(counts))
    by_device: dict[torch.device, list[int]] = {}
    for number in left:
        if tensors[number].numel():
            by_device.setdefault(tensors[number].device, []).append(number)
    for device, numbers in by_device.items():
        some = [tensors[number] for number in numbers]
        theirs = [factors[number].to(device) for number in numbers]
        dims = [tuple(unit_dims[number]) for number in numbers]
        if device.type != "cpu":
            whole = coefficients.to(device) if len(some) == len(tensors) else None
            device_changes.scale_units_(some, theirs, dims, whole)
            continue
        for tensor, each, chosen_dims in zip(some, theirs, dims, strict=True):
            if bool((each != 1.0).any()):
                for step in _steps_for(tensor, each):
                    tensor.mul_(shaped(step, tensor, chosen_dims))


def clamp_(
    tensors: Sequence[Tensor],
    bounds: Sequence[float | Tensor] | Floats,
    *,
    seen: Look | None = None,
    tables: PlanTables | None = None,
) -> None:
    """Clamp tensors elementwise to their bounds, rounded to their dtypes; NaN stays NaN.

    Args:
        tensors: local gradients, any dtype and device.
        bounds: of each tensor, a number or a 0-dim tensor; inf to leave it as it is.
        seen: what a look at just these tensors has found.
        tables: what is remembered of them from step to step.
    """
    if all(map(_is_cpu, tensors)) if seen is None else seen.kinds.on_host:
        if _clamped_again(bounds, seen, tables):
            return
        limits = bounds if isinstance(bounds, np.ndarray) else np.array(list(map(float, bounds)))
        limits = all_held(limits, list(map(_dtype, tensors)) if seen is None else seen.kinds.dtypes)
        chosen = choosing.choose(tensors, "gradients", tables=tables, seen=seen)
        for number in _left(chosen, len(tensors)):
            if math.isfinite(limits[number]):
                tensors[number].clamp_(-float(limits[number]), float(limits[number]))
        if chosen is not None:
            places = chosen.positions
            host.clamp_(chosen, limits if places is None else limits[list(places)])
            _changed(chosen)
        return
    clamped = [
        (tensor, bound)
        for tensor, bound in zip(tensors, bounds, strict=True)
        if isinstance(bound, Tensor) or bound < math.inf
    ]
    if clamped and not any(isinstance(each, Tensor) or t.is_cpu for t, each in clamped):
        some = [tensor for tensor, _ in clamped]
        numbers = [rounded_bound(float(bound), tensor.dtype) for tensor, bound in clamped]
        torch._foreach_clamp_max_(some, numbers)
        torch._foreach_clamp_min_(some, [-number for number in numbers])
        return
    for tensor, bound in clamped:
        given = bound if isinstance(bound, Tensor) else rounded_bound(bound, tensor.dtype)
        limit = torch.as_tensor(given, dtype=tensor.dtype, device=tensor.device)
        torch.clamp(tensor, min=-limit, max=limit, out=tensor)


def _clamped_again(
    bounds: Sequence[float | Tensor] | Floats, seen: Look | None, tables: PlanTables | None
) -> bool:
    """Clamp tensors on the host that are of the kinds of an earlier step, if they are."""
    if seen is None or tables is None or not isinstance(bounds, np.ndarray):
        return False
    table = tables.of_all("gradients", seen.kinds)
    if table is None:
        return False

    rows = host.bounds_of(tables, "the clamp", table, bounds, seen.kinds)
    host.clamp_all_(table, seen.places.addresses, rows)
    torch.autograd.graph.increment_version(seen.owners)
    return True


def zero_(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Set ``tensors[i]`` to 0 where ``flags[i]`` is true; never through ``0 * nan``."""
    for device, numbers in _by_device(tensors).items():
        chosen, wanted = selected(tensors, flags, numbers)
        if device.type == "cpu":
            for tensor, flag in zip(chosen, wanted.tolist(), strict=True):
                if flag:
                    tensor.zero_()
        else:
            device_changes.zero_(chosen, wanted.to(device))
