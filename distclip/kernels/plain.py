"""Norms by plain torch operations in float64, chunk by chunk: any dtype, order and device.

Scaled by the largest element where the powers could leave float64. Nothing here reads a value of an
accelerator tensor on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from distclip.kernels.powers import LEAST_ORDER, needs_scaling, p_norm, scale_of

REDUCE_CHUNK = 1 << 16
"""Elements of a temporary, 512 KiB in float64."""

FAST_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Dtypes whose squares neither overflow nor underflow when float64 adds them up."""


def is_wide(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether p-th powers of ``dtype`` values, or of these over a loss scale, can leave float64."""
    return math.isfinite(norm_type) and (
        norm_type > 4.0
        or norm_type < LEAST_ORDER
        or (norm_type > 1.0 and dtype in (torch.float64, torch.complex128))
    )


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Largest absolute element, float64; NaN if there is one. 0-dim, no host read."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if tensor.is_complex():
        return torch.stack([_magnitudes(c).amax() for c in chunks_of(tensor)]).amax()
    return torch.maximum(tensor.amax(), -tensor.amin()).double()


def norm(tensor: Tensor, norm_type: float, bound: float | None) -> Tensor:
    """p-norm in float64, chunk by chunk. 0-dim float64 on the tensor's device."""
    if norm_type == math.inf:
        largest = largest_magnitude(tensor)
        return largest if bound is None else torch.clamp(largest, max=bound)
    scale = None
    if is_wide(tensor.dtype, norm_type):
        largest = largest_magnitude(tensor)
        scale = scale_of(largest if bound is None else torch.clamp(largest, max=bound))
    parts = []
    for chunk in chunks_of(tensor):
        values = prepared(chunk, bound, torch.float64)
        if scale is not None:
            values = values / scale
        parts.append(torch.linalg.vector_norm(values, norm_type))
    total: Tensor = parts[0]
    if len(parts) > 1:
        total = torch.linalg.vector_norm(torch.stack(parts), norm_type)
    return total if scale is None else total * scale


def _norms_of_rows(rows: Tensor, norm_type: float, bound: float | None) -> Tensor:
    """p-norm of each row of a 2-D tensor, all at once. float64 on its device."""
    if norm_type == math.inf:
        largest = (_magnitudes(rows) if rows.is_complex() else rows.abs()).amax(dim=1).double()
        return largest if bound is None else torch.clamp(largest, max=bound)
    if rows.numel() > 2 * REDUCE_CHUNK and rows.shape[0] == 1:
        return norm(rows, norm_type, bound).reshape(1)
    values = prepared(rows, bound, torch.float64)
    if not is_wide(rows.dtype, norm_type):
        return cast(Tensor, torch.linalg.vector_norm(values, norm_type, dim=1))
    return p_norm(values, norm_type, 1)


def _magnitudes(numbers: Tensor) -> Tensor:
    """Absolute values of complex numbers, float64: those of complex64 may be too large for it."""
    return numbers.to(torch.complex128).abs()


def norms(
    tensors: Sequence[Tensor], norm_type: float, bounds: Sequence[float | None] | None = None
) -> Tensor:
    """p-norm of each tensor, as if clamped to its bound first; float64 ``(len(tensors),)``."""
    limits = [None] * len(tensors) if bounds is None else bounds
    return torch.stack([norm(t, norm_type, b) for t, b in zip(tensors, limits, strict=True)])


def row_norms(
    matrices: Sequence[Tensor], norm_type: float, bounds: Sequence[float | None] | None = None
) -> Tensor:
    """p-norm of each row of each matrix, as if clamped to the matrix's bound first.

    Args:
        matrices: 2-D, any dtypes, none empty.
        norm_type: p > 0 or inf.
        bounds: per matrix; None for as it is.

    Returns:
        float64 ``(all rows,)``, the matrices one after another.
    """
    limits = [None] * len(matrices) if bounds is None else bounds
    return torch.cat(
        [
            _norms_of_rows(part, norm_type, bound)
            for matrix, bound in zip(matrices, limits, strict=True)
            for part in torch.split(matrix, max(1, REDUCE_CHUNK // matrix.shape[1]))
        ]
    )


def segment_norms(values: Tensor, lengths: Tensor, norm_type: float) -> Tensor:
    """p-norms of consecutive runs of numbers.

    Args:
        values: float64 ``(sum(lengths),)``, none negative.
        lengths: int64, on the same device; 0 gives norm 0.
        norm_type: p > 0 or inf.

    Returns:
        float64 ``(len(lengths),)``.
    """

    def reduced(how: str, numbers: Tensor) -> Tensor:
        return torch.segment_reduce(numbers, how, lengths=lengths, unsafe=True, initial=0.0)

    if math.isinf(norm_type):
        return reduced("max", values)
    if not needs_scaling(norm_type):
        return reduced("sum", values.pow(norm_type)).pow(1.0 / norm_type)
    scale = scale_of(reduced("max", values))
    powers = scale.repeat_interleave(lengths, output_size=len(values))
    torch.div(values, powers, out=powers).pow_(norm_type)
    return reduced("sum", powers).pow(1.0 / norm_type) * scale


def unit_rows(tensor: Tensor, unit_dims: Sequence[int], count: int) -> Tensor:
    """The units of a tensor as rows of a matrix: a view, or a copy of transposed storage."""
    if tuple(unit_dims) == (0,):
        return tensor.reshape(count, -1)
    others = [dim for dim in range(tensor.dim()) if dim not in unit_dims]
    return tensor.permute(*unit_dims, *others).reshape(count, -1)


def prepared(chunk: Tensor, bound: float | None, dtype: torch.dtype) -> Tensor:
    """The chunk in the dtype to measure in, clamped if asked; complex as absolute values."""
    chunk = (_magnitudes(chunk) if chunk.is_complex() else chunk).to(dtype)
    return chunk if bound is None else chunk.clamp(-bound, bound)


def chunks_of(tensor: Tensor, *, whole: bool = False) -> Sequence[Tensor]:
    """Flat views of a tensor, in any order; a tensor with gaps is copied chunk by chunk.

    With ``whole`` a tensor that needs no conversion comes as one chunk.
    """
    flat = _flat_view(tensor)
    if flat is not None:
        return (flat,) if whole or flat.numel() <= REDUCE_CHUNK else torch.split(flat, REDUCE_CHUNK)
    step = max(1, REDUCE_CHUNK // max(1, tensor[0].numel()))
    found: list[Tensor] = []
    for part in torch.split(tensor, step):
        if part.numel() > 2 * REDUCE_CHUNK and part.dim() > 1:
            for row in part.unbind(0):
                found.extend(chunks_of(row))
        else:
            found.append(part.reshape(-1))
    return found


def _flat_view(tensor: Tensor) -> Tensor | None:
    """All elements as a 1-D view if they lie without gaps in memory, in whatever order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    transposed = tensor.permute(dims)
    return transposed.view(-1) if transposed.is_contiguous() else None
