"""Norms as numbers that a sum (or a max) over ranks combines.

A p-norm travels as its p-th power. Where those could leave float64 (float64 gradients and p > 1,
large p) each norm is spread over a few slots by magnitude, so that the plain sum of an all-reduce
neither overflows nor underflows: slot b holds powers in units of ``2 ** (b * 896)``. No rank has to
know the others' magnitudes first, hence still one collective. Orders for which that would take too
many slots, or for which powers are no longer precise, travel relative to the largest (``packing``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distclip.kernels.powers import LEAST_ORDER, p_norm

SLOT_BITS = 896
"""Exponents per slot: leaves 2 ** 127 of room for the sum itself."""
MOST = 64.0
"""The largest order whose powers travel: 152 slots for each norm."""


def is_far(norm_type: float) -> bool:
    """Whether powers of this finite order cannot travel by themselves."""
    return norm_type > MOST or norm_type < LEAST_ORDER


@dataclass(frozen=True, slots=True)
class Encoding:
    """How norms of one order travel: ``slots`` float64 numbers each, from exponent ``lowest``.

    ``wide``: in slots; the order is then above 1.
    """

    norm_type: float
    wide: bool

    @property
    def lowest(self) -> int:
        """Index of the first slot."""
        return math.floor(-1080 * self.norm_type / SLOT_BITS) if self.wide else 0

    @property
    def slots(self) -> int:
        """How many float64 numbers encode one norm."""
        if not self.wide:
            return 1
        return math.floor(1030 * self.norm_type / SLOT_BITS) - self.lowest + 1

    def encode(self, norms: Tensor) -> Tensor:
        """float64 ``(n,)`` norms to float64 summands, ``(n,)``, or ``(n, slots)`` if wide."""
        if not self.wide:
            return norms.pow(self.norm_type)
        finite = torch.isfinite(norms) & (norms > 0)
        mantissa, exponent = torch.frexp(torch.where(finite, norms, 1.0))
        bits = exponent.double() * self.norm_type
        slot = torch.floor(bits / SLOT_BITS)
        value = mantissa.pow(self.norm_type) * torch.exp2(bits - slot * SLOT_BITS)
        summands = norms.new_zeros(len(norms), self.slots)
        column = torch.where(finite, slot.long() - self.lowest, self.slots - 1)
        summands.scatter_(1, column.unsqueeze(1), torch.where(finite, value, norms).unsqueeze(1))
        return summands

    def decode(self, sums: Tensor) -> Tensor:
        """Sums of what :meth:`encode` gave to float64 ``(n,)`` norms."""
        if not self.wide:
            return sums.pow(1.0 / self.norm_type)
        slot = torch.arange(self.slots, dtype=torch.float64, device=sums.device) + self.lowest
        root = sums.pow(1.0 / self.norm_type)
        # In two factors: the exponent of a slot can exceed float64's where its content is 0.
        half = torch.exp2(slot * (SLOT_BITS / self.norm_type / 2))
        parts = torch.where(root > 0, root * half * half, root)
        return p_norm(parts, self.norm_type, 1)


def to_ordered_bits(values: Tensor) -> Tensor:
    """Non-negative float64 as int64 in the same order, with NaN above inf.

    Maxima are reduced in this form: a float max over ranks may lose a NaN, an integer one cannot.
    """
    return torch.where(torch.isnan(values), math.nan, values.abs()).view(torch.int64)


def from_ordered_bits(bits: Tensor) -> Tensor:
    """Inverse of :func:`to_ordered_bits`."""
    return bits.view(torch.float64)
