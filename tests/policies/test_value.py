"""``value`` against the outputs of optax and torch."""

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import policies
from distclip.kernels.bounds import bounds_held
from distclip.kernels.host import blocks, compiler, kernels
from tests.policies.golden import assert_golden, clip, parameters
from tests.sharded import shard, whole

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("maker", ["optax.clip|0.05", "torch.clip_grad_value_|0.05"])
def test_value(golden: dict[str, np.ndarray], maker: str) -> None:
    assert_golden(clip(golden, policies.value(0.05)), golden, maker, rtol=0.0)
    have = parameters(golden)
    distclip.clip_grad_value_(have.values(), 0.05)
    assert_golden(have, golden, maker, rtol=0.0)


BOUND = 0.3


def drawn(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of tensors far below the bound, below it but in norm, at it, above it, odd, and without."""
    values = [
        torch.full((3, 4), 1e-3),
        torch.full((40, 50), 0.9 * BOUND),
        torch.full((5,), BOUND),
        torch.tensor([BOUND * (1 + 2.0**-20), 0.0]),
        torch.linspace(-1.0, 1.0, 63).reshape(9, 7),
        torch.tensor([math.nan, 1.0, 0.1]),
        torch.tensor([math.inf, -math.inf, 1e-3]),
        torch.zeros(0, 4),
    ]
    found = [nn.Parameter(torch.zeros(each.shape, dtype=dtype)) for each in [*values, values[0]]]
    for parameter, value in zip(found, values, strict=False):
        parameter.grad = value.to(dtype)
    return found


def norm_of(gradient: torch.Tensor, order: float) -> float:
    values = gradient.double().flatten()
    return torch.linalg.vector_norm(values, order).item() if values.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_what_is_read_once_is_clamped_and_measured_as_ever(
    dtype: torch.dtype, order: float
) -> None:
    held = float(torch.tensor(BOUND, dtype=torch.float64).to(dtype))
    names = [f"p{number}" for number in range(9)]
    have, want = drawn(dtype), drawn(dtype)
    policy = policies.chain(policies.value(BOUND), policies.global_norm(math.inf, order))
    target = list(zip(names, have, strict=True))
    report = distclip.GradClipper(target, policy, on_nonfinite="pass").clip_()
    after = []
    for name, one, other in zip(names, have, want, strict=True):
        gradient = other.grad
        if gradient is None:
            assert one.grad is None
            after.append(0.0)
            continue
        raw = norm_of(gradient, order)
        assert report.parameter_norms[name] == pytest.approx(raw, rel=1e-12, nan_ok=True)
        gradient.clamp_(-held, held)
        assert torch.equal(one.grad.nan_to_num(7.0), gradient.nan_to_num(7.0))  # type: ignore[union-attr]
        after.append(norm_of(gradient, order))
    assert report._walked.after.tolist() == pytest.approx(after, rel=1e-12, nan_ok=True)
    changed = [
        not torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
        for one, two in zip(have, drawn(dtype), strict=True)
        if two.grad is not None and not two.grad.isnan().any()
    ]
    assert int((report._walked.clipped > 0).sum()) == sum(changed)


@pytest.mark.skipif(not compiler.compiled_kinds(), reason="the compiled loops are switched off")
def test_gradients_are_read_once_and_clamped_where_that_can_change_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No element is larger than the norm of its tensor."""
    parameters = [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))]
    clipper = distclip.GradClipper(parameters, policies.value(1.0))
    ran: list[str] = []
    clamped: list[list[float]] = []
    run = kernels._run

    def running(name: str, table: blocks.Blocks, addresses: Any, values: int) -> None:
        ran.append(name)
        if name == "clamp":
            clamped.append(list((ctypes.c_double * table.rows).from_address(values)))
        run(name, table, addresses, values)

    monkeypatch.setattr(kernels, "_run", running)
    parameters[0].grad, parameters[1].grad = torch.full((5,), 0.1), torch.full((3,), -0.5)
    clipper.clip_()
    assert (ran, clamped) == (["squares_clamped"], [])
    ran.clear()
    parameters[1].grad = torch.full((3,), -0.9)  # its norm exceeds the bound, no element does
    report = clipper.clip_()
    assert (ran, clamped) == (["squares_clamped", "clamp"], [[math.inf, 1.0]])
    assert report.clipped_fraction.item() == 0.0


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_under_a_loss_scale_the_bound_keeps_all_its_digits(scale: float) -> None:
    """A scaler's scale is a float32 number, and 0.1 is none."""
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    clipper = distclip.GradClipper([parameter], policies.value(0.1))
    parameter.grad = torch.tensor([0.3, -0.2, 0.05, 0.0], dtype=torch.float64) * scale
    want = parameter.grad.clamp(-0.1 * scale, 0.1 * scale)
    clipper.clip_before_step(torch.tensor(scale))
    assert torch.equal(parameter.grad, want)


def test_beside_complex_gradients_nothing_warns() -> None:
    """A warning is an error to some, and this one would come between two changes."""
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))]
    parameters[0].grad = torch.tensor([5.0, -5.0, 0.5])
    parameters[1].grad = torch.tensor([5.0 + 1.0j, 2.0j])
    named = list(zip("ab", parameters, strict=True))
    policy = policies.by_name({"a": policies.value(1.0)})
    distclip.GradClipper(named, policy).clip_()
    assert parameters[0].grad.tolist() == [1.0, -1.0, 0.5]
    assert parameters[1].grad.tolist() == [5.0 + 1.0j, 2.0j]


def test_a_bound_that_the_loss_scale_takes_beyond_float64_clamps_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0]) * 65536.0
    policy = policies.chain(policies.global_norm(1.0), policies.value(1e306))
    distclip.GradClipper([parameter], policy).clip_before_step(torch.tensor(65536.0))
    assert (parameter.grad / 65536.0).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_before_a_policy_of_units_the_report_has_the_norms_as_they_came(bound: float) -> None:
    """Of what is measured per row too; and where nothing is clamped, nothing counts as clipped."""
    weights = torch.randn(37, 21, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(torch.ones_like(weights))
    policy = policies.chain(policies.value(bound), policies.agc(1e6))
    clipper = distclip.GradClipper([("w", parameter)], policy)
    parameter.grad = weights.clone()
    report = clipper.clip_()
    want = weights.double().norm().item()
    assert report.parameter_norms["w"] == pytest.approx(want, rel=1e-12)
    clamped = weights.clamp(-bound, bound)
    assert torch.equal(parameter.grad, clamped)
    assert report.clipped_norm.item() == pytest.approx(clamped.double().norm().item(), rel=1e-6)
    assert report.clipped_fraction.item() == float(bound < 1.0)


LATE = {
    "at the end": policies.value(BOUND),
    "before a norm": policies.chain(policies.value(BOUND), policies.global_norm(0.1, math.inf)),
    "for some": policies.by_name({"*weight": policies.value(0.2)}, policies.value(BOUND)),
    "of each": policies.chain(policies.value(0.9), policies.value(BOUND)),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "mixed"])
def test_the_largest_element_after_a_late_clamp_is_the_bound_as_its_dtype_holds_it(
    kind: str,
) -> None:
    """0.3 is 0.30078125 in bf16: the norm in the report, and what a later policy decides on."""
    for label, late in LATE.items():
        values = whole(kind, scale=100.0)
        model = shard("fsdp2", values)
        model.set_gradients(values.gradients)
        first = policies.global_norm(1.0, math.inf)
        report = distclip.GradClipper(model.named(), policies.chain(first, late)).clip_()
        pieces = [g.double() for _, g in model.local_gradients() if g is not None and g.numel()]
        largest = torch.stack(
            [torch.zeros((), dtype=torch.float64), *(g.abs().max() for g in pieces)]
        ).max()
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        rounding = 2.0**-8 if label == "before a norm" else 1e-6  # then products are rounded
        assert report.clipped_norm.item() == pytest.approx(largest.item(), rel=rounding), label


def test_each_bound_is_what_its_dtype_holds() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float16]
    found = bounds_held(torch.tensor([0.3, 0.3, 0.3, 0.3, 1e6], dtype=torch.float64), dtypes)
    singles = [torch.tensor(0.3).to(dtype).double().item() for dtype in dtypes[:3]]
    assert found.tolist() == [*singles, 0.3, math.inf]
