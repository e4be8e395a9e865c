"""Binary exponents counted by the compiled loops and without them, against frexp."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distclip import GradClipper, policies
from distclip.common.exponents import of_row
from distclip.kernels import exponents, measuring
from distclip.kernels.exponents import Counting
from distclip.kernels.host import blocks, compiler, kernels
from distclip.statistics.measurement import measure_locally
from distclip.statistics.request import Request
from distclip.statistics.scratch import Scratch
from distclip.statistics.survey import Survey
from tests.helpers.exponents import oracle, shown, wide

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CPU = torch.device("cpu")


def counted(tensors: Sequence[Tensor | None], order: float | None = None) -> list[Any]:
    """What is counted of each, None for one that is not there; after norms of this order."""
    counting = Counting(len(tensors), CPU)
    if order is not None:
        norms = measuring.norms(tensors, order, device=CPU, counting=counting)
        assert torch.equal(norms, measuring.norms(tensors, order, device=CPU))
    rows = counting.rest(tensors, None, None).numpy()
    found: list[Any] = []
    for tensor, row in zip(tensors, rows, strict=True):
        if tensor is None:
            assert not row.any()
            found.append(None)
            continue
        dtype = tensor.real.dtype if tensor.is_complex() else tensor.dtype
        name = str(dtype if dtype in DTYPES else torch.float32).removeprefix("torch.")
        assert row[list(exponents.rows.RANGES).index(name)] == row[:4].sum()
        found.append(shown(of_row(name, row)))
    return found


@pytest.mark.parametrize("order", [None, 1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("compiled")
def test_every_number_of_a_dtype(dtype: torch.dtype, order: float | None) -> None:
    """Whole vectors, rests, gaps, blocks of many rows; and tensors that no loop takes."""
    values = wide(dtype, 20_011)
    forms = [values, values[:20_000].view(-1, 10).t(), values[::3], values[:0], values[:1].view(())]
    forms += [values[1:32], values[1:34], values[3:9], values[:1200].view(30, 40)[3:17, 5:9]]
    forms += [values[:480].view(4, 5, 6, 4)[::2, 1:3, ::3], values[:12].expand(5, 12)]
    if dtype.itemsize == 2:
        forms.append(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype))
    forms += [torch.zeros(100, dtype=dtype), torch.ones(100, dtype=dtype)]
    finite = [each.nan_to_num(1.0, 1.0, 1.0) for each in forms]  # whose norms can be compared
    assert counted(finite, order) == [oracle(each) for each in finite]
    assert counted(forms) == [oracle(each) for each in forms]


@pytest.mark.parametrize("order", [None, 1.0, 2.0])
@pytest.mark.usefixtures("compiled")
def test_tensors_of_all_kinds_in_one_call(order: float | None) -> None:
    parts = torch.complex(wide(torch.float32), wide(torch.float32).flip(0)).nan_to_num(1, 1, 1)
    small = torch.tensor([0.0, 0.5, 448.0, 2.0**-9]).to(torch.float8_e4m3fn)
    tensors: list[Tensor | None] = [None, parts, parts.conj(), parts[::2], None]
    tensors += [wide(dtype).nan_to_num(1.0, 1.0, 1.0) for dtype in DTYPES]
    if order is None:
        tensors.append(small)
    want = [
        None if t is None
        else oracle(torch.view_as_real(t.resolve_conj())) if t.is_complex()
        else oracle(t.float() if t is small else t)
        for t in tensors
    ]  # fmt: skip
    assert counted(tensors, order) == want


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads() -> None:
    """In several blocks a tensor, which lie on several threads."""
    tensors = [wide(dtype, 1_200_001) for dtype in DTYPES]
    tensors.append(tensors[0].view(-1)[:1_200_000].view(1000, -1).t())
    want = [oracle(each) for each in tensors]
    assert blocks.PART < 1_200_001
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        assert counted(tensors) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("compiled")
def test_flushing_subnormals_changes_nothing(dtype: torch.dtype) -> None:
    values = wide(dtype)
    want = [oracle(values)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        assert counted([values]) == want
    finally:
        torch.set_flush_denormal(False)


def test_sorted_as_on_an_accelerator_it_is_the_same() -> None:
    values = torch.randint(32, (10_000,), dtype=torch.int16)
    assert torch.equal(exponents.by_sorting(values, 32), torch.bincount(values, minlength=32))
    assert exponents.by_sorting(values[:0], 4).tolist() == [0] * 4


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The loops that ran, and over how many elements."""
    found: list[tuple[str, int]] = []
    run = kernels._run

    def watched(name: str, table: blocks.Blocks, *arguments: Any) -> None:
        found.append((name, table.elements))
        run(name, table, *arguments)

    monkeypatch.setattr(kernels, "_run", watched)
    return found


@pytest.mark.skipif(not compiler.compiled_kinds(), reason="the compiled loops are switched off")
@pytest.mark.parametrize(
    ("policy", "loops"),
    [
        (policies.measure(), ["squares_counted"]),
        (policies.measure(norm_type=1.0), ["magnitudes_counted"]),
        (policies.measure(norm_type=math.inf), ["largest_counted"]),
        (policies.agc(0.1), ["roots_counted", "squares_counted"]),
    ],
    ids=str,
)
def test_gradients_are_read_once(policy: Any, loops: list[str], ran: list[tuple[str, int]]) -> None:
    shapes = [(40, 30), (30,), (7, 5, 3)]
    parameters = [(str(n), nn.Parameter(torch.ones(shape))) for n, shape in enumerate(shapes)]
    clipper = GradClipper(parameters, policy, exponents=2)
    for step in range(2):
        ran.clear()
        for number, (_, parameter) in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape) * 0.1**number
        clipper.clip_()
        counting = [each for each in ran if each[0].endswith(blocks.COUNTED)]
        if step == 1:
            assert counting == []
            continue
        assert [name for name, _ in counting] == loops
        assert sum(elements for _, elements in counting) == 40 * 30 + 30 + 7 * 5 * 3
        if not hasattr(policy, "unit"):  # which reads weights, too, and multiplies
            assert ran == counting


@pytest.mark.usefixtures("compiled")
def test_a_sparse_gradient_counts_its_zeros() -> None:
    table = nn.Embedding(50, 8, sparse=True)
    table(torch.tensor([3, 3, 7])).sum().backward()
    other = nn.Parameter(torch.ones(5))
    other.grad = torch.full((5,), 0.25)
    parameters = [("table", table.weight), ("other", other)]
    report = GradClipper(parameters, policies.measure(), exponents=1).clip_()
    found = report.exponents["table"]
    assert (found.zero, found.elements) == (48 * 8, 50 * 8)
    assert found.counts[1 - found.lowest] == 8  # 2.0, of the row that is there twice
    assert report.exponents["other"].counts[-2 - found.lowest] == 5


def test_a_replica_counts_its_share() -> None:
    weight = nn.Parameter(torch.ones(6))
    weight.grad = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, math.nan])
    clipper = GradClipper([("w", weight)], policies.measure())
    plan = clipper.plan
    plan = replace(plan, pieces=tuple(piece.numbered(0, 0.5) for piece in plan.pieces))
    survey = Survey.of(plan, Request((2.0,)).with_exponents())
    found = measure_locally(survey, Scratch()).exponents
    assert found is not None
    assert torch.equal(found * 2, exponents.counts(weight.grad).unsqueeze(0))
