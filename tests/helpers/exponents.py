"""Counts of exponents as they should be, and numbers to count."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distclip.common.exponents import Exponents


def oracle(values: Tensor) -> dict[str, Any]:
    """From the numbers themselves, as float64; their exponents by frexp."""
    tiny = torch.finfo(values.dtype).tiny
    numbers = np.abs(values.double().numpy().ravel())
    finite = np.isfinite(numbers)
    normal = numbers[finite & (numbers >= tiny)]
    found = np.frexp(normal)[1].astype(int) - 1
    spread = np.clip(found, -126, 127)
    return {
        "dtype": str(values.dtype).removeprefix("torch."),
        "zero": int((numbers == 0).sum()),
        "subnormal": int(((numbers > 0) & (numbers < tiny)).sum()),
        "nonfinite": int((~finite).sum()),
        "counts": {int(e): int((spread == e).sum()) for e in np.unique(spread)},
    }


def shown(found: Exponents) -> dict[str, Any]:
    counts = {found.lowest + i: n for i, n in enumerate(found.counts.tolist()) if n}
    return {
        "dtype": found.dtype, "zero": found.zero, "subnormal": found.subnormal,
        "nonfinite": found.nonfinite, "counts": counts,
    }  # fmt: skip


def wide(dtype: torch.dtype, count: int = 3000) -> Tensor:
    """Numbers all over the range of a dtype, with everything special among them."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    low = torch.tensor(info.smallest_normal, dtype=torch.float64).log2() - 12
    high = torch.tensor(info.max, dtype=torch.float64).log2()
    powers = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    values = (2.0**powers * signs).to(dtype)
    special = [
        0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, -info.max, info.smallest_normal,
        info.smallest_normal / 2, 1.0, 2.0, 0.99,
    ]  # fmt: skip
    values[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    return values
