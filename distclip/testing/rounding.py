"""Comparison of a tensor with a float64 reference, to within one rounding of the tensor's dtype."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

# The relative rounding error of a coefficient held in float32.
FLOAT32_ROUNDING = 2.0**-24


def assert_rounded(
    actual: torch.Tensor,
    expected: npt.ArrayLike,
    *,
    ulps: float = 1.0,
    coefficient_error: float = FLOAT32_ROUNDING,
    name: str = "tensor",
) -> None:
    """Assert that `actual` is `expected`, rounded once to the dtype of `actual`.

    The bound on each element is ``ulps * ulp(expected) + coefficient_error * |expected|``: a unit
    in the last place of the dtype at the expected value (subnormals included), plus what a
    relative error of the coefficient makes of it. NaN must meet NaN, and an infinity the same
    infinity. A value that the dtype cannot hold must have become an infinity, or, within the bound,
    the largest value.

    Args:
        actual: any floating-point dtype, whole (not a DTensor), any device.
        expected: float64 of the same shape.
        ulps: how many units in the last place; correct rounding needs 0.5.
        coefficient_error: relative error of the coefficient before the multiply. The default is
            that of a float32 coefficient; 0 for a comparison without one.
        name: what the message calls the tensor.

    Raises:
        AssertionError: names the tensor and shows the worst elements.
    """
    __tracebackhide__ = True
    want = np.asarray(expected, np.float64)
    have = actual.detach().to("cpu", torch.float64).numpy()
    if have.shape != want.shape:
        raise AssertionError(f"{name}: shape {have.shape}, expected {want.shape}")
    info = torch.finfo(actual.dtype)
    with np.errstate(all="ignore"):
        unit = ulp(want, actual.dtype)
        bound = ulps * unit + coefficient_error * np.abs(want)
        error = np.abs(have - want)
        good = (error <= bound) | (have == want) | (np.isnan(have) & np.isnan(want))
        # From half a unit past the largest value on, rounding ends at infinity.
        overflows = np.abs(want) + bound >= info.max + ulp(info.max, actual.dtype) / 2
        good |= overflows & np.isinf(have) & (np.sign(have) == np.sign(want))
    if good.all():
        return
    excess = np.where(good, -1.0, np.nan_to_num(error / bound, nan=math.inf, posinf=math.inf))
    worst = np.argsort(excess, axis=None)[::-1][: min(5, int((~good).sum()))]
    lines = [
        f"{name} ({str(actual.dtype).removeprefix('torch.')}): {int((~good).sum())} of {good.size} "
        f"elements are not the expected value rounded once"
    ]
    for flat in worst:
        at = tuple(int(i) for i in np.unravel_index(flat, good.shape))
        lines.append(
            f"  {list(at)}: {have[at]!r}, expected {want[at]!r}: off by {error[at]:.3g}, "
            f"{error[at] / unit[at]:.3g} ulp; allowed {bound[at]:.3g}"
        )
    raise AssertionError("\n".join(lines))


def ulp(values: npt.ArrayLike, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """The spacing of `dtype` at each value, in float64.

    Below the smallest normal number it is the smallest subnormal; at infinity and NaN it is NaN.
    """
    info = torch.finfo(dtype)
    magnitude = np.abs(np.asarray(values, np.float64))
    floored = np.maximum(magnitude, info.smallest_normal)
    _, exponent = np.frexp(floored)  # floored = m * 2**exponent, 1/2 <= m < 1
    spacing = np.ldexp(np.float64(info.eps), exponent - 1)
    return np.where(np.isfinite(magnitude), spacing, np.nan)
