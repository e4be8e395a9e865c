"""The Triton kernels against float64, on a GPU where there is one, else in Triton's interpreter.

The interpreter computes what the kernels say, on the CPU, one program after another. It shows
nothing about speed. With bfloat16 it rounds by truncation and takes subnormal numbers for 0, which
a GPU does not.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distclip.kernels import measuring as local
from distclip.kernels.device import changes, multi_tensor, tables
from distclip.kernels.device import norms as accelerated
from tests.helpers.processes import python, well

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = (1.0, 2.0, math.inf)
CHUNK = tables.BLOCK * tables.TURNS


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """Without the interpreter (tests/conftest.py asks for it) the kernels don't run on the CPU."""
    interpreting = importlib.import_module("triton").knobs.runtime.interpret
    assert ON_GPU or interpreting, "TRITON_INTERPRET=1 must be set before Triton is imported"


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were the accelerator."""
    if not ON_GPU:
        monkeypatch.setattr(multi_tensor, "is_usable", lambda device: True)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def awkward(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that measuring goes wrong on easily, by name."""
    largest, info = torch.finfo(dtype).max, torch.finfo(dtype)
    long = drawn(3 * CHUNK, dtype=dtype)
    small = 1e-30 if dtype is not torch.float16 else 6e-8
    cases = {
        "one": drawn(1, dtype=dtype),
        "scalar": drawn(1, dtype=dtype)[0],
        "long": long[: 2 * CHUNK + 5],
        "misaligned": long[1 : CHUNK + 77],
        "misaligned by three": long[3 : 2 * CHUNK + 3],
        "short": drawn(7, dtype=dtype),
        "transposed": drawn(33, 65, dtype=dtype).t(),
        "zeros": torch.zeros(CHUNK + 1, dtype=dtype, device=DEVICE),
        "squares overflow": torch.full((300,), largest / 2, dtype=dtype, device=DEVICE),
        "squares underflow": torch.full((5000,), small, dtype=dtype, device=DEVICE),
        "subnormal": torch.full((40,), info.smallest_normal / 4, dtype=dtype, device=DEVICE),
        "one large": torch.cat(
            [torch.full((CHUNK,), info.eps, dtype=dtype), torch.ones(1, dtype=dtype)]
        ).to(DEVICE),
        "nan": torch.tensor([1.0, math.nan, 2.0], dtype=dtype, device=DEVICE),
        "inf": torch.tensor([1.0, -math.inf, 2.0], dtype=dtype, device=DEVICE),
        "nan and inf": torch.tensor([math.inf, math.nan], dtype=dtype, device=DEVICE),
    }
    if dtype is torch.bfloat16 and not ON_GPU:
        del cases["subnormal"]
    return cases


def true_norm(tensor: Tensor, norm_type: float, bound: float | None = None) -> Tensor:
    wide = tensor.double().cpu()
    wide = wide if bound is None else wide.clamp(-bound, bound)
    return torch.linalg.vector_norm(wide, norm_type)


def assert_near(have: Tensor, want: Tensor, names: Any = None) -> None:
    """To 1e-6 relative, with NaN and inf just where they should be."""
    assert have.dtype is torch.float64
    error = (have.cpu() - want).abs() / want.clamp(min=1e-300)
    same = (have.cpu() == want) | (have.cpu().isnan() & want.isnan())
    bad = ~(same | (error < 1e-6))
    assert not bad.any(), (
        have[bad.to(DEVICE)],
        want[bad],
        names and [names[i] for i in bad.nonzero()],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", ORDERS)
def test_norms(dtype: torch.dtype, norm_type: float) -> None:
    cases = awkward(dtype)
    have = multi_tensor.norms(list(cases.values()), norm_type)
    want = torch.stack([true_norm(tensor, norm_type) for tensor in cases.values()])
    assert_near(have, want, list(cases))


def test_norms_of_all_dtypes_in_one_table() -> None:
    tensors = [tensor for dtype in DTYPES[::-1] for tensor in awkward(dtype).values()][::3]
    have = multi_tensor.norms(tensors, 2.0)
    assert_near(have, torch.stack([true_norm(tensor, 2.0) for tensor in tensors]))


@pytest.mark.parametrize("norm_type", ORDERS)
def test_norms_after_clamping(norm_type: float) -> None:
    cases = awkward(torch.float32)
    bounds = [None if number % 3 == 0 else 0.5**number for number in range(len(cases))]
    have = multi_tensor.norms(list(cases.values()), norm_type, bounds)
    pairs = zip(cases.values(), bounds, strict=True)
    assert_near(have, torch.stack([true_norm(t, norm_type, b) for t, b in pairs]), list(cases))


def matrices(dtype: torch.dtype) -> list[Tensor]:
    long = drawn(64 * 1032, dtype=dtype)
    small = 1e-30 if dtype is not torch.float16 else 6e-8
    return [
        drawn(9, 15, dtype=dtype),
        drawn(5, 1, dtype=dtype),
        long[8 : 8 + 64 * 130].view(64, 130),
        long[1 : 1 + 50 * 128].view(50, 128),
        long[:2064].view(2, 1032),
        drawn(3, 5000, dtype=dtype),
        drawn(2, tables.WIDEST_ROW + 3, dtype=dtype),
        drawn(1, 128, dtype=dtype),
        torch.full((2, 300), torch.finfo(dtype).max / 2, dtype=dtype, device=DEVICE),
        torch.full((3, 40), small, dtype=dtype, device=DEVICE),
        torch.tensor(
            [[0.0, 0, 0], [1, 2, math.nan], [1, math.inf, 1], [math.nan, -math.inf, 0], [3, 4, 0]],
            dtype=dtype,
            device=DEVICE,
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", ORDERS)
def test_row_norms(dtype: torch.dtype, norm_type: float) -> None:
    given = matrices(dtype)
    want = [torch.linalg.vector_norm(m.double().cpu(), norm_type, dim=1) for m in given]
    assert_near(multi_tensor.row_norms(given, norm_type), torch.cat(want))


def scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    """In float32, rounded once; in the interpreter bfloat16 is cut off."""
    exact = tensor.dtype is torch.float64
    product = tensor.to(torch.float64 if exact else torch.float32)
    product = product * factor.to(product.dtype)
    if tensor.dtype is torch.bfloat16 and not ON_GPU:
        product = (product.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return product.to(tensor.dtype)


def assert_same(have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scale(dtype: torch.dtype) -> None:
    before = list(awkward(dtype).values())
    factors = torch.rand(len(before), dtype=torch.float64).to(DEVICE)
    factors[2], factors[3] = 1.0, 0.0
    have = [tensor.clone() for tensor in before]
    multi_tensor.scale_(have, factors)
    for one, tensor, factor in zip(have, before, factors, strict=True):
        assert_same(one, tensor if factor == 1.0 else scaled(tensor, factor))
    alike = [tensor.clone() for tensor in before]
    multi_tensor.scale_(alike, factors[:1].expand(len(before)))
    for one, tensor in zip(alike, before, strict=True):
        assert_same(one, scaled(tensor, factors[0]))


def test_neighbours_of_a_misaligned_tensor_stay() -> None:
    whole = drawn(CHUNK + 100, dtype=torch.float32)
    kept = whole.clone()
    multi_tensor.scale_([whole[3:-5]], torch.full((1,), 0.5, dtype=torch.float64, device=DEVICE))
    assert_same(whole[3:-5], kept[3:-5] * 0.5)
    assert_same(whole[:3], kept[:3])
    assert_same(whole[-5:], kept[-5:])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_zero(dtype: torch.dtype) -> None:
    before = list(awkward(dtype).values())
    flags = torch.arange(len(before), device=DEVICE) % 2 == 0
    have = [tensor.clone() for tensor in before]
    multi_tensor.zero_(have, flags)
    for one, tensor, flag in zip(have, before, flags, strict=True):
        assert_same(one, torch.zeros_like(tensor) if flag else tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scale_rows(dtype: torch.dtype) -> None:
    before = matrices(dtype)
    factors = torch.rand(sum(len(m) for m in before), dtype=torch.float64).to(DEVICE)
    factors[::3] = 1.0
    have = [matrix.clone() for matrix in before]
    multi_tensor.scale_rows_(have, factors)
    for one, matrix, some in zip(
        have, before, factors.split([len(matrix) for matrix in before]), strict=True
    ):
        want = torch.where(some[:, None] == 1.0, matrix, scaled(matrix, some[:, None]))
        assert_same(one, want)


@pytest.mark.parametrize("factor", [1.2e-38, 1e-38, 1e-40, 1e-46, 1e-60])
def test_a_factor_that_is_no_normal_float32(factor: float) -> None:
    """The product is one."""
    before = torch.tensor([[1e30, -3e38], [1e25, 1.0]], device=DEVICE)
    want = (before.double() * factor).float()
    factors = torch.full((2,), factor, dtype=torch.float64, device=DEVICE)
    whole, rows = [before.clone()], [before.clone()]
    multi_tensor.scale_(whole, factors[:1])
    multi_tensor.scale_rows_(rows, factors)
    for have in (*whole, *rows):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=2e-45)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Lowest and highest address of every load, of what the mask lets through."""
    if ON_GPU:
        pytest.skip("only the interpreter can be watched")
    from triton.runtime import interpreter

    found: list[tuple[int, int]] = []
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def watched(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = pointers.data[mask.data]
        if addresses.size:
            found.append((int(addresses.min()), int(addresses.max())))
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", watched)
    return found


def test_what_is_not_scaled_is_not_read(read: list[tuple[int, int]]) -> None:
    kept, changed = drawn(CHUNK, dtype=torch.float32), drawn(300, dtype=torch.float32)
    rows = drawn(64, 256, dtype=torch.float32)

    def touches(tensor: Tensor) -> bool:
        first = tensor.data_ptr()
        last = first + tensor.nbytes
        return any(low < last and high >= first for low, high in read)

    multi_tensor.scale_([kept, changed], torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert touches(changed)
    assert not touches(kept)
    factors = torch.ones(64, dtype=torch.float64)
    factors[40] = 0.5
    multi_tensor.scale_rows_([rows], factors)
    assert touches(rows[40])
    assert not touches(rows[:40])
    assert not touches(rows[41:])
    multi_tensor.zero_([kept, changed], torch.tensor([True, False]))
    assert not touches(kept)  # written only


@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("norm_type", [*ORDERS, 3.0])
@pytest.mark.parametrize("bounds", [None, 0.5])
def test_tensors_that_no_kernel_takes_among_others(norm_type: float, bounds: float | None) -> None:
    gaps = drawn(20, 30, dtype=torch.float32)[:, ::2]
    wide = drawn(70, dtype=torch.float64) * 1e200
    tensors = [drawn(40, dtype=torch.float32), gaps, wide, drawn(9, 5, dtype=torch.bfloat16)]
    limits = None if bounds is None else [bounds, None, bounds, bounds]
    have = accelerated.norms(tensors, norm_type, limits)
    each = np.array([math.inf if limit is None else limit for limit in limits or [None] * 4])
    hosted = [t.cpu() for t in tensors]
    want, _ = local.clamped_norms(hosted, norm_type, each, device=torch.device("cpu"), raw=False)
    assert_near(have, want)
    rows = [tensor.reshape(-1, 5) for tensor in tensors]
    rows[0] = drawn(8, 10, dtype=torch.float32)[:, ::2]
    have = accelerated.row_norms(rows, norm_type, limits)
    want = local.unit_norms(
        [each.cpu() for each in rows],
        [(0,)] * len(rows),
        [len(each) for each in rows],
        norm_type,
        each,
        device=torch.device("cpu"),
    )
    assert_near(have, want)


@pytest.mark.usefixtures("usable")
def test_scaling_picks_a_way_for_each_tensor() -> None:
    gaps = drawn(20, 30, dtype=torch.float32)[:, ::2]
    tensors = [drawn(40, dtype=torch.float32), gaps, drawn(7, dtype=torch.complex64)]
    kept = [tensor.clone() for tensor in tensors]
    factors = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64, device=DEVICE)
    changes.scale_(tensors, factors)
    for one, before, factor in zip(tensors, kept, (0.5, 0.25, 0.125), strict=True):
        assert_same(one, before * factor)
    changes.scale_(tensors, factors[:1].expand(3))
    for one, before, factor in zip(tensors, kept, (0.25, 0.125, 0.0625), strict=True):
        assert_same(one, before * factor)


class TestUsable:
    """When the kernels are left alone."""

    device = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def _anew(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.delenv(multi_tensor.TRITON_SWITCH, raising=False)
        multi_tensor.is_usable.cache_clear()
        yield
        multi_tensor.is_usable.cache_clear()

    def test_where_one_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(multi_tensor, "_try", lambda device: None)
        assert multi_tensor.is_usable(self.device)

    def test_not_elsewhere(self) -> None:
        assert not multi_tensor.is_usable(torch.device("cpu"))

    def test_not_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(multi_tensor, "_try", lambda device: None)
        monkeypatch.setenv(multi_tensor.TRITON_SWITCH, "0")
        assert not multi_tensor.is_usable(self.device)

    def test_not_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(multi_tensor, "_try", lambda device: None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not multi_tensor.is_usable(self.device)

    def test_one_that_fails_is_told_of_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(device: torch.device) -> None:
            raise RuntimeError("no compiler")

        monkeypatch.setattr(multi_tensor, "_try", fail)
        with pytest.warns(RuntimeWarning, match=r"no compiler.*DISTCLIP_TRITON=0"):
            assert not multi_tensor.is_usable(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not multi_tensor.is_usable(self.device)


def test_compiled_kernels_read_16_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for an H100, which takes no GPU: a lost alignment costs a half of the speed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    well(python("-m", "tests.helpers.compiled"))
