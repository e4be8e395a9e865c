"""How many elements of a tensor have which binary exponent, by plain torch operations.

The exponent is read from the bits, so that nothing is rounded, and a processor that flushes
subnormal numbers to 0 changes nothing. No value of an accelerator tensor is read on the host.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from distclip.common import exponents as rows
from distclip.kernels.plain import chunks_of

_FORMATS = {
    torch.float16: (torch.int16, 10, 5),
    torch.bfloat16: (torch.int16, 7, 8),
    torch.float32: (torch.int32, 23, 8),
    torch.float64: (torch.int64, 52, 11),
}
"""The integer type of the same size, and how many bits are of the fraction and of the exponent."""

_AT_ONCE = 1 << 22
"""Elements of an accelerator tensor that are sorted at once."""


def counts(tensor: Tensor) -> Tensor:
    """A row of counts as in :mod:`distclip.common.exponents`; float64, on the tensor's device.

    Args:
        tensor: local, of any strides. The parts of complex numbers count as two elements; of a
            dtype of 8 bits, elements count as float32.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in _FORMATS:
        tensor = tensor.float()
    integer, fraction, size = _FORMATS[tensor.dtype]
    fields = torch.zeros(1 << size, dtype=torch.int64, device=tensor.device)
    nonzero = fields.new_zeros(())
    parts = chunks_of(tensor) if tensor.is_cpu else torch.split(tensor.reshape(-1), _AT_ONCE)
    for part in parts:
        magnitude = part.view(integer) & torch.iinfo(integer).max
        nonzero += torch.count_nonzero(magnitude)
        found = magnitude >> fraction
        if tensor.is_cpu:
            fields += torch.bincount(found, minlength=1 << size)
        else:
            fields += by_sorting(found, 1 << size)
    row = torch.zeros(rows.COLUMNS, dtype=torch.float64, device=tensor.device)
    row.index_add_(0, _columns(tensor.dtype, tensor.device), fields.double())
    row[rows.ZERO] += tensor.numel() - nonzero
    row[rows.SUBNORMAL] -= tensor.numel() - nonzero
    row[list(_FORMATS).index(tensor.dtype)] += tensor.numel()
    return row


def by_sorting(values: Tensor, size: int) -> Tensor:
    """int64 ``(size,)``: how often each of 0 to ``size - 1`` is there.

    As ``torch.bincount``, which on an accelerator waits for the device.
    """
    edges = torch.arange(size, dtype=values.dtype, device=values.device)
    below = torch.searchsorted(values.sort().values, edges, right=True)
    return torch.diff(below, prepend=below.new_zeros(1))


@functools.lru_cache(maxsize=32)
def _columns(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The column that each value of the bits of an exponent counts in; zeros as subnormal."""
    size = _FORMATS[dtype][2]
    exponents = torch.arange(1 << size) - ((1 << size - 1) - 1)
    columns = exponents.clamp(rows.LOWEST, rows.HIGHEST) - rows.LOWEST + rows.FIRST
    columns[0], columns[-1] = rows.SUBNORMAL, rows.NONFINITE
    return columns.to(device)
