"""Norms of local tensors: exact to about 1e-7 relative whatever the dtype, without copies.

Three ways, chosen by dtype and device:

* CPU, fp32, bf16, fp16, p = 1 or 2: float32 partial norms of 256 elements, combined in float64.
  Short partial sums are what keeps float32 exact (one long float32 sum of 32M elements is off by
  1e-3), and they run at memory speed, where a float64 reduction of float32 input does not. A
  result that shows overflow or underflow is measured again in float64.
* p = inf: the extremes, exact in any dtype.
* everything else (float64, complex, other p, other devices): float64 chunk by chunk, scaled by the
  largest element where float64 itself could overflow or underflow.

Nothing here reads a value of an accelerator tensor on the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from distclip.statistics.neighbours import LANE, UNDERFLOW, Together

CHUNK = 1 << 16
"""Elements converted at a time: the only temporary, 256 KiB as float32."""
SHORT = 1024
"""Up to here one float32 dot product is as exact as partial sums, and cheaper."""
FAST_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def is_wide(dtype: torch.dtype, norm_type: float) -> bool:
    """Whether p-th powers of ``dtype`` values can leave the range of float64."""
    return math.isfinite(norm_type) and (
        norm_type > 6.0 or dtype in (torch.float64, torch.complex128)
    )


def norms(
    tensors: Sequence[Tensor | None],
    norm_type: float,
    bounds: Sequence[float | None] | None = None,
    *,
    device: torch.device,
    together: Together | None = None,
) -> Tensor:
    """p-norm of each tensor, as if clamped to its bound first.

    Args:
        tensors: local tensors of any dtype, shape and device; None counts as 0.
        norm_type: p > 0 or inf.
        bounds: per tensor, measure ``clamp(x, -bound, bound)`` instead; None for as it is.
        device: where the result goes.
        together: those of them that were found to lie side by side in memory.

    Returns:
        float64 tensor of shape ``(len(tensors),)``. NaN and inf elements give NaN and inf.
    """
    rest: Iterable[int] = range(len(tensors))
    if together is None or bounds is not None or norm_type not in (1.0, 2.0):
        result = torch.zeros(len(tensors), dtype=torch.float64)
    else:
        known = together.known
        found, rest = together.norms(norm_type)
        if known.complete:
            result = found if known.order is None else found[known.order]
            if not rest:
                return result.to(device)
        else:
            result = torch.zeros(len(tensors), dtype=torch.float64)
            result[known.index] = found
            done = set(known.positions)
            rest = (*rest, *(each for each in range(len(tensors)) if each not in done))
    elsewhere: dict[int, Tensor] = {}
    values: dict[int, float] = {}
    for position in rest:
        tensor = tensors[position]
        if tensor is None or tensor.numel() == 0:
            continue
        bound = None if bounds is None else bounds[position]
        if tensor.is_cpu:
            quick = None if bound is not None else _short_norm(tensor, norm_type)
            values[position] = _cpu_norm(tensor, norm_type, bound) if quick is None else quick
        else:
            elsewhere[position] = _exact_norm(tensor, norm_type, bound).to(device)
    if values:
        result[torch.tensor(list(values))] = torch.tensor(
            list(values.values()), dtype=torch.float64
        )
    result = result.to(device)
    if elsewhere:
        where = torch.tensor(list(elsewhere), device=device)
        result[where] = torch.stack(list(elsewhere.values()))
    return result


def unit_norms(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    bounds: Sequence[float | None] | None = None,
    *,
    device: torch.device,
) -> Tensor:
    """p-norm of each unit of each tensor.

    Args:
        tensors: local tensors of any dtype, shape and device; None counts as 0.
        unit_dims: per tensor, the dims that index its units; all others are reduced. ``()``: one
            unit.
        counts: per tensor, how many units it has.
        norm_type: p > 0 or inf.
        bounds: per tensor, measure ``clamp(x, -bound, bound)`` instead; None for as it is.
        device: where the result goes.

    Returns:
        float64 ``(sum(counts),)``: the tensors one after another, each in row-major order of its
        ``unit_dims``.
    """
    parts: list[Tensor] = []
    unchecked: list[tuple[int, Tensor]] = []
    start, widest = 0, 1
    for position, (tensor, dims, count) in enumerate(zip(tensors, unit_dims, counts, strict=True)):
        bound = None if bounds is None else bounds[position]
        if tensor is None or tensor.numel() == 0:
            parts.append(torch.zeros(count, dtype=torch.float64, device=device))
        elif dims:
            rows = _rows(tensor, dims, count)
            if rows.dtype is torch.float32 and bound is None and _is_fast(rows, norm_type):
                parts.append(_fast_row_norms(rows, norm_type))
                unchecked.append((start, rows))
                widest = max(widest, rows.shape[1])
            else:
                step = max(1, CHUNK // rows.shape[1])
                pieces = [_row_norms(part, norm_type, bound) for part in torch.split(rows, step)]
                parts.append(torch.cat(pieces).to(device))
        else:
            parts.append(norms([tensor], norm_type, [bound], device=device))
        start += count
    if not parts:
        return torch.zeros(0, dtype=torch.float64, device=device)
    result = torch.cat([part.to(device) for part in parts]).double()
    if unchecked:
        floor = (widest * UNDERFLOW[norm_type]) ** (1.0 / norm_type)
        doubtful = ~((result > floor) & torch.isfinite(result))
        if bool(doubtful.any()):
            for first, rows in unchecked:
                here = slice(first, first + len(rows))
                _remeasure(result[here], rows, doubtful[here], norm_type, None)
    return result


def _rows(tensor: Tensor, unit_dims: Sequence[int], count: int) -> Tensor:
    """The units as rows of a matrix: a view, or a copy of transposed storage."""
    if tuple(unit_dims) == (0,):
        return tensor.reshape(count, -1)
    others = [dim for dim in range(tensor.dim()) if dim not in unit_dims]
    return tensor.permute(*unit_dims, *others).reshape(count, -1)


def _is_fast(tensor: Tensor, norm_type: float) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in FAST_DTYPES and norm_type in (1.0, 2.0)


def _short_norm(tensor: Tensor, norm_type: float) -> float | None:
    """2-norm of a short float32 tensor by one dot product; None where that will not do."""
    numel = tensor.numel()
    if (
        norm_type != 2.0
        or numel > SHORT
        or tensor.dtype is not torch.float32
        or not tensor.is_contiguous()
    ):
        return None
    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    square = torch.dot(flat, flat).item()
    return math.sqrt(square) if numel * UNDERFLOW[2.0] < square < math.inf else None


def _cpu_norm(tensor: Tensor, norm_type: float, bound: float | None) -> float:
    if norm_type == math.inf and not tensor.is_complex():
        largest = largest_magnitude(tensor).item()
        return min(largest, bound) if bound is not None and largest == largest else largest
    if not _is_fast(tensor, norm_type):
        return float(_exact_norm(tensor, norm_type, bound))
    total = 0.0
    for chunk in _chunks(tensor, whole=tensor.dtype is torch.float32 and bound is None):
        total += _fast_power_sum(_prepared(chunk, bound, torch.float32), norm_type)
    if math.isfinite(total) and total > tensor.numel() * UNDERFLOW[norm_type]:
        return total if norm_type == 1.0 else math.sqrt(total)
    # Zero, non-finite, or beyond what float32 partial sums can hold.
    largest = largest_magnitude(tensor).item()
    if largest == 0.0 or (not math.isfinite(largest) and bound is None):
        return largest
    return float(_exact_norm(tensor, norm_type, bound))


def _fast_power_sum(flat: Tensor, norm_type: float) -> float:
    """Sum of p-th powers of a contiguous float32 tensor, p = 1 or 2."""
    numel = flat.numel()
    if numel <= SHORT and norm_type == 2.0:
        return float(torch.dot(flat, flat))
    body = numel - numel % LANE
    partial = torch.linalg.vector_norm(flat[:body].view(-1, LANE), norm_type, dim=1).double()
    total = torch.dot(partial, partial) if norm_type == 2.0 else partial.sum()
    if body == numel:
        return float(total)
    rest = float(torch.linalg.vector_norm(flat[body:], norm_type))
    return float(total) + float(rest**norm_type)


def _row_norms(rows: Tensor, norm_type: float, bound: float | None) -> Tensor:
    """p-norm of each row of a 2-D tensor, float64."""
    if not _is_fast(rows, norm_type):
        return _exact_row_norms(rows, norm_type, bound)
    result = _fast_row_norms(_prepared(rows, bound, torch.float32), norm_type).double()
    floor = (rows.shape[1] * UNDERFLOW[norm_type]) ** (1.0 / norm_type)
    doubtful = ~((result > floor) & torch.isfinite(result))
    if bool(doubtful.any()):
        _remeasure(result, rows, doubtful, norm_type, bound)
    return result


def _fast_row_norms(rows: Tensor, norm_type: float) -> Tensor:
    """p-norm of each row of a float32 matrix, p = 1 or 2, wrong where float32 overflows."""
    width = rows.shape[1]
    whole: Tensor
    if width <= LANE:
        whole = torch.linalg.vector_norm(rows, norm_type, dim=1)
        return whole
    body = width - width % LANE
    lanes = rows[:, :body].reshape(len(rows), -1, LANE)
    partial = torch.linalg.vector_norm(lanes, norm_type, dim=2).double()
    if body < width:
        rest = torch.linalg.vector_norm(rows[:, body:], norm_type, dim=1, keepdim=True)
        partial = torch.cat([partial, rest.double()], dim=1)
    whole = torch.linalg.vector_norm(partial, norm_type, dim=1)
    return whole


def _remeasure(
    result: Tensor, rows: Tensor, doubtful: Tensor, norm_type: float, bound: float | None
) -> None:
    """Measure the doubtful rows again in float64, but not those that are simply zero."""
    step = max(1, CHUNK // rows.shape[1])
    for indices in torch.split(doubtful.nonzero().flatten(), step):
        part = rows.index_select(0, indices.to(rows.device))
        largest = part.abs().amax(dim=1)
        result[indices] = largest.double().to(result.device)
        rest = (largest != 0).nonzero().flatten()
        if len(rest):
            again = _exact_row_norms(part[rest], norm_type, bound)
            result[indices[rest.to(indices.device)]] = again.to(result.device)


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Largest absolute element, float64; NaN if there is one. 0-dim, no host read."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if tensor.is_complex():
        return torch.stack([c.abs().amax() for c in _chunks(tensor)]).amax().double()
    low, high = torch.aminmax(tensor)
    return torch.maximum(high, -low).double()


def _exact_norm(tensor: Tensor, norm_type: float, bound: float | None) -> Tensor:
    """p-norm in float64, chunk by chunk. 0-dim float64 on the tensor's device."""
    if norm_type == math.inf:
        largest = largest_magnitude(tensor)
        return largest if bound is None else torch.clamp(largest, max=bound)
    scale = _scale(largest_magnitude(tensor), tensor, norm_type)
    parts = []
    for chunk in _chunks(tensor):
        values = _prepared(chunk, bound, torch.float64)
        if scale is not None:
            values = values / scale
        parts.append(torch.linalg.vector_norm(values, norm_type))
    total: Tensor = parts[0]
    if len(parts) > 1:
        total = torch.linalg.vector_norm(torch.stack(parts), norm_type)
    return total if scale is None else total * scale


def _exact_row_norms(rows: Tensor, norm_type: float, bound: float | None) -> Tensor:
    if norm_type == math.inf:
        if rows.is_complex():
            return rows.abs().amax(dim=1).double()
        largest = rows.abs().amax(dim=1).double()
        return largest if bound is None else torch.clamp(largest, max=bound)
    if rows.numel() > 2 * CHUNK and rows.shape[0] == 1:
        return _exact_norm(rows, norm_type, bound).reshape(1)
    values = _prepared(rows, bound, torch.float64)
    if not is_wide(rows.dtype, norm_type):
        return cast(Tensor, torch.linalg.vector_norm(values, norm_type, dim=1))
    largest = values.abs().amax(dim=1, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    norms = torch.linalg.vector_norm(values / scale, norm_type, dim=1) * scale.squeeze(1)
    return cast(Tensor, norms)


def _scale(largest: Tensor, tensor: Tensor, norm_type: float) -> Tensor | None:
    """What to divide by so that p-th powers stay in range; None where they do anyway."""
    if not is_wide(tensor.dtype, norm_type):
        return None
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def _prepared(chunk: Tensor, bound: float | None, dtype: torch.dtype) -> Tensor:
    """The chunk in the dtype to measure in, clamped if asked; complex as absolute values."""
    if chunk.is_complex():
        chunk = chunk.abs()
    chunk = chunk.to(dtype)
    return chunk if bound is None else chunk.clamp(-bound, bound)


def _chunks(tensor: Tensor, *, whole: bool = False) -> Sequence[Tensor]:
    """Flat views of a tensor, in any order; a tensor with gaps is copied chunk by chunk.

    With ``whole`` a tensor that needs no conversion comes as one chunk.
    """
    flat = _flat_view(tensor)
    if flat is not None:
        return (flat,) if whole or flat.numel() <= CHUNK else torch.split(flat, CHUNK)
    step = max(1, CHUNK // max(1, tensor[0].numel()))
    chunks: list[Tensor] = []
    for part in torch.split(tensor, step):
        if part.numel() > 2 * CHUNK and part.dim() > 1:
            for row in part.unbind(0):
                chunks.extend(_chunks(row))
        else:
            chunks.append(part.reshape(-1))
    return chunks


def _flat_view(tensor: Tensor) -> Tensor | None:
    """All elements as a 1-D view if they lie without gaps in memory, in whatever order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    transposed = tensor.permute(dims)
    return transposed.view(-1) if transposed.is_contiguous() else None
