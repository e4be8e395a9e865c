"""Accelerator tensors changed in place: Triton kernels, or torch's own operations without them.

Nothing here reads the device on the host. Coefficients stay float32 or better until the
multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.kernels.device import multi_tensor
from distclip.kernels.transfer import to_device

LOW_PRECISION = frozenset((torch.bfloat16, torch.float16))
EXACT = frozenset((torch.float64, torch.complex128))
"""Dtypes that are multiplied in float64; all others are in float32."""
CONVERT_CHUNK = 1 << 20
"""Elements of a low-precision tensor converted at a time."""


def scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """``tensors[i] *= coefficients[i]``.

    Args:
        tensors: none empty; of one device.
        coefficients: float64 ``(len(tensors),)`` there, or one number expanded to that.
    """
    by_kernel, others = _by_way(tensors)
    if by_kernel:
        multi_tensor.scale_(*selected(tensors, coefficients, by_kernel))
    if not others:
        return
    rest, factors = selected(tensors, coefficients, others)
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


def _by_way(tensors: Sequence[Tensor]) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of the tensors that the Triton kernels take, and of all others."""
    usable = multi_tensor.is_usable(tensors[0].device)
    if usable and multi_tensor.scales_all(tensors):
        return range(len(tensors)), ()
    ways: tuple[list[int], list[int]] = [], []
    for number, tensor in enumerate(tensors):
        takes = usable and tensor.dtype in multi_tensor.SCALED and multi_tensor.is_dense(tensor)
        ways[0 if takes else 1].append(number)
    return ways


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor, _rows_per_part(tensor, CONVERT_CHUNK)) if tensor.dim() else (tensor,)


def _rows_per_part(tensor: Tensor, chunk: int) -> int:
    return max(1, chunk // max(1, math.prod(tensor.shape[1:])))


def scale_units_(
    tensors: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    unit_dims: Sequence[tuple[int, ...]],
    joined: Tensor | None = None,
) -> None:
    """Multiply each unit of each tensor by its own coefficient.

    Args:
        tensors: none empty; of one device.
        coefficients: per tensor, float64 ``(units,)`` there, row-major in its ``unit_dims``.
        unit_dims: per tensor, its dims that index the units.
        joined: all coefficients one after another, where they lie so.
    """
    by_kernel, _ = _by_way(tensors)
    rows = [n for n in by_kernel if unit_dims[n] == (0,) and tensors[n].is_contiguous()]
    if rows:
        chosen = [tensors[number] for number in rows]
        matrices = [t if t.dim() == 2 else t.view(t.size(0), -1) for t in chosen]
        if joined is None or len(rows) < len(tensors):
            joined = torch.cat([coefficients[number] for number in rows])
        multi_tensor.scale_rows_(matrices, joined)
    left = () if len(rows) == len(tensors) else sorted({*range(len(tensors))} - {*rows})
    for number in left:
        tensors[number].mul_(shaped(coefficients[number], tensors[number], unit_dims[number]))


def zero_(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Set ``tensors[i]`` to 0 where ``flags[i]``, on the same device, is true."""
    by_kernel, others = _by_way(tensors)
    if by_kernel:
        multi_tensor.zero_(*selected(tensors, flags, by_kernel))
    for number in others:
        tensors[number].masked_fill_(flags[number], 0)


def selected(
    tensors: Sequence[Tensor], values: Tensor, numbers: Sequence[int]
) -> tuple[Sequence[Tensor], Tensor]:
    """Some of the tensors, and of the values that are theirs."""
    if len(numbers) == len(tensors):
        return tensors, values
    some = [tensors[number] for number in numbers]
    if values.stride(0) == 0:
        return some, values[: len(some)]
    return some, values.index_select(0, to_device(numbers, values.device))


def shaped(coefficients: Tensor, tensor: Tensor, unit_dims: Sequence[int]) -> Tensor:
    """In the dtype to multiply in, and broadcast against ``tensor``."""
    factors = coefficients.to(torch.float64 if tensor.dtype in EXACT else torch.float32)
    shape = [extent if dim in unit_dims else 1 for dim, extent in enumerate(tensor.shape)]
    return factors.view(shape)
