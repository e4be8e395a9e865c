"""The compiled loops over host tensors, against numpy in float64; and the way without them."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distclip.kernels import changing, measuring
from distclip.kernels.host import blocks, choosing, compiler
from distclip.kernels.host import threads as host_threads
from tests.helpers.processes import python, well
from tests.helpers.ranks import everyones

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORDERS = [1.0, 2.0, math.inf]
SIZES = [0, 1, 3, 7, 8, 31, 32, 33, 64, 65, 1000, 4096, 70001]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("compiled")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(tensor: Tensor, order: float, bound: float | None = None) -> float:
    values = np.abs(tensor.detach().double().numpy().ravel())
    if bound is not None:
        limit = float(torch.tensor(bound, dtype=tensor.dtype))
        values = np.where(values > limit, limit, values)
    if not values.size:
        return 0.0
    if math.isinf(order):
        return float(values.max())
    largest = values.max()
    if largest == 0 or not math.isfinite(largest):
        return float(largest)
    return float(largest * math.fsum((values / largest) ** order) ** (1 / order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bound", [None, 0.3, 0.0, 1e300])
def test_norms(dtype: torch.dtype, order: float, bound: float | None) -> None:
    tensors: list[Tensor | None] = [drawn(size, dtype=dtype, seed=size) for size in SIZES]
    tensors += [drawn(40, 50, dtype=dtype).t(), drawn(6, 5, 8, dtype=dtype)[:, ::2], None]
    tensors += [drawn(30, 70, dtype=dtype)[3:9, 5:60:3], drawn(9, dtype=dtype).expand(4, 9)]
    tensors += [drawn(4, 6, 10, 3, dtype=dtype)[::2, 1:5, ::3], torch.tensor(-2.5, dtype=dtype)]
    raw = measuring.norms(tensors, order, device=CPU)
    wanted = [0.0 if t is None else reference(t, order) for t in tensors]
    assert raw.dtype is torch.float64
    np.testing.assert_allclose(raw.numpy(), wanted, rtol=4e-12, atol=0.0)
    if bound is None:
        return
    bounds = np.array([math.inf if n % 5 == 3 else bound for n in range(len(tensors))])
    found, beside = measuring.clamped_norms(tensors, order, bounds, device=CPU, raw=False)
    limits = [None if b > torch.finfo(dtype).max else b for b in bounds.tolist()]
    pairs = zip(tensors, limits, strict=True)
    clamped = [0.0 if t is None else reference(t, order, limit) for t, limit in pairs]
    assert found.dtype is torch.float64
    np.testing.assert_allclose(found.numpy(), clamped, rtol=4e-12, atol=0.0)
    assert beside is not None
    assert torch.equal(beside, raw) or not compiler.compiled_kinds()
    np.testing.assert_allclose(beside.numpy(), raw.numpy(), rtol=4e-12, atol=0.0)
    # What no element of exceeds its bound is measured alike, to the last bit.
    largest = [0.0 if t is None else float(t.abs().max()) if t.numel() else 0.0 for t in tensors]
    for number, (limit, most) in enumerate(zip(limits, largest, strict=True)):
        assert (found[number] == beside[number]) or (limit is not None and most > limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_units(dtype: torch.dtype, order: float) -> None:
    cases = [
        (drawn(7, 33, dtype=dtype), (0,)),
        (drawn(4, 5, 6, dtype=dtype), (0,)),
        (drawn(4, 5, 6, dtype=dtype), (0, 1)),
        (drawn(4, 5, 6, dtype=dtype), (1,)),
        (drawn(50, 20, dtype=dtype).t(), (0,)),
        (drawn(50, 20, dtype=dtype), (1,)),
        (drawn(11, dtype=dtype), ()),
        (drawn(3, 0, dtype=dtype), (0,)),
        (drawn(0, 3, dtype=dtype), (0,)),
    ]
    tensors: list[Tensor | None] = [tensor for tensor, _ in cases]
    dims = [chosen for _, chosen in cases]
    counts = [math.prod(t.shape[d] for d in chosen) for t, chosen in cases]
    wanted = [reference(row, order) for each in cases for row in rows_of(*each)]
    for bound in (None, 0.4):
        bounds = None if bound is None else np.full(len(cases), bound)
        if bound is not None:
            wanted = [reference(row, order, bound) for each in cases for row in rows_of(*each)]
        found = measuring.unit_norms(tensors, dims, counts, order, bounds, device=CPU)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=0.0)
    alone = measuring.unit_norms([cases[0][0], None], [(0,), (0,)], [7, 2], order, device=CPU)
    assert len(alone) == 9
    assert not alone[7:].any()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_pairs(dtype: torch.dtype, compiled: bool) -> None:
    tensors: list[Tensor] = [drawn(7, 33, dtype=dtype), drawn(5, 8, dtype=dtype).t(), drawn(9)]
    for each in tensors[:2]:
        each.mul_(1.0 + 2.0j)
    conjugate = drawn(6, dtype=dtype).conj()
    values = [each.to(torch.complex128).abs() for each in (*tensors, conjugate)]
    assert (choosing.choose(tensors, pairs=True) is not None) == compiled
    if compiled:
        assert choosing.choose(tensors, pairs=True).positions is None  # type: ignore[union-attr]
    for order in ORDERS:
        found = measuring.norms([*tensors, conjugate], order, device=CPU)
        wanted = [reference(each, order) for each in values]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
        dims, counts = [(0,)] * 2, [7, 8]
        found = measuring.unit_norms(tensors[:2], dims, counts, order, device=CPU)
        wanted = [reference(row, order) for each in values[:2] for row in each]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    before = [each.clone() for each in tensors]
    factors = torch.linspace(0.1, 0.7, 15, dtype=torch.float64)
    changing.scale_units_(tensors[:2], factors, [(0,)] * 2, [7, 8])
    changing.scale_(tensors[2:], torch.tensor([0.25], dtype=torch.float64))
    torch.testing.assert_close(tensors[0], before[0] * factors[:7, None].to(dtype))
    torch.testing.assert_close(tensors[1], before[1] * factors[7:, None].to(dtype))
    assert torch.equal(tensors[2], before[2] * 0.25)
    assert compiled is False or tensors[0]._version > before[0]._version


def test_units_with_channels_last(compiled: bool) -> None:
    tensor = drawn(6, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    chosen = choosing.choose([tensor], unit_dims=[(0,)], counts=[6])
    assert (chosen is not None) == compiled
    found = measuring.unit_norms([tensor], [(0,)], [6], 2.0, device=CPU)
    np.testing.assert_allclose(found.numpy(), [reference(row, 2.0) for row in tensor], rtol=1e-12)


def rows_of(tensor: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
    others = [dim for dim in range(tensor.dim()) if dim not in dims]
    count = math.prod(tensor.shape[dim] for dim in dims)
    return list(
        tensor.permute(*dims, *others).reshape(count, math.prod(tensor.shape[d] for d in others))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("odd", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_what_is_not_finite_shows(dtype: torch.dtype, order: float, odd: float, place: int) -> None:
    tensor = drawn(100, dtype=dtype)
    tensor[place] = odd
    (found,) = measuring.norms([tensor], order, device=CPU).tolist()
    assert math.isnan(found) if math.isnan(odd) else found == math.inf
    bounded, _ = measuring.clamped_norms([tensor], order, np.array([0.5]), device=CPU, raw=False)
    found = bounded.item()
    assert math.isnan(found) == math.isnan(odd)
    (found, *_) = measuring.unit_norms([tensor[:, None]], [()], [1], order, device=CPU).tolist()
    assert math.isnan(found) if math.isnan(odd) else found == math.inf


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 1e-45),
        (torch.float32, 3e38),
        (torch.float16, 6e-8),
        (torch.float16, 65504.0),
        (torch.bfloat16, 1e-40),
        (torch.bfloat16, 3e38),
        (torch.float64, 5e-324),
        (torch.float64, 1e-200),
        (torch.float64, 1e305),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_the_ends_of_a_dtype(dtype: torch.dtype, value: float, order: float) -> None:
    tensor = torch.full((100,), value, dtype=dtype)
    found = measuring.norms([tensor, drawn(5)], order, device=CPU)
    np.testing.assert_allclose(float(found[0]), reference(tensor, order), rtol=1e-12)
    rows = measuring.unit_norms([tensor.view(4, 25)], [(0,)], [4], order, device=CPU)
    np.testing.assert_allclose(rows.numpy(), [reference(tensor[:25], order)] * 4, rtol=1e-12)


@pytest.mark.usefixtures("threads")
def test_large_tensors_on_any_number_of_threads_give_the_same_bits(compiled: bool) -> None:
    tensors = [drawn(blocks.PART), drawn(3 * blocks.PART + 17), drawn(5), drawn(300, 4096)]
    matrices = [drawn(700, 2048), drawn(1, 2 * blocks.PART), drawn(2 * blocks.PART, 1)]
    counts = [len(matrix) for matrix in matrices]
    found = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        norms = measuring.norms(tensors, 2.0, device=CPU)
        units = measuring.unit_norms(matrices, [(0,)] * 3, counts, 2.0, device=CPU)
        scaled = [each.clone() for each in (*tensors, *matrices)]
        changing.scale_(scaled, torch.linspace(0.1, 0.7, 7, dtype=torch.float64))
        found.append((norms, units, *scaled))
    if compiled:
        assert all(
            torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True)
        )
    wanted = [reference(each, 2.0) for each in tensors]
    np.testing.assert_allclose(found[0][0].numpy(), wanted, rtol=1e-12)
    wanted = [reference(row, 2.0) for matrix in matrices[:2] for row in matrix]
    np.testing.assert_allclose(found[0][1][:701].numpy(), wanted, rtol=1e-12)


def test_small_tensors_are_not_shared_out_between_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waking another thread takes longer than reading 288 x 4,096 or 2,000 x 1,024 numbers."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    shares: list[tuple[int, int]] = []

    def loop(address: int, first: int, last: int, values: int) -> None:
        shares.append((first, last))

    for count, numel, threads in ((288, 4096, 1), (2000, 1024, 1), (144, 262_144, 7), (20, 0, 1)):
        table = blocks.table_of_contiguous([blocks.Kind.FLOAT32] * count, [numel] * count)
        shares.clear()
        host_threads.run_blocks(loop, table, 0)
        assert len(shares) == threads
        assert min(shares)[0] == 0
        assert max(shares)[1] == count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.5, 0.3, 1.0, 1e-3, 2.0])
def test_multiplying(dtype: torch.dtype, factor: float, compiled: bool) -> None:
    tensors = [drawn(size, dtype=dtype) for size in SIZES if size]
    tensors += [drawn(40, 50, dtype=dtype).t(), drawn(30, 70, dtype=dtype)[3:9, 5:60:3]]
    before = [tensor.clone() for tensor in tensors]
    tensors[0].requires_grad_()
    versions = [tensor._version for tensor in tensors]
    with torch.no_grad():
        changing.scale_(tensors, torch.tensor(factor, dtype=torch.float64).expand(len(tensors)))
    for now, then, version in zip(tensors, before, versions, strict=True):
        wide = then.double() * factor
        # Rounded once. (torch itself rounds the factor to float32 first.)
        most = 0.51 if compiled else 1.51
        assert ((now.double() - wide).abs() <= most * spacing(wide, dtype)).all()
        assert factor == 1.0 or now._version > version
    each = torch.linspace(0.1, 1.0, len(before), dtype=torch.float64)
    changing.scale_(before, each)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny))[1].double() - 1
    return torch.exp2(exponent) * info.eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiplying_units(dtype: torch.dtype) -> None:
    cases = [(drawn(7, 33, dtype=dtype), (0,)), (drawn(4, 5, 6, dtype=dtype), (0, 1))]
    cases += [(drawn(50, 20, dtype=dtype).t(), (0,)), (drawn(4, 5, 6, dtype=dtype), (1,))]
    cases += [(drawn(4, 5, 6, dtype=dtype)[:, ::2, ::2], (0, 2))]
    counts = [math.prod(t.shape[d] for d in dims) for t, dims in cases]
    factors = [torch.rand(count, dtype=torch.float64) for count in counts]
    factors[0][2:5] = 1.0
    before = [tensor.clone() for tensor, _ in cases]
    changing.scale_units_([t for t, _ in cases], torch.cat(factors), [d for _, d in cases], counts)
    for (now, dims), then, each in zip(cases, before, factors, strict=True):
        shape = [size if dim in dims else 1 for dim, size in enumerate(now.shape)]
        wide = then.double() * each.view(shape)
        assert ((now.double() - wide).abs() <= 1.51 * spacing(wide, dtype)).all()
    assert torch.equal(cases[0][0][2:5], before[0][2:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0, 1e300])
def test_clamping(dtype: torch.dtype, bound: float) -> None:
    def made() -> list[Tensor]:
        tensors = [drawn(size, dtype=dtype) for size in (1, 33, 1000)]
        tensors += [drawn(40, 50, dtype=dtype).t()[::2], drawn(5, dtype=dtype)]
        tensors.append(drawn(70, dtype=dtype))
        for tensor in tensors[-2:]:  # in a vector, and beside them
            tensor[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, -largest]).to(dtype)
        return tensors

    largest = torch.finfo(dtype).max
    limit = torch.tensor(bound, dtype=torch.float64)
    wanted = [torch.clamp(t, -limit.to(dtype), limit.to(dtype)) for t in made()]
    alike = [bound] * (len(wanted) - 1)
    wanted[0] = made()[0]
    for bounds in ([math.inf, *alike], [math.inf, bound, *[limit] * (len(wanted) - 2)]):
        tensors = made()
        changing.clamp_(tensors, bounds)
        for now, then in zip(tensors, wanted, strict=True):
            assert torch.equal(now.nan_to_num(nan=7.0), then.nan_to_num(nan=7.0))
            assert torch.equal(now.signbit(), then.signbit())


def test_a_nan_of_any_payload_stays_one() -> None:
    odd = torch.tensor([2**63 - 1]).view(torch.float64)  # rounding would carry its payload away
    for dtype in DTYPES:
        tensor = torch.ones(40, dtype=dtype)
        changing.scale_([tensor], odd)
        assert tensor.isnan().all()


def test_tables_follow_what_changes(compiled: bool) -> None:
    tables = choosing.PlanTables()
    for sizes, dtype in (
        ((3, 5), torch.float32),
        ((3, 5), torch.bfloat16),
        ((5, 3, 2), torch.float32),
    ):
        tensors = [drawn(size, dtype=dtype, seed=size) for size in sizes]
        for _ in range(2):
            tensors = [tensor.clone() for tensor in tensors]
            found = measuring.norms(tensors, 2.0, device=CPU, tables=tables, what="x")
            wanted = [reference(tensor, 2.0) for tensor in tensors]
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_many_threads_may_measure_at_once() -> None:
    tensors = [[drawn(size, seed=seed) for size in SIZES] for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: measuring.norms(each, 2.0, device=CPU), tensors * 20))
    for each, norms in zip(tensors * 20, found, strict=True):
        assert torch.equal(norms, measuring.norms(each, 2.0, device=CPU))


@pytest.mark.ranks(4)
def test_ranks_that_compile_at_once_agree_to_the_bit() -> None:
    tensors = [drawn(size, seed=size) for size in SIZES]
    compiler.function.cache_clear()
    compiler.compiled_kinds.cache_clear()
    dist.barrier()
    norms = measuring.norms(tensors, 2.0, device=CPU)
    assert compiler.function("squares") is not None
    assert all(torch.equal(norms, each) for each in everyones(norms))
    wanted = [reference(tensor, 2.0) for tensor in tensors]
    np.testing.assert_allclose(norms.numpy(), wanted, rtol=1e-12)


WITHOUT = """
import sys, warnings
sys.modules["llvmlite"] = None
import torch, distclip
from distclip.kernels.host import compiler
model = torch.nn.Linear(3, 3)
model(torch.ones(2, 3)).sum().backward()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        norm = distclip.clip_grad_norm_(model.parameters(), 1e9)
wanted = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
assert abs(float(norm) / float(wanted) - 1) < 1e-6, (norm, wanted)
print(len(caught), *{str(each.message) for each in caught})
"""


def run(code: str, **environment: str) -> str:
    return well(python("-c", code, **environment))


def test_without_the_compiler_it_says_so_once(compiled: bool) -> None:
    if compiled:
        said = run(WITHOUT)
        assert said.startswith("1 ")
        assert "compiled loops for host tensors cannot be used" in said
    else:
        assert run(WITHOUT, **{compiler.COMPILED_SWITCH: "0"}).split() == ["0"]


def test_importing_distclip_loads_no_compiler() -> None:
    code = "import sys, distclip; print([m for m in sys.modules if 'llvmlite' in m])"
    assert run(code).strip() == "[]"


def test_one_odd_tensor_among_many_is_looked_at_once(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layout is found out anew where it changes, and whatever moves is found again."""
    looked: list[object] = []
    real = choosing._select
    monkeypatch.setattr(choosing, "_select", lambda *a: looked.append(a) or real(*a))
    tables = choosing.PlanTables()
    wide = drawn(30, 70)
    odd = [wide[3:9, 5:60:3], drawn(7, dtype=torch.complex64), wide[:9, ::2], wide.t()[::2, 1:]]
    for number, each in enumerate([*odd, odd[1].conj()]):
        for step in range(3):
            tensors: list[Tensor | None] = [drawn(9, seed=step), None, each.clone(), drawn(5)]
            if not each.is_complex():
                tensors[2] = torch.empty_like(wide.t() if number == 3 else wide)
                tensors[2] = tensors[2].as_strided(each.shape, each.stride()).copy_(each)
            elif each.is_conj():
                tensors[2] = each.resolve_conj().conj().clone().conj()
            found = measuring.norms(tensors, 2.0, device=CPU, tables=tables, what="odd")
            wanted = [0.0 if t is None else reference(t.abs(), 2.0) for t in tensors]
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
            assert len(looked) == compiled * (number + 1), (number, step)
