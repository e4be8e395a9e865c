"""What a dtype can hold of the bound of a clamp."""

from __future__ import annotations

import functools
import math

import torch


@functools.lru_cache(maxsize=256)
def held(bound: float, dtype: torch.dtype) -> float:
    """The bound as ``dtype`` rounds it; inf, which clamps nothing, beyond its largest number.

    Elements are clamped to just this number, so norms are measured with it.
    """
    if bound > torch.finfo(dtype).max:
        return math.inf
    return float(torch.tensor(bound, dtype=torch.float64).to(dtype))
