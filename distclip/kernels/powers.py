"""p-norms of float64 numbers of any magnitude, for any order.

The sum of p-th powers is not the norm's own size: for p > 1 it leaves float64 long before the norm
does, so numbers are divided by the largest first. For p <= 1 it does not: a sum that overflows then
belongs to a norm that does, and no power vanishes. Dividing would do harm there, as the root of the
quotients' sum may overflow where the norm does not. Below ``LEAST_ORDER`` powers of different
numbers are hardly different in float64 any more; such a norm is the largest number, or too
large to hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_ORDER = 1e-4
"""The smallest order whose powers are summed as they are."""


def needs_scaling(norm_type: float) -> bool:
    """Whether p-th powers of float64 numbers are a worse range or precision than the numbers."""
    return math.isfinite(norm_type) and (norm_type > 1.0 or norm_type < LEAST_ORDER)


def scale_of(largest: Tensor) -> Tensor:
    """What to divide by so that nothing exceeds 1; 1 for 0, and for NaN and inf, which stay."""
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def scaled_norm(
    values: Tensor, norm_type: float, dim: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The p-norm as two factors, of which neither leaves float64 where their product does.

    As :func:`p_norm`, with ``dim`` kept (0-dim for everything); the second is None for 1.
    """
    keep = dim is not None
    if not needs_scaling(norm_type):
        return torch.linalg.vector_norm(values, norm_type, dim, keepdim=keep), None
    scale = scale_of(torch.linalg.vector_norm(values, math.inf, dim, keepdim=keep))
    return torch.linalg.vector_norm(values / scale, norm_type, dim, keepdim=keep), scale


def p_norm(values: Tensor, norm_type: float, dim: int | None = None) -> Tensor:
    """The p-norm along ``dim``, or of everything.

    Args:
        values: float64, not empty along ``dim``.
        norm_type: p > 0 or inf.
        dim: the dim to reduce; None for all.

    Returns:
        float64 without ``dim``, or 0-dim. NaN and inf pass through.
    """
    norm, scale = scaled_norm(values, norm_type, dim)
    norm = norm if scale is None else norm * scale
    return norm if dim is None else norm.squeeze(dim)
