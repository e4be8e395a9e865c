"""Norms of local tensors: exact to about 1e-7 relative whatever the dtype, without copies.

On the CPU there are three ways:

* fp32, bf16, fp16, p = 1 or 2: float32 partial sums over 512 elements, combined in float64.
  Short partial sums are what keeps float32 exact (one long float32 sum of 32M elements is off by
  1e-3), and they run at memory speed, where a float64 reduction of float32 input does not. A
  result that shows overflow or underflow is measured again in float64.
* p = inf: the extremes, exact in any dtype.
* everything else (float64, complex, other p): float64 chunk by chunk (``exact``).

Accelerator tensors are left to ``accelerated``: nothing reads a value of one on the host.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.bounds import held
from distclip.statistics import accelerated
from distclip.statistics.exact import (
    FAST_DTYPES,
    exact_norm,
    exact_row_norms,
    largest_magnitude,
)
from distclip.statistics.neighbours import CHUNK, LANE, UNDERFLOW, Together, power_sums
from distclip.statistics.widening import Floats32, Widener

SHORT = 1024
"""Up to here one float32 dot product is as exact as partial sums, and cheaper."""
BATCH = 1024
"""Tensors whose norms torch gives one by one at a time: each is an object of 200 bytes."""


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
    bounds = _held(tensors, bounds)
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
    elsewhere: dict[torch.device, list[int]] = {}
    values: dict[int, float] = {}
    small: list[int] = []
    on_host = False
    fast = norm_type in (1.0, 2.0)
    widener = Widener()
    for position in rest:
        tensor = tensors[position]
        if tensor is None or (numel := tensor.numel()) == 0:
            continue
        bound = None if bounds is None else bounds[position]
        if not tensor.is_cpu:
            elsewhere.setdefault(tensor.device, []).append(position)
        elif fast and numel <= LANE and bound is None and tensor.dtype is torch.float32:
            on_host = True
            small.append(position)
            if len(small) == BATCH:
                _measure_small(result, small, tensors, norm_type)
                small = []
        else:
            on_host = True
            values[position] = _cpu_norm(tensor, norm_type, bound, widener)
    if small:
        _measure_small(result, small, tensors, norm_type)
    if values:
        result[torch.tensor(list(values))] = torch.tensor(
            list(values.values()), dtype=torch.float64
        )
    if isinstance(rest, range) and not on_host:  # nothing on the host is a result
        result = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    else:
        result = result.to(device)
    for positions in elsewhere.values():
        limits = None if bounds is None else [bounds[position] for position in positions]
        there = [cast(Tensor, tensors[position]) for position in positions]
        found = accelerated.norms(there, norm_type, limits)
        result = accelerated.placed(result, positions, found)
    return result


def _measure_small(
    result: Tensor, positions: list[int], tensors: Sequence[Tensor | None], norm_type: float
) -> None:
    """Write the norms of some float32 tensors of at most ``LANE`` elements to their places."""
    small = [cast(Tensor, tensors[each]) for each in positions]
    found = torch.stack(torch._foreach_norm(small, norm_type)).double()
    sound = (found > (LANE * UNDERFLOW[norm_type]) ** (1.0 / norm_type)) & torch.isfinite(found)
    doubtful = (~sound).nonzero().flatten().tolist()
    if doubtful:
        widener = Widener()
        again = [small[each] for each in doubtful]
        for each, tensor, largest in zip(
            doubtful, again, torch.stack(torch._foreach_norm(again, math.inf)).tolist(), strict=True
        ):
            found[each] = _cpu_norm(tensor, norm_type, None, widener) if largest else 0.0
    result[torch.tensor(positions)] = found


def unit_norms(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    bounds: Sequence[float | None] | None = None,
    *,
    device: torch.device,
    positions: Sequence[int] = (),
    together: Together | None = None,
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
        positions: which of the tensors in ``together`` these are.
        together: tensors that were found to lie side by side in memory.

    Returns:
        float64 ``(sum(counts),)``: the tensors one after another, each in row-major order of its
        ``unit_dims``.
    """
    parts: list[Tensor] = []
    elsewhere: dict[torch.device, list[int]] = {}
    whole: dict[int, int] = {}
    bounds = _held(tensors, bounds)
    shared, doubtful = _shared(tensors, unit_dims, counts, norm_type, bounds, positions, together)
    unchecked = _Unchecked(norm_type)
    widener = Widener()
    start = 0
    for number, (tensor, dims, count) in enumerate(zip(tensors, unit_dims, counts, strict=True)):
        bound = None if bounds is None else bounds[number]
        if tensor is None or tensor.numel() == 0:
            parts.append(torch.zeros(count, dtype=torch.float64, device=device))
        elif (found := shared.get(number)) is not None:
            parts.append(found)
            if number in doubtful:
                unchecked.add(start, tensor, count)
        elif not dims:
            whole[number] = len(parts)
            parts.append(torch.empty(1, dtype=torch.float64, device=device))
        elif not tensor.is_cpu:
            elsewhere.setdefault(tensor.device, []).append(number)
            parts.append(tensor)
        elif tensor.dtype is torch.float32 and bound is None and _is_fast(tensor, norm_type):
            rows = _rows(tensor, dims, count)
            parts.append(_fast_row_norms(rows.detach().numpy(), norm_type))
            unchecked.add(start, rows, count)
        else:
            rows = _rows(tensor, dims, count)
            step = max(1, CHUNK // rows.shape[1])
            pieces = [
                _row_norms(part, norm_type, bound, widener) for part in torch.split(rows, step)
            ]
            parts.append(torch.cat(pieces).to(device))
        start += count
    if not parts:
        return torch.zeros(0, dtype=torch.float64, device=device)
    for numbers in elsewhere.values():
        matrices = [_rows(parts[each], unit_dims[each], counts[each]) for each in numbers]
        limits = None if bounds is None else [bounds[each] for each in numbers]
        norms_there = accelerated.row_norms(matrices, norm_type, limits)
        found_there = torch.split(norms_there, [counts[each] for each in numbers])
        for each, part in zip(numbers, found_there, strict=True):
            parts[each] = part
    if whole:
        chosen = None if bounds is None else [bounds[number] for number in whole]
        alone = norms([tensors[number] for number in whole], norm_type, chosen, device=device)
        for place, norm in zip(whole.values(), torch.split(alone, 1), strict=True):
            parts[place] = norm
    result = torch.cat([part.to(device) for part in parts]).double()
    unchecked.check(result)
    return result


def _shared(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    bounds: Sequence[float | None] | None,
    positions: Sequence[int],
    together: Together | None,
) -> tuple[dict[int, Tensor], set[int]]:
    """Unit norms of those tensors that lie beside others, and which of them to look at again."""
    if together is None or bounds is not None or norm_type not in (1.0, 2.0):
        return {}, set()
    parts = {
        position: count
        for position, dims, count in zip(positions, unit_dims, counts, strict=True)
        if count and (not dims or tuple(dims) == (0,))
    }
    found, doubtful = together.divided(norm_type, parts)
    numbers = {position: number for number, position in enumerate(positions)}
    by_number = {numbers[position]: norms for position, norms in found.items()}
    return by_number, {numbers[position] for position in doubtful if position in numbers}


class _Unchecked:
    """Units whose float32 norms may have overflowed or underflowed, to be looked at together."""

    def __init__(self, norm_type: float) -> None:
        self._norm_type = norm_type
        self._starts: list[int] = []
        self._found: list[tuple[Tensor, int]] = []
        self._widest = 1

    def add(self, start: int, tensor: Tensor, count: int) -> None:
        """A tensor of ``count`` units, one after another, whose norms lie from ``start`` on."""
        self._starts.append(start)
        self._found.append((tensor, count))
        self._widest = max(self._widest, tensor.numel() // count)

    def check(self, result: Tensor) -> None:
        """Measure those again that cannot be relied on, in place."""
        if not self._found:
            return
        floor = (self._widest * UNDERFLOW[self._norm_type]) ** (1.0 / self._norm_type)
        doubtful = ~((result > floor) & torch.isfinite(result))
        places = doubtful.nonzero().flatten().tolist()
        numbers = sorted({bisect.bisect_right(self._starts, each) - 1 for each in places} - {-1})
        for number in numbers:
            start, (tensor, count) = self._starts[number], self._found[number]
            here = slice(start, start + count)
            if bool(doubtful[here].any()):
                rows = tensor.reshape(count, -1)
                _remeasure(result[here], rows, doubtful[here], self._norm_type, None)


def _rows(tensor: Tensor, unit_dims: Sequence[int], count: int) -> Tensor:
    """The units as rows of a matrix: a view, or a copy of transposed storage."""
    if tuple(unit_dims) == (0,):
        return tensor.reshape(count, -1)
    others = [dim for dim in range(tensor.dim()) if dim not in unit_dims]
    return tensor.permute(*unit_dims, *others).reshape(count, -1)


def _held(
    tensors: Sequence[Tensor | None], bounds: Sequence[float | None] | None
) -> Sequence[float | None] | None:
    """The bounds, each as its tensor's dtype holds it."""
    if bounds is None:
        return None
    return [
        bound if bound is None or tensor is None else held(bound, tensor.dtype)
        for tensor, bound in zip(tensors, bounds, strict=True)
    ]


def _is_fast(tensor: Tensor, norm_type: float) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in FAST_DTYPES and norm_type in (1.0, 2.0)


def _cpu_norm(tensor: Tensor, norm_type: float, bound: float | None, widener: Widener) -> float:
    if norm_type == math.inf and not tensor.is_complex():
        largest = largest_magnitude(tensor).item()
        return min(largest, bound) if bound is not None and largest == largest else largest
    if not _is_fast(tensor, norm_type):
        return float(exact_norm(tensor, norm_type, bound))
    total = 0.0
    for values in widener.chunks(tensor, bound):
        total += _fast_power_sum(values, norm_type)
    if math.isfinite(total) and total > tensor.numel() * UNDERFLOW[norm_type]:
        return total if norm_type == 1.0 else math.sqrt(total)
    # Zero, non-finite, or beyond what float32 partial sums can hold.
    largest = float(largest_magnitude(tensor))
    if largest == 0.0 or (not math.isfinite(largest) and bound is None):
        return largest
    return float(exact_norm(tensor, norm_type, bound))


@np.errstate(all="ignore")  # the sums show it
def _fast_power_sum(values: Floats32, norm_type: float) -> float:
    """Sum of p-th powers of contiguous float32 numbers, p = 1 or 2."""
    numel = values.size
    if numel <= SHORT and norm_type == 2.0:
        return float(np.dot(values, values))
    body = numel - numel % LANE
    total, step = 0.0, LANE * CHUNK
    for start in range(0, body, step):
        lanes = values[start : min(start + step, body)].reshape(-1, LANE)
        total += float(power_sums(lanes, norm_type).sum(dtype=np.float64))
    if body < numel:
        total += float(power_sums(values[body:].reshape(1, -1), norm_type)[0])
    return total


def _row_norms(rows: Tensor, norm_type: float, bound: float | None, widener: Widener) -> Tensor:
    """p-norm of each row of a 2-D tensor, float64."""
    if not _is_fast(rows, norm_type):
        return exact_row_norms(rows, norm_type, bound)
    result = _fast_row_norms(widener.rows(rows, bound), norm_type)
    floor = (rows.shape[1] * UNDERFLOW[norm_type]) ** (1.0 / norm_type)
    doubtful = ~((result > floor) & torch.isfinite(result))
    if bool(doubtful.any()):
        _remeasure(result, rows, doubtful, norm_type, bound)
    return result


@np.errstate(all="ignore")
def _fast_row_norms(values: Floats32, norm_type: float) -> Tensor:
    """p-norms of the rows of a float32 matrix, p = 1 or 2; wrong where float32 overflows."""
    width = values.shape[1]
    body = width - width % LANE if width > LANE else 0
    sums = np.zeros(len(values))
    if body:
        lanes = values[:, :body].reshape(len(values), -1, LANE)
        sums += power_sums(lanes, norm_type).sum(axis=1, dtype=np.float64)
    if body < width:
        sums += power_sums(values[:, body:], norm_type)
    return torch.from_numpy(sums if norm_type == 1.0 else np.sqrt(sums))


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
            again = exact_row_norms(part[rest], norm_type, bound)
            result[indices[rest.to(indices.device)]] = again.to(result.device)
