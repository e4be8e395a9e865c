"""Changing local gradients in place: multiply only what is clipped, round once.

Coefficients stay float32 or better until the multiplication. (torch casts the scalar of
``_foreach_mul_``, and on accelerators a 0-dim operand, down to a bf16 tensor's own dtype first;
both are avoided here.) Those that are no normal numbers of float32 are multiplied in several steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distclip.kernels import multi_tensor
from distclip.kernels.bounds import held
from distclip.kernels.transfer import to_device

LOW_PRECISION = frozenset((torch.bfloat16, torch.float16))
EXACT = frozenset((torch.float64, torch.complex128))
"""These are multiplied in float64, all others in float32."""
TINY = torch.finfo(torch.float32).tiny
STEP = 2.0**-64
"""A coefficient below ``TINY`` is multiplied as ``STEP * (coefficient / STEP)``. The first product
is exact, or so small that the whole one is 0."""
CHUNK = 1 << 20
"""Elements of a low-precision accelerator tensor converted at a time."""
HOST_CHUNK = 1 << 16
"""Elements of the rows of a CPU tensor scaled at a time: 256 KiB in float32."""


def scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """``tensors[i] *= coefficients[i]``.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: float64 ``(len(tensors),)``, or one number expanded to that. Tensors whose
            coefficient is 1 cost nothing on the CPU, and are not read by the Triton kernels.
    """
    for device, numbers in _by_device(tensors).items():
        chosen, factors = _chosen(tensors, coefficients, numbers)
        if device.type == "cpu":
            _scale_on_host(chosen, factors.tolist())
        else:
            _scale_on_device(chosen, factors.to(device))


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, Sequence[int]]:
    """Which tensors, none of them empty, lie on each device."""
    if all(tensor.is_cpu for tensor in tensors):
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


def _scale_on_host(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> None:
    together: list[Tensor] = []
    factors: list[float] = []
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient == 1.0 or tensor.numel() == 0:
            continue
        if 0.0 < abs(coefficient) < TINY and tensor.dtype not in EXACT:
            for step in _steps(torch.tensor(coefficient, dtype=torch.float64)):
                tensor.mul_(step.item())
        elif tensor.dtype in LOW_PRECISION:
            tensor.mul_(coefficient)  # computed in float32, rounded once
        else:
            together.append(tensor)
            factors.append(coefficient)
    if together:
        torch._foreach_mul_(together, factors)


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
            for each in zip(chosen, factors, dims, strict=True):
                _scale_units_on_host(*each)
            continue
        by_kernel, others = _by_way(chosen)
        rows = [n for n in by_kernel if dims[n] == (0,) and chosen[n].is_contiguous()]
        if rows:
            matrices = [chosen[number].view(len(chosen[number]), -1) for number in rows]
            multi_tensor.scale_rows_(matrices, torch.cat([factors[number] for number in rows]))
        for number in sorted({*by_kernel, *others} - {*rows}):
            chosen[number].mul_(_shaped(factors[number], chosen[number], dims[number]))


def _scale_units_on_host(tensor: Tensor, coefficients: Tensor, unit_dims: tuple[int, ...]) -> None:
    chosen = (coefficients != 1.0).nonzero().flatten()
    if len(chosen) == 0 or tensor.numel() == 0:
        return
    # Written so that a NaN, which hides what is smaller, is looked at too.
    if tensor.dtype not in EXACT and not coefficients.min().item() >= TINY:
        first, *rest = _steps(coefficients)
        for step in rest:
            tensor.mul_(_shaped(first, tensor, unit_dims))
            first = step
        coefficients = first
    if unit_dims != (0,) or 2 * len(chosen) > len(coefficients):
        tensor.mul_(_shaped(coefficients, tensor, unit_dims))
        return
    for rows in torch.split(chosen, _rows_per_part(tensor, HOST_CHUNK)):
        some = tensor.index_select(0, rows)
        scaled = some * _shaped(coefficients[rows], some, unit_dims)
        tensor.index_copy_(0, rows, scaled.to(tensor.dtype))


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
    for tensor, bound in zip(tensors, bounds, strict=True):
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
