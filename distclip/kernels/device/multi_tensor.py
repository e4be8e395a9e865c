"""Norms and multiplications of many accelerator tensors at once, through Triton.

Nothing here waits for the device, and everything may be captured in a CUDA graph. The results do
not depend on how often something is run: there are no atomics.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import operator
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.device import tables
from distclip.kernels.transfer import to_device

MEASURED = frozenset((torch.float32, torch.bfloat16, torch.float16))
SCALED = MEASURED | {torch.float64}
ORDERS = {1.0: 1, 2.0: 2, math.inf: 0}
"""Orders of norms, and what the kernels call them."""
LEAST_SUM = {
    1: tables.BLOCK * tables.TURNS * 2.0**-102,
    2: tables.BLOCK * tables.TURNS * 2.0**-102,
    0: 0.0,
}
"""Float32 sums of a chunk below this may have lost much to underflow."""
DTYPE_FRACTIONS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}
"""Bits of a number below those of its exponent."""
TRITON_SWITCH = "DISTCLIP_TRITON"

_dtype = operator.attrgetter("dtype")


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Whether the kernels run on this device. Compiles one of them to find out, once.

    ``DISTCLIP_TRITON=0`` in the environment switches them off.
    """
    if device.type != "cuda" or os.environ.get(TRITON_SWITCH) == "0":
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        _try(device)
    except Exception as error:
        warnings.warn(
            f"Triton is installed but its kernels do not run on {device} "
            f"({type(error).__name__}: {error}); measuring with torch's own operations, which is "
            f"slower. {TRITON_SWITCH}=0 in the environment makes this choice without a warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _try(device: torch.device) -> None:
    norms([torch.ones(1, device=device)], 2.0)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie without gaps in memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    dims = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(dims).is_contiguous()


def measures(tensor: Tensor, norm_type: float) -> bool:
    """Whether :func:`norms` takes this tensor."""
    return tensor.dtype in MEASURED and norm_type in ORDERS and is_dense(tensor)


def takes(tensor: Tensor, norm_type: float) -> bool:
    """Whether :func:`norms` runs where this tensor lies, and takes it."""
    return is_usable(tensor.device) and measures(tensor, norm_type)


def measures_all(tensors: Sequence[Tensor], norm_type: float) -> bool:
    """Whether :func:`norms` takes all of these, contiguous ones; without a loop in Python."""
    return norm_type in ORDERS and _are_plain(tensors, MEASURED)


def scales_all(tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`scale_` takes all of these, contiguous ones; without a loop in Python."""
    return _are_plain(tensors, SCALED)


def _are_plain(tensors: Sequence[Tensor], dtypes: frozenset[torch.dtype]) -> bool:
    return dtypes.issuperset(map(_dtype, tensors)) and all(map(Tensor.is_contiguous, tensors))


def norms(
    tensors: Sequence[Tensor],
    norm_type: float,
    bounds: Sequence[float | None] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The norm of each tensor: one launch per dtype, and one to combine the parts.

    Args:
        tensors: dense, float32, bfloat16 or float16, any shapes, none empty; of one device.
        norm_type: 1, 2 or inf.
        bounds: per tensor, measure ``clamp(x, -bound, bound)`` instead; None for as it is. In
            float32, where the clamping itself happens in the tensor's dtype.
        counts: int64 there, rows of :mod:`distclip.common.exponents`, to which the elements of each
            tensor are added, as they are, in the same reading.

    Returns:
        float64 ``(len(tensors),)`` on their device.
    """
    kernels, table = _kernels(), tables.flat(tensors)
    device, kind = tensors[0].device, ORDERS[norm_type]
    limits = None
    if bounds is not None:
        numbers = [math.inf if bound is None else bound for bound in bounds]
        limits = to_device(np.array(numbers).view(np.int64), device).view(torch.float64)
    partials = torch.empty(table.chunks, dtype=torch.float64, device=device)
    result = torch.empty(table.segments, dtype=torch.float64, device=device)
    with _on(device):
        for launch in table.launches:
            kernels.measure_chunk[(launch.programs,)](
                table.pointers,
                table.numels,
                table.firsts,
                table.owners,
                table.outputs,
                partials if limits is None else limits,
                partials,
                partials if counts is None else counts,
                launch.offset,
                DTYPE=_triton_dtype(launch.dtype),
                SIZE=launch.dtype.itemsize,
                FRACTION=0 if counts is None else DTYPE_FRACTIONS[launch.dtype],
                BOUNDED=limits is not None,
                KIND=kind,
                LEAST=LEAST_SUM[kind],
                BLOCK=tables.BLOCK,
                TURNS=tables.TURNS,
                num_warps=8,
            )
        kernels.combine[(table.segments,)](
            partials, table.firsts, table.outputs, result, KIND=kind, BLOCK=256, num_warps=2
        )
    return result


def row_norms(matrices: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of every row of every matrix: one launch per dtype and class of widths.

    Args:
        matrices: contiguous, float32, bfloat16 or float16, 2-D, none empty; of one device.
        norm_type: 1, 2 or inf.

    Returns:
        float64 ``(all rows,)`` on their device, the matrices one after another.
    """
    if max([matrix.size(1) for matrix in matrices]) > tables.WIDEST_ROW:
        return _row_norms_of_wide(matrices, norm_type)
    kernels, table = _kernels(), tables.row_table(matrices)
    device, kind = matrices[0].device, ORDERS[norm_type]
    result = torch.empty(table.rows, dtype=torch.float64, device=device)
    with _on(device):
        for launch in table.launches:
            kernels.measure_rows[(launch.programs,)](
                table.pointers,
                table.heights,
                table.widths,
                table.firsts,
                table.outputs,
                table.owners,
                result,
                launch.offset,
                DTYPE=_triton_dtype(launch.dtype),
                VECTOR=launch.vector,
                KIND=kind,
                LEAST=LEAST_SUM[kind],
                ROWS=tables.BLOCK // launch.columns,
                COLUMNS=launch.columns,
                TURNS=1 if launch.columns < 1024 else 4,
                num_warps=8,
            )
    return result


def _row_norms_of_wide(matrices: Sequence[Tensor], norm_type: float) -> Tensor:
    """Some have rows so long that one program each would take too long."""
    wide = [matrix.shape[1] > tables.WIDEST_ROW for matrix in matrices]
    rows = [row for matrix, long in zip(matrices, wide, strict=True) if long for row in matrix]
    of_wide = iter(
        torch.split(
            norms(rows, norm_type),
            [len(matrix) for matrix, long in zip(matrices, wide, strict=True) if long],
        )
    )
    others = [matrix for matrix, long in zip(matrices, wide, strict=True) if not long]
    of_others: Any = iter(())
    if others:
        found = row_norms(others, norm_type)
        of_others = iter(torch.split(found, [len(matrix) for matrix in others]))
    return torch.cat([next(of_wide if long else of_others) for long in wide])


def scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    """``tensors[i] *= coefficients[i]``, computed in float32 (float64 for float64), rounded once.

    Args:
        tensors: dense, of ``SCALED`` dtypes, none empty; of one device.
        coefficients: float64 ``(len(tensors),)`` there, which may be one expanded number. A tensor
            whose coefficient is 1 is not read.
    """
    _multiply(tensors, coefficients, drop=False)


def zero_(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Set ``tensors[i]`` to 0 where ``flags[i]`` is true, without reading it. As :func:`scale_`."""
    _multiply(tensors, torch.where(flags, 0.0, 1.0).double(), drop=True)


def _multiply(tensors: Sequence[Tensor], coefficients: Tensor, *, drop: bool) -> None:
    kernels, table = _kernels(), tables.flat(tensors)
    with _on(tensors[0].device):
        for launch in table.launches:
            kernels.scale[(launch.programs,)](
                table.pointers,
                table.numels,
                table.firsts,
                table.outputs,
                table.owners,
                coefficients,
                coefficients.stride(0),
                launch.offset,
                DTYPE=_triton_dtype(launch.dtype),
                SIZE=launch.dtype.itemsize,
                WIDE=_wide(launch.dtype),
                DROP=drop,
                BLOCK=tables.BLOCK,
                TURNS=tables.TURNS,
                num_warps=8,
            )


def scale_rows_(matrices: Sequence[Tensor], coefficients: Tensor) -> None:
    """Multiply every row of every matrix by its own coefficient; rows of 1 are not read.

    Args:
        matrices: contiguous, of ``SCALED`` dtypes, 2-D, none empty; of one device.
        coefficients: float64 ``(all rows,)`` there, contiguous.
    """
    kernels, table = _kernels(), tables.row_table(matrices)
    with _on(matrices[0].device):
        for launch in table.launches:
            kernels.scale_rows[(launch.programs,)](
                table.pointers,
                table.heights,
                table.widths,
                table.firsts,
                table.outputs,
                table.owners,
                coefficients,
                launch.offset,
                DTYPE=_triton_dtype(launch.dtype),
                VECTOR=launch.vector,
                WIDE=_wide(launch.dtype),
                ROWS=tables.BLOCK // launch.columns,
                COLUMNS=launch.columns,
                num_warps=8,
            )


@functools.cache
def _kernels() -> ModuleType:
    from distclip.kernels.device import _triton

    return _triton


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _wide(dtype: torch.dtype) -> Any:
    return _triton_dtype(torch.float64 if dtype is torch.float64 else torch.float32)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
