"""Changing local gradients in place: multiply only what is clipped, round once.

Coefficients stay float32 or better until the multiplication. (torch casts the scalar of
``_foreach_mul_``, and on accelerators a 0-dim operand, down to a bf16 tensor's own dtype first;
both are avoided here.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOW_PRECISION = frozenset((torch.bfloat16, torch.float16))
CHUNK = 1 << 20
"""Elements of a low-precision accelerator tensor converted at a time."""
HOST_CHUNK = 1 << 16
"""Elements of the rows of a CPU tensor scaled at a time: 256 KiB in float32."""


def scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """``tensors[i] *= coefficients[i]``.

    Args:
        tensors: local gradients, any dtype and device.
        coefficients: float64 ``(len(tensors),)``. Those equal to 1 cost nothing on the CPU.
    """
    on_host = [tensor.device.type == "cpu" for tensor in tensors]
    if any(on_host):
        _scale_on_host(
            [t for t, here in zip(tensors, on_host, strict=True) if here],
            [c for c, here in zip(coefficients.tolist(), on_host, strict=True) if here],
        )
    for position, tensor in enumerate(tensors):
        if not on_host[position]:
            _scale_on_device(tensor, coefficients[position])


def _scale_on_host(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> None:
    together: list[Tensor] = []
    factors: list[float] = []
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        if coefficient == 1.0 or tensor.numel() == 0:
            continue
        if tensor.dtype in LOW_PRECISION:
            tensor.mul_(coefficient)  # computed in float32, rounded once
        else:
            together.append(tensor)
            factors.append(coefficient)
    if together:
        torch._foreach_mul_(together, factors)


def _scale_on_device(tensor: Tensor, coefficient: Tensor) -> None:
    coefficient = coefficient.to(tensor.device)
    if tensor.dtype in LOW_PRECISION:
        factor = coefficient.float()
        for part in _parts(tensor):
            part.copy_(part.float() * factor)
    else:
        tensor.mul_(coefficient.to(tensor.real.dtype))


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor, _rows_per_part(tensor, CHUNK)) if tensor.dim() else (tensor,)


def _rows_per_part(tensor: Tensor, chunk: int) -> int:
    return max(1, chunk // max(1, math.prod(tensor.shape[1:])))


def scale_units_(tensor: Tensor, coefficients: Tensor, unit_dims: Sequence[int]) -> None:
    """Multiply each unit of a local gradient by its own coefficient.

    Args:
        tensor: local gradient, any dtype and device.
        coefficients: float64 ``(units,)``, row-major in ``unit_dims``.
        unit_dims: dims of ``tensor`` that index the units.
    """
    if tensor.numel() == 0:
        return
    exact = tensor.dtype in (torch.float64, torch.complex128)
    coefficients = coefficients.to(tensor.device)
    factors = coefficients.to(torch.float64 if exact else torch.float32)
    if tensor.device.type == "cpu":
        chosen = (coefficients != 1.0).nonzero().flatten()
        if len(chosen) == 0:
            return
        if tuple(unit_dims) == (0,) and 2 * len(chosen) <= len(coefficients):
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            for rows in torch.split(chosen, _rows_per_part(tensor, HOST_CHUNK)):
                scaled = tensor.index_select(0, rows) * factors[rows].view(shape)
                tensor.index_copy_(0, rows, scaled.to(tensor.dtype))
            return
    shape_of_units = [extent if dim in unit_dims else 1 for dim, extent in enumerate(tensor.shape)]
    tensor.mul_(factors.view(shape_of_units))


def clamp_(tensors: Sequence[Tensor], bounds: Sequence[float | Tensor]) -> None:
    """Clamp ``tensors[i]`` elementwise to ``+-bounds[i]``; NaN stays NaN."""
    for tensor, bound in zip(tensors, bounds, strict=True):
        if isinstance(bound, Tensor):
            limit = bound.to(tensor.device, tensor.dtype)
            torch.clamp(tensor, min=-limit, max=limit, out=tensor)
        else:
            tensor.clamp_(-bound, bound)


def zero_(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Set ``tensors[i]`` to 0 where ``flags[i]`` is true; never through ``0 * nan``."""
    if flags.device.type == "cpu":
        for tensor, flag in zip(tensors, flags.tolist(), strict=True):
            if flag:
                tensor.zero_()
    else:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.masked_fill_(flag.to(tensor.device), 0)
