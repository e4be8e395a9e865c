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

import torch
from torch import Tensor

from distclip.kernels import multi_tensor
from distclip.kernels.bounds import held
from distclip.kernels.host import kernels as host
from distclip.kernels.host.kernels import Chosen
from distclip.kernels.transfer import to_device

_is_cpu = operator.attrgetter("is_cpu")

LOW_PRECISION = frozenset((torch.bfloat16, torch.float16))
EXACT = frozenset((torch.float64, torch.complex128))
"""These are multiplied in float64, all others in float32."""
TINY = torch.finfo(torch.float32).tiny
STEP = 2.0**-64
"""A coefficient below ``TINY`` is multiplied as ``STEP * (coefficient / STEP)``. The first product
is exact, or so small that the whole one is 0."""
CHUNK = 1 << 20
"""Elements of a low-precision accelerator tensor converted at a time."""


def scale_(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    *,
    chosen: Chosen | None = None,
) -> None:
    """``tensors[i] *= coefficients[i]``.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: float64 ``(len(tensors),)``, or one number expanded to that. Tensors whose
            coefficient is 1 cost nothing on the CPU, and are not read by the Triton kernels.
        chosen: what the measuring found of just these tensors.
    """
    if chosen is not None and chosen.positions is None:
        host.scale_whole_(chosen, coefficients.double().cpu().numpy())
        _changed(chosen)
        return
    for device, numbers in _by_device(tensors).items():
        some, factors = _chosen(tensors, coefficients, numbers)
        if device.type == "cpu":
            _scale_on_host(some, factors)
        else:
            _scale_on_device(some, factors.to(device))


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, Sequence[int]]:
    """Which tensors, none of them empty, lie on each device."""
    if all(map(_is_cpu, tensors)):
        return {torch.device("cpu"): range(len(tensors))} if tensors else {}
    found: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel():
            found.setdefault(tensor.device, []).append(number)
    return dict(found)


def _chosen(
    tensors: Sequence[Tensor], values: Tensor, numbers: Sequence[int]
) -> tuple[Sequence[Tensor], Tensor]:
    """Some of the tensors, and of the values that are theirs."""
    if len(numbers) == len(tensors):
        return tensors, values
    some = [tensors[number] for number in numbers]
    if values.stride(0) == 0:
        return some, values[: len(some)]
    return some, values.index_select(0, to_device(numbers, values.device))


def _scale_on_host(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    chosen = host.choose(tensors)
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
    """Tell autograd, which does not see what is written to memory."""
    torch.autograd.graph.increment_version(chosen.tensors)


def _steps(coefficients: Tensor) -> Iterator[Tensor]:
    """Factors whose product the float64 coefficients are, each 0 or normal in float32."""
    while True:
        small = (coefficients != 0.0) & (coefficients.abs() < TINY)
        if not bool(small.any()):
            break
        yield torch.where(small, STEP, 1.0)
        coefficients = torch.where(small, coefficients / STEP, coefficients)
    yield coefficients


def _scale_on_device(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    by_kernel, others = _by_way(tensors)
    if by_kernel:
        multi_tensor.scale_(*_chosen(tensors, coefficients, by_kernel))
    if not others:
        return
    rest, factors = _chosen(tensors, coefficients, others)
    if factors.stride(0) == 0:
        for dtype in (torch.float32, torch.float64):
            alike = [tensor for tensor in rest if tensor.dtype is dtype]
            if alike:
                torch._foreach_mul_(alike, factors[0].to(dtype))
        rest = [tensor for tensor in rest if tensor.dtype not in (torch.float32, torch.float64)]
    for tensor, factor in zip(rest, factors.unbind(), strict=False):
        if tensor.dtype in LOW_PRECISION:
            for part in _parts(tensor):
                part.copy_(part.float() * factor.float())
        else:
            tensor.mul_(factor.to(tensor.real.dtype))


def _by_way(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Those that the Triton kernels take, and the others."""
    usable = multi_tensor.is_usable(tensors[0].device)
    ways: tuple[list[int], list[int]] = [], []
    for number, tensor in enumerate(tensors):
        takes = usable and tensor.dtype in multi_tensor.SCALED and multi_tensor.is_dense(tensor)
        ways[0 if takes else 1].append(number)
    return ways


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor, _rows_per_part(tensor, CHUNK)) if tensor.dim() else (tensor,)


def _rows_per_part(tensor: Tensor, chunk: int) -> int:
    return max(1, chunk // max(1, math.prod(tensor.shape[1:])))


def scale_units_(
    tensors: Sequence[Tensor], coefficients: Sequence[Tensor], unit_dims: Sequence[Sequence[int]]
) -> None:
    """Multiply each unit of each local gradient by its own coefficient.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: per tensor, float64 ``(units,)``, row-major in its ``unit_dims``.
        unit_dims: per tensor, its dims that index the units.
    """
    for device, numbers in _by_device(tensors).items():
        chosen = [tensors[number] for number in numbers]
        factors = [coefficients[number].to(device) for number in numbers]
        dims = [tuple(unit_dims[number]) for number in numbers]
        if device.type == "cpu":
            _scale_units_on_host(chosen, factors, dims)
            continue
        by_kernel, others = _by_way(chosen)
        rows = [n for n in by_kernel if dims[n] == (0,) and chosen[n].is_contiguous()]
        if rows:
            matrices = [chosen[number].view(len(chosen[number]), -1) for number in rows]
            multi_tensor.scale_rows_(matrices, torch.cat([factors[number] for number in rows]))
        for number in sorted({*by_kernel, *others} - {*rows}):
            chosen[number].mul_(_shaped(factors[number], chosen[number], dims[number]))


def _scale_units_on_host(
    tensors: Sequence[Tensor], coefficients: Sequence[Tensor], unit_dims: Sequence[tuple[int, ...]]
) -> None:
    counts = [len(factors) for factors in coefficients]
    chosen = host.choose(tensors, unit_dims=unit_dims, counts=counts)
    for number in _left(chosen, len(tensors)):
        tensor, factors = tensors[number], coefficients[number]
        if tensor.numel() and bool((factors != 1.0).any()):
            for step in _steps_for(tensor, factors):
                tensor.mul_(_shaped(step, tensor, unit_dims[number]))
    if chosen is not None:
        positions = range(len(tensors)) if chosen.positions is None else chosen.positions
        rows = torch.cat([coefficients[number] for number in positions])
        host.scale_(chosen, rows.double().numpy())
        _changed(chosen)


def _shaped(coefficients: Tensor, tensor: Tensor, unit_dims: Sequence[int]) -> Tensor:
    """In the dtype to multiply in, and broadcast against ``tensor``."""
    factors = coefficients.to(torch.float64 if tensor.dtype in EXACT else torch.float32)
    shape = [extent if dim in unit_dims else 1 for dim, extent in enumerate(tensor.shape)]
    return factors.view(shape)


def clamp_(tensors: Sequence[Tensor], bounds: Sequence[float | Tensor]) -> None:
    """Clamp ``tensors[i]`` elementwise to ``+-bounds[i]``, rounded to its dtype; NaN stays NaN."""
    bounds = [
        bound if isinstance(bound, Tensor) else held(bound, tensor.dtype)
        for tensor, bound in zip(tensors, bounds, strict=True)
    ]
    numbers = [bound for bound in bounds if not isinstance(bound, Tensor)]
    if tensors and len(numbers) == len(bounds) and not tensors[0].is_cpu:
        torch._foreach_clamp_max_(list(tensors), numbers)
        torch._foreach_clamp_min_(list(tensors), [-bound for bound in numbers])
        return
    chosen = None
    if all(tensor.is_cpu for tensor in tensors):
        numbers = [float(bound) for bound in bounds]
        chosen = host.choose(tensors, bounds=numbers)
    if chosen is not None:
        host.clamp_(chosen)
        _changed(chosen)
    for number in _left(chosen, len(tensors)):
        tensor, bound = tensors[number], bounds[number]
        if isinstance(bound, Tensor):
            limit = bound.to(tensor.device, tensor.dtype)
            torch.clamp(tensor, min=-limit, max=limit, out=tensor)
        else:
            tensor.clamp_(-bound, bound)


def zero_(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Set ``tensors[i]`` to 0 where ``flags[i]`` is true; never through ``0 * nan``."""
    for device, numbers in _by_device(tensors).items():
        chosen, wanted = _chosen(tensors, flags, numbers)
        if device.type == "cpu":
            for tensor, flag in zip(chosen, wanted.tolist(), strict=True):
                if flag:
                    tensor.zero_()
            continue
        wanted = wanted.to(device)
        by_kernel, others = _by_way(chosen)
        if by_kernel:
            multi_tensor.zero_(*_chosen(chosen, wanted, by_kernel))
        for number in others:
            chosen[number].masked_fill_(wanted[number], 0)
