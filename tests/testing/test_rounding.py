"""One rounding: what passes, and what must not."""

import numpy as np
import pytest
import torch

from distclip.testing import assert_rounded
from distclip.testing.rounding import ulp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_spacing_is_that_of_nextafter(dtype):
    info = torch.finfo(dtype)
    floats = [1.0, 1.5, 2.0 - info.eps, 3.7, 1e-3, info.smallest_normal, info.smallest_normal / 4]
    for value in torch.tensor(floats, dtype=torch.float64).to(dtype):
        up = (
            torch.nextafter(value, torch.tensor(float("inf"), dtype=dtype)).double()
            - value.double()
        )
        assert ulp(value.double().numpy(), dtype) == up.item()
    assert np.isnan(ulp(np.inf, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e4, 1e-6, 1e-40])
def test_one_rounding_passes_and_a_second_unit_does_not(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(1000, dtype=torch.float64, generator=generator) * scale
    once = want.to(dtype)
    assert_rounded(once, want.numpy(), ulps=0.5, coefficient_error=0)
    # Through a float32 coefficient, as the library does it.
    coefficient = torch.tensor(0.37, dtype=torch.float32)
    product = (once.double() * coefficient.double()).to(dtype)
    assert_rounded(product, once.double().numpy() * 0.37)
    off = once.clone()
    towards = torch.tensor(float("inf"), dtype=dtype)
    for _ in range(2):
        off[7] = torch.nextafter(off[7], towards)
    with pytest.raises(AssertionError, match=r"1 of 1000 elements"):
        assert_rounded(off, want.numpy(), ulps=1, coefficient_error=0)


def test_a_coefficient_rounded_to_bfloat16_is_caught():
    gradient = torch.linspace(0.1, 1, 100, dtype=torch.float32)
    coefficient = 1 / 3
    wrong = gradient * torch.tensor(coefficient, dtype=torch.bfloat16).float()
    with pytest.raises(AssertionError):
        assert_rounded(wrong, gradient.double().numpy() * coefficient)


def test_the_message_names_what_is_wrong():
    actual = torch.tensor([[1.0, 2.0], [3.0, 4.5]])
    with pytest.raises(AssertionError) as caught:
        assert_rounded(actual, [[1.0, 2.0], [3.0, 4.0]], name="layer.weight")
    message = str(caught.value)
    assert message.startswith("layer.weight (float32): 1 of 4 elements")
    assert "[1, 1]: " in message
    assert "4.5" in message
    with pytest.raises(AssertionError, match=r"shape \(2, 2\), expected \(2,\)"):
        assert_rounded(actual, [1.0, 2.0])


@pytest.mark.parametrize(
    ("actual", "want", "good"),
    [
        (float("nan"), float("nan"), True),
        (float("inf"), float("inf"), True),
        (float("inf"), 1e6, True),
        (65504.0, 65504.0, True),
        (0.0, 1e-9, True),
        (float("inf"), -1e6, False),
        (float("inf"), float("-inf"), False),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
        (float("inf"), 100.0, False),
        (65504.0, 1e6, False),
        (65504.0, float("inf"), False),
        (0.0, 1e-3, False),
    ],
)
def test_the_edges_of_float16(actual, want, good):
    tensor = torch.tensor(actual, dtype=torch.float16)
    if good:
        assert_rounded(tensor, want)
    else:
        with pytest.raises(AssertionError):
            assert_rounded(tensor, want)
