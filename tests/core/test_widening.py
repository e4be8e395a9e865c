"""Half precision on the CPU: every element is converted exactly, and once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip.statistics import local
from distclip.statistics.neighbours import CHUNK
from distclip.statistics.widening import SHORT, Widener

SIZES = [1, 2, SHORT - 1, SHORT, SHORT + 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3, 5 * CHUNK]
HALVES = [torch.bfloat16, torch.float16]


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def together(tensor: Tensor, bound: float | None = None) -> np.ndarray:
    return np.concatenate([chunk.copy() for chunk in Widener().chunks(tensor, bound)])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_every_element_once(
    dtype: torch.dtype, numel: int, start: int, bound: float | None
) -> None:
    tensor = drawn(numel + start, dtype=dtype)[start:]
    kept = tensor.clone()

    found = together(tensor, bound)

    want = tensor.float() if bound is None else tensor.float().clamp(-bound, bound)
    np.testing.assert_array_equal(np.sort(found), np.sort(want.numpy()))
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bound", [None, 0.5])
def test_every_bit_pattern(dtype: torch.dtype, bound: float | None) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)

    found = together(patterns, bound)

    want = (patterns.float() if bound is None else patterns.float().clamp(-bound, bound)).numpy()
    assert np.isnan(found).sum() == np.isnan(want).sum() > 0
    finite = np.sort(found[~np.isnan(found)]), np.sort(want[~np.isnan(want)])
    np.testing.assert_array_equal(*finite)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2048), (7, 1001), (1, 2 * SHORT), (2, CHUNK + 8)])
def test_rows_stay_apart(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = drawn(*shape, dtype=dtype)

    odd = drawn(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)
    for rows in (matrix, odd, drawn(*reversed(shape), dtype=dtype).t()):
        for bound in (None, 0.5):
            found = Widener().rows(rows, bound)
            want = rows.float() if bound is None else rows.float().clamp(-bound, bound)
            np.testing.assert_array_equal(np.sort(found), np.sort(want.numpy()))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_norms_of_many(dtype: torch.dtype, norm_type: float) -> None:
    """Of one measurement, whose tensors use the same memory one after another."""
    tensors = [drawn(numel, dtype=dtype) for numel in SIZES]
    tensors += [drawn(300, 500, dtype=dtype).t(), drawn(2 * CHUNK, 2, dtype=dtype)[:, 0]]

    found = local.norms(tensors, norm_type, device=torch.device("cpu"))

    want = torch.stack([torch.linalg.vector_norm(t.double(), norm_type) for t in tensors])
    torch.testing.assert_close(found, want, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("numel", [600, 5000])
def test_what_float32_cannot_hold(numel: int) -> None:
    """Squares of bfloat16 numbers overflow float32, in a short tensor and in a long one."""
    huge = torch.full((numel,), 3e19, dtype=torch.bfloat16)

    found = local.norms([huge], 2.0, device=torch.device("cpu"))

    assert found.item() == pytest.approx(huge.double().norm().item(), rel=1e-12)
