"""What a dtype can hold of the bound of a clamp."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.kernels.transfer import to_device


@functools.lru_cache(maxsize=256)
def rounded_bound(bound: float, dtype: torch.dtype) -> float:
    """The bound as ``dtype`` rounds it; inf, which clamps nothing, beyond its largest number.

    Elements are clamped to just this number, so norms are measured with it.
    """
    if bound > torch.finfo(dtype).max:
        return math.inf
    return float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype))


def bounds_held(bounds: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The bound of each of some tensors, float64, as its dtype holds it; inf for none.

    Reads nothing on the host.
    """
    # Complex numbers have no order to be clamped by: none of them has a bound.
    for dtype in {each for each in dtypes if not each.is_complex} - {torch.float64}:
        most = torch.finfo(dtype).max
        rounded = torch.where(bounds > most, math.inf, bounds.to(dtype).double())
        if len(set(dtypes)) > 1:
            theirs = to_device([each is dtype for each in dtypes], bounds.device)
            rounded = torch.where(theirs.bool(), rounded, bounds)
        bounds = rounded
    return bounds


def all_held(
    bounds: npt.NDArray[np.float64], dtypes: Sequence[torch.dtype]
) -> npt.NDArray[np.float64]:
    """As :func:`bounds_held`, of numbers on the host."""
    return bounds_held(torch.from_numpy(bounds), dtypes).numpy()
