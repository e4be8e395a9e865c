"""What a dtype can hold of the bound of a clamp."""

from __future__ import annotations

import math

import torch


def held(bound: float, dtype: torch.dtype) -> float:
    """The bound, or inf, which clamps nothing, beyond the largest number of ``dtype``.

    torch refuses such a bound; a rounded one would be inf.
    """
    return bound if bound <= torch.finfo(dtype).max else math.inf
