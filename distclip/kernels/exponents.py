"""How many elements of tensors have which binary exponent: the door, beside that of the norms.

What the compiled loops or the Triton kernels measure is counted in the same reading; for other
tensors there are plain torch operations. The exponent is read from the bits, so that nothing is
rounded, and a processor that flushes subnormal numbers to 0 changes nothing. No value of an
accelerator tensor is read on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from distclip.common import exponents as rows
from distclip.kernels.device import multi_tensor
from distclip.kernels.host import choosing
from distclip.kernels.host import kernels as host
from distclip.kernels.host.choosing import Chosen, PlanTables
from distclip.kernels.look import Look
from distclip.kernels.plain import chunks_of
from distclip.kernels.transfer import to_device

Measured: TypeAlias = tuple[host.Floats, list[int]]
MeasureRows: TypeAlias = Callable[[Chosen, float, "host.Floats | None"], Measured]

_FORMATS = {
    torch.float16: (torch.int16, 10, 5),
    torch.bfloat16: (torch.int16, 7, 8),
    torch.float32: (torch.int32, 23, 8),
    torch.float64: (torch.int64, 52, 11),
}
"""The integer type of the same size, and how many bits are of the fraction and of the exponent."""

_AT_ONCE = 1 << 22
"""Elements of an accelerator tensor that are sorted at once."""


class Counting:
    """Counts of ``size`` tensors, filled as they are measured; ``done`` are those that were."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device
        self._rows: Tensor | None = None
        self.done: set[int] = set()

    def reading(self, measure: MeasureRows, chosen: Chosen, norm_type: float) -> Measured:
        """``measure(chosen, norm_type)``, counting in the same reading what is not done.

        Args:
            measure: of the norms of tensors or of units, in the compiled loops.
            chosen: without bounds.
            norm_type: p.
        """
        positions = chosen.positions or range(len(chosen.tensors))
        if not self.done.isdisjoint(positions):  # when norms of another order were measured
            return measure(chosen, norm_type, None)
        records = host.records_for(chosen)
        measured = measure(chosen, norm_type, records)
        self._put(positions, torch.from_numpy(host.counts(chosen, records)))
        return measured

    def launch(self, tensors: Sequence[Tensor], positions: Sequence[int], order: float) -> Tensor:
        """As ``norms`` of the Triton kernels, counting in the same launches what is not done.

        Args:
            tensors: those with these positions.
            positions: where they are counted.
            order: of the norms.
        """
        if not self.done.isdisjoint(positions):
            return multi_tensor.norms(tensors, order)
        size = len(tensors), rows.COLUMNS
        counts = torch.zeros(size, dtype=torch.int64, device=tensors[0].device)
        norms = multi_tensor.norms(tensors, order, counts=counts)
        self._put(positions, counts.double())
        return norms

    def absorb(self, other: Counting, positions: Sequence[int]) -> None:
        """Take over the counts of some tensors, which have these positions here."""
        done = sorted(other.done)
        if done:
            self._put([positions[each] for each in done], other._rows_of(done))

    def rest(
        self, tensors: Sequence[Tensor | None], tables: PlanTables | None, seen: Look | None
    ) -> Tensor:
        """The rows as in :mod:`distclip.common.exponents`; those that are not done, counted now.

        Args:
            tensors: one for each row, local; None counts nothing. The parts of complex numbers
                count as two elements; of a dtype of 8 bits, elements count as float32.
            tables: what is remembered of the tensors from step to step.
            seen: what a look at those that are there has found.

        Returns:
            float64 ``(size, columns)``.
        """
        left = tensors
        if self.done:
            left = [None if n in self.done else each for n, each in enumerate(tensors)]
            seen = None
        if any(each is not None for each in left):
            chosen = choosing.choose(left, "exponents", tables=tables, seen=seen, pairs=True)
            if chosen is not None:
                self.reading(host.norms, chosen, 2.0)
        by_device: dict[torch.device, list[int]] = {}
        for position, tensor in enumerate(left):
            if tensor is None or position in self.done:
                continue
            if tensor.numel() and multi_tensor.takes(tensor, 2.0):
                by_device.setdefault(tensor.device, []).append(position)
            else:
                self._put([position], counts(tensor).unsqueeze(0))
        for positions in by_device.values():
            self.launch([cast(Tensor, left[each]) for each in positions], positions, 2.0)
        return self._all_rows()

    def _all_rows(self) -> Tensor:
        if self._rows is None:
            size = self._size, rows.COLUMNS
            self._rows = torch.zeros(size, dtype=torch.float64, device=self._device)
        return self._rows

    def _rows_of(self, positions: Sequence[int]) -> Tensor:
        found = self._all_rows()
        if len(positions) == self._size:
            return found
        return found.index_select(0, to_device(positions, self._device))

    def _put(self, positions: Sequence[int], counted: Tensor) -> None:
        counted = counted.to(self._device)
        if len(positions) == self._size:
            self._rows = counted
        else:
            self._all_rows().index_copy_(0, to_device(positions, self._device), counted)
        self.done.update(positions)


def counts(tensor: Tensor) -> Tensor:
    """The row of one tensor of any strides, by torch operations; float64, on its device."""
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
    exponents = torch.arange(1 << size, device="cpu") - ((1 << size - 1) - 1)
    columns = exponents.clamp(rows.LOWEST, rows.HIGHEST) - rows.LOWEST + rows.FIRST
    columns[0], columns[-1] = rows.SUBNORMAL, rows.NONFINITE
    return columns.to(device)
