"""What a dtype can hold of the bound of a clamp."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


@functools.lru_cache(maxsize=256)
def rounded_bound(bound: float, dtype: torch.dtype) -> float:
    """The bound as ``dtype`` rounds it; inf, which clamps nothing, beyond its largest number.

    Elements are clamped to just this number, so norms are measured with it.
    """
    if bound > torch.finfo(dtype).max:
        return math.inf
    return float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype))


def all_held(
    bounds: npt.NDArray[np.float64], dtypes: Sequence[torch.dtype]
) -> npt.NDArray[np.float64]:
    """The bound of each of some tensors, float64, as its dtype holds it; inf for none."""
    found = torch.from_numpy(bounds)
    # Complex numbers have no order to be clamped by: none of them has a bound.
    for dtype in {each for each in dtypes if not each.is_complex} - {torch.float64}:
        rounded = torch.where(found > torch.finfo(dtype).max, math.inf, found.to(dtype).double())
        if len(set(dtypes)) > 1:
            of_these = torch.tensor([each is dtype for each in dtypes], device="cpu")
            rounded = torch.where(of_these, rounded, found)
        found = rounded
    return found.numpy()
