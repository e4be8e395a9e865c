"""Every bfloat16 and float16 number times many coefficients: the float64 product, rounded once."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distclip.kernels import changing
from distclip.kernels.host import blocks, compiler

Floats = npt.NDArray[np.float64]
DIGITS = {torch.bfloat16: (8, -126, 2.0**128), torch.float16: (11, -14, 2.0**16)}
"""Binary digits, the smallest exponent, and the first power of two that is too large."""


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def rounded(exact: Floats, dtype: torch.dtype) -> Floats:
    """To the nearest number of ``dtype``, ties to even."""
    digits, least, beyond = DIGITS[dtype]
    finite = np.where(np.isfinite(exact), exact, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, least)
    spacing = np.ldexp(1.0, exponent - digits + 1)
    nearest = np.rint(finite / spacing) * spacing
    nearest = np.where(np.abs(nearest) >= beyond, np.copysign(np.inf, nearest), nearest)
    return np.where(np.isfinite(exact), np.copysign(nearest, exact), exact)


def coefficients(dtype: torch.dtype) -> Floats:
    drawn = np.random.default_rng(0)
    generic = np.concatenate([drawn.random(60), drawn.random(20) * 1e-3, -drawn.random(5)])
    few_digits = np.array([0.5, 0.75, 0.625, 1.0 + 2.0**-9, 1.5, 3.0, 0.501953125, 2.0**-14])
    ends = [0.0, -0.0, 1e-38, 1e-39, 1e-45, 1e-60, 1e-300, 3.4028234e38, 3.5e38, 1e60, np.inf]
    # Products at ties, and as close to them as float64 comes: what one rounding more would miss.
    digits, least, _ = DIGITS[dtype]
    wholes = drawn.integers(2 ** (digits - 1), 2**digits, 12)
    factors = (2.0 * drawn.integers(2 ** (digits - 1), 2**digits, 12) + 1.0) / wholes
    small = factors * 2.0 ** (least - digits)
    ties = np.concatenate([factors * 2.0 ** -(digits + 1), factors, small, factors * 2.0**-20])
    beside = [np.nextafter(ties, 0.0), np.nextafter(ties, np.inf)]
    return np.concatenate([generic, few_digits, ends, ties, *beside])


@pytest.mark.parametrize("dtype", DIGITS)
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    if blocks.KIND_OF[dtype] not in compiler.compiled_kinds():
        pytest.skip("no compiled loop for this dtype here")
    every = every_number(dtype)
    wide = every.double().numpy()
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    for factor in coefficients(dtype):
        with np.errstate(all="ignore"):
            wanted = rounded(wide * factor, dtype)
        for order in (torch.arange(len(every)), shuffled):
            now = every[order].clone()
            changing.scale_([now], torch.tensor([factor], dtype=torch.float64))
            found = now.double().numpy()
            np.testing.assert_array_equal(found, wanted[order.numpy()], err_msg=f"{factor=!r}")
            signs = np.signbit(found) == np.signbit(wanted[order.numpy()])
            assert (signs | np.isnan(found)).all(), factor


@pytest.mark.parametrize("dtype", DIGITS)
def test_a_strided_tensor_has_the_same_products(dtype: torch.dtype) -> None:
    if blocks.KIND_OF[dtype] not in compiler.compiled_kinds():
        pytest.skip("no compiled loop for this dtype here")
    for factor in coefficients(dtype)[::7]:
        apart = torch.stack([every_number(dtype)] * 2, dim=1)[:, 0]
        together = every_number(dtype)
        number = torch.tensor([factor], dtype=torch.float64)
        changing.scale_([apart], number)
        changing.scale_([together], number)
        assert torch.equal(apart.view(torch.int16), together.view(torch.int16)), factor


def test_the_rounding_of_this_test() -> None:
    """Against torch's own, which is exact for float32 numbers."""
    for dtype in DIGITS:
        numbers = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1))
        numbers = torch.cat([numbers, numbers * 1e-5, numbers * 1e-39, numbers * 1e5])
        wanted = numbers.to(dtype).double().numpy()
        np.testing.assert_array_equal(rounded(numbers.double().numpy(), dtype), wanted)
