"""Binary exponents counted by the Triton kernels, on a GPU or in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.common.exponents import COLUMNS
from distclip.kernels import exponents
from distclip.kernels.device import multi_tensor
from distclip.kernels.device import norms as accelerated
from distclip.kernels.host import compiler
from tests.helpers.exponents import wide
from tests.kernels.test_triton import (
    CHUNK,
    DEVICE,
    DTYPES,
    assert_near,
    assert_same,
    awkward,
    drawn,
    interpreted,
    pytestmark,
    true_norm,
    usable,
)

__all__ = ["interpreted", "pytestmark", "usable"]


def counted_as(tensors: list[Tensor]) -> Tensor:
    """By torch's operations, which tests/kernels/test_counting.py holds to frexp."""
    return torch.stack([exponents.counts(tensor) for tensor in tensors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counting_exponents(dtype: torch.dtype) -> None:
    """Norms stay what they are; the counts are added to what is there."""
    values = wide(dtype, CHUNK + 400).to(DEVICE)
    given = [*awkward(dtype).values(), values[3:], values, values[:3000].view(30, 100).t()]
    if dtype.itemsize == 2:
        everything = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE)
        given.append(everything.view(dtype))
    counts = torch.full((len(given), COLUMNS), 2**40, dtype=torch.int64, device=DEVICE)
    norms = multi_tensor.norms(given, 2.0, counts=counts)
    assert_same(norms, multi_tensor.norms(given, 2.0))
    assert_same((counts - 2**40).double(), counted_as(given))


@pytest.mark.usefixtures("usable")
def test_counting_takes_the_launches_of_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what no kernel takes, and for what was not measured."""
    monkeypatch.setattr(compiler, "compiled_kinds", frozenset)
    gaps = drawn(20, 30, dtype=torch.float32)[:, ::2]
    taken = [drawn(40, dtype=torch.float32), wide(torch.bfloat16).to(DEVICE)]
    tensors = [taken[0], gaps, wide(torch.float64).to(DEVICE), taken[1], taken[0][:0]]
    launched: list[tuple[int, bool]] = []
    norms = multi_tensor.norms

    def watched(some: list[Tensor], *arguments: Any, **options: Any) -> Tensor:
        launched.append((len(some), options.get("counts") is not None))
        return norms(some, *arguments, **options)

    monkeypatch.setattr(multi_tensor, "norms", watched)
    for measured in (taken, tensors[:-1], []):
        launched.clear()
        counting = exponents.Counting(len(tensors), DEVICE)
        if measured:
            here = exponents.Counting(len(measured), DEVICE)
            for order in (2.0, 1.0):  # counted with the first
                assert_near(
                    accelerated.norms(measured, order, None, here),
                    torch.stack([true_norm(tensor, order) for tensor in measured]),
                )
            counting.absorb(here, [0, 3] if measured is taken else range(4))
        rows = counting.rest(tensors, None, None)
        assert launched == ([(2, True), (2, False)] if measured else [(2, True)])
        assert_same(rows, counted_as(tensors))
