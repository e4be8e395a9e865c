"""Norms of accelerator tensors: many in one launch, and nothing that waits for the device.

Three ways again, per tensor: the Triton kernels; torch's multi-tensor norm accumulating in float64,
where Triton is missing; and float64 chunk by chunk for what neither takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from distclip.kernels import plain
from distclip.kernels.device import multi_tensor
from distclip.kernels.exponents import Counting
from distclip.kernels.plain import FAST_DTYPES, is_wide
from distclip.kernels.transfer import to_device

Bounds: TypeAlias = "Sequence[float | None]"
NormMethod: TypeAlias = Literal["kernel", "torch", "exact"]


def norms(
    tensors: Sequence[Tensor],
    norm_type: float,
    bounds: Bounds | None = None,
    counting: Counting | None = None,
) -> Tensor:
    """p-norm of each tensor, as if clamped to its bound first.

    Args:
        tensors: at least one, on one device, any dtypes and shapes, none empty.
        norm_type: p > 0 or inf.
        bounds: per tensor; None for as it is.
        counting: without bounds, counts the exponents of what the kernels measure.

    Returns:
        float64 ``(len(tensors),)`` on their device.
    """
    kernels = multi_tensor.is_usable(tensors[0].device)
    if kernels and counting is None and multi_tensor.measures_all(tensors, norm_type):
        return multi_tensor.norms(tensors, norm_type, bounds)

    def way(number: int) -> NormMethod:
        tensor = tensors[number]
        if kernels and multi_tensor.measures(tensor, norm_type):
            return "kernel"
        known = tensor.dtype in FAST_DTYPES and norm_type in multi_tensor.ORDERS
        return "torch" if known and _bound(bounds, number) is None else "exact"

    def measure(numbers: Sequence[int], way: NormMethod) -> Tensor:
        chosen = [tensors[number] for number in numbers]
        if way == "kernel":
            if counting is not None:
                return counting.launch(chosen, numbers, norm_type)
            limits = None if bounds is None else [bounds[number] for number in numbers]
            return multi_tensor.norms(chosen, norm_type, limits)
        if way == "torch":
            return torch.stack(torch._foreach_norm(chosen, norm_type, dtype=torch.float64))
        limits = [_bound(bounds, number) for number in numbers]
        return plain.norms(chosen, norm_type, limits)

    return _each(range(len(tensors)), way, measure, [1] * len(tensors))


def row_norms(matrices: Sequence[Tensor], norm_type: float, bounds: Bounds | None = None) -> Tensor:
    """p-norm of each row of each matrix, as if clamped to the matrix's bound first.

    Args:
        matrices: at least one, 2-D, on one device, any dtypes, none empty.
        norm_type: p > 0 or inf.
        bounds: per matrix; None for as it is.

    Returns:
        float64 ``(all rows,)`` on their device, the matrices one after another.
    """
    kernels = multi_tensor.is_usable(matrices[0].device)
    if kernels and bounds is None and multi_tensor.measures_all(matrices, norm_type):
        return multi_tensor.row_norms(matrices, norm_type)

    def way(number: int) -> NormMethod:
        matrix = matrices[number]
        if _bound(bounds, number) is not None:
            return "exact"
        if kernels and multi_tensor.measures(matrix, norm_type) and matrix.is_contiguous():
            return "kernel"
        takes = matrix.dtype in FAST_DTYPES and not is_wide(matrix.dtype, norm_type)
        return "torch" if takes else "exact"

    def measure(numbers: Sequence[int], way: NormMethod) -> Tensor:
        chosen = [matrices[number] for number in numbers]
        if way == "kernel":
            return multi_tensor.row_norms(chosen, norm_type)
        if way == "torch":
            return torch.cat(
                [
                    torch.linalg.vector_norm(matrix, norm_type, dim=1, dtype=torch.float64)
                    for matrix in chosen
                ]
            )
        limits = [_bound(bounds, number) for number in numbers]
        return plain.row_norms(chosen, norm_type, limits)

    return _each(range(len(matrices)), way, measure, [len(matrix) for matrix in matrices])


def _bound(bounds: Bounds | None, number: int) -> float | None:
    return None if bounds is None else bounds[number]


def _each(
    numbers: Iterable[int],
    way: Callable[[int], NormMethod],
    measure: Callable[[Sequence[int], NormMethod], Tensor],
    counts: Sequence[int],
) -> Tensor:
    """Results of ``counts`` numbers each, those of one way measured together, in order."""
    by_way: dict[NormMethod, list[int]] = {}
    for number in numbers:
        by_way.setdefault(way(number), []).append(number)
    if len(by_way) == 1:
        only, members = next(iter(by_way.items()))
        return measure(members, only)
    parts: list[Tensor | None] = [None] * len(counts)
    for kind, members in by_way.items():
        found = torch.split(measure(members, kind), [counts[number] for number in members])
        for number, part in zip(members, found, strict=True):
            parts[number] = part
    return torch.cat(cast("list[Tensor]", parts))


def placed(result: Tensor, positions: Sequence[int], values: Tensor) -> Tensor:
    """``result`` with ``values`` at ``positions``; ``values`` itself where those are all."""
    values = values.to(result.device)
    if len(positions) == len(result):
        return values
    return result.index_copy(0, to_device(positions, result.device), values)
