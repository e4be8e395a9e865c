"""Norms of every order and coefficients of every size, over ranks, against 80-bit floats."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distclip
from distclip import GradClipper, NonFiniteGradientError, policies
from distclip.kernels.powers import LEAST_ORDER
from distclip.policies import Policy
from distclip.policies.protocol import combine_norms

ORDERS = (
    1e-9,
    1e-5,
    1e-4,
    0.01,
    0.3,
    0.5,
    0.99,
    1,
    1.5,
    2,
    3,
    4.5,
    6,
    12,
    50,
    64,
    65,
    1e3,
    1e6,
    1e19,
)
VALUES: dict[torch.dtype, tuple[float, ...]] = {
    torch.float64: (5e-324, 1e-320, 1e-300, 1e-24, 1e-3, 1.0, 1e12, 1e200, 1e307, 0.0),
    torch.float32: (1e-45, 1e-30, 1.0, 1e19, 3e38),
    torch.float16: (6e-8, 6e4),
    torch.bfloat16: (1e-40, 3e38),
    torch.complex64: (1e-30, 3e38),
}


def true_norm(values: Tensor, order: float) -> float:
    """In 80-bit floats, whose exponents reach 4932; inf where float64 cannot hold it."""
    numbers = values.detach().flatten()
    wide = numbers.to(torch.complex128 if numbers.is_complex() else torch.float64).numpy()
    with np.errstate(all="ignore"):
        magnitudes = np.abs(wide.astype(np.clongdouble if numbers.is_complex() else np.longdouble))
        largest = magnitudes.max(initial=0)
        if math.isinf(order) or largest == 0:
            return float(largest)
        sums = ((magnitudes / largest) ** np.longdouble(order)).sum()
        return float(largest * sums ** (1 / np.longdouble(order)))


def sharded(whole: Tensor) -> nn.Parameter:
    """A parameter with this gradient, in uneven rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    return parameter


def local(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def gradients(dtype: torch.dtype, rows: int) -> dict[str, Tensor]:
    """Of one size each, of a zero beside a number, and of all sizes together."""
    sizes = VALUES[dtype]
    drawn = [np.linspace(0.25, 1.0, 2 * rows) * size for size in sizes]
    drawn += [np.array([0.0, sizes[0]] * rows)]
    drawn += [np.logspace(math.log10(sizes[0]), math.log10(sizes[-1] or 1e300), 2 * rows)]
    found = [torch.from_numpy(each).reshape(rows, 2).to(dtype) for each in drawn]
    return {str(number): g + 1j * g if g.is_complex() else g for number, g in enumerate(found)}


def is_near(have: float, want: float) -> bool:
    """Within 1e-6, or a few of the smallest steps of float64."""
    return have == want or abs(have - want) < 1e-6 * want + 1e-322


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_norm_that_float64_holds_is_right_and_one_that_it_does_not_is_inf(rows: int) -> None:
    wrong = []
    for dtype in VALUES:
        whole = gradients(dtype, rows)
        named = [(name, sharded(gradient)) for name, gradient in whole.items()]
        for order in (*ORDERS, math.inf):
            policy = policies.global_norm(math.inf, order)
            report = GradClipper(named, policy, on_nonfinite="pass").clip_()
            for name, have in report.parameter_norms.items():
                want = true_norm(whole[name], order)
                # Between 1e300 and 5e-324 a ratio underflows: then a norm that is nothing float64
                # could hold may come as the largest number.
                if not is_near(have, want) and not (order < LEAST_ORDER and math.isinf(want)):
                    wrong.append((dtype, order, whole[name].tolist(), have, want))
            want = true_norm(torch.cat(list(whole.values())), order)
            have = combine_norms(
                torch.tensor([*report.parameter_norms.values()], dtype=torch.float64), order
            )
            if not is_near(have.item(), want):
                wrong.append((dtype, order, "together", have, want))
    assert not wrong, f"{len(wrong)} wrong, such as {wrong[:4]}"


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, 50.0, 1e3, math.inf])
def test_what_value_leaves_is_measured_at_its_own_size(order: float) -> None:
    """Divided by the unclamped largest, powers of what is left would vanish."""
    for size, policy in itertools.product(
        (1e6, 1e30, 3e38), (policies.parameter_norm(1e-6, order), policies.agc(unit="tensor"))
    ):
        gradient = torch.full((5, 3), size)
        parameter = sharded(gradient)
        GradClipper([("w", parameter)], policies.chain(policies.value(3.0), policy)).clip_()
        reference = sharded(gradient.clamp(max=3.0))
        GradClipper([("w", reference)], policy).clip_()
        assert torch.allclose(local(parameter), local(reference), rtol=1e-6, atol=0.0)


COEFFICIENTS = (1e-30, 1.2e-38, 1e-38, 1e-40, 3e-45, 1e-46, 1e-60, 1e-75, 1e-90, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_a_coefficient_is_multiplied_whatever_its_size(dtype: torch.dtype) -> None:
    """As long as the product is a number of the gradient's dtype."""
    sizes = (
        torch.tensor([1e-20, 1.0, 1e4, 1e30, -3e38]).clamp(-6e4, 6e4)
        if (dtype is torch.float16)
        else torch.tensor([1e-20, 1.0, 1e4, 1e30, -3e38])
    )
    gradient = sizes.to(dtype)
    for coefficient in COEFFICIENTS:
        wide = gradient.to(torch.complex128 if gradient.is_complex() else torch.float64)
        want = (wide * coefficient).to(dtype)
        named: list[tuple[str, Tensor]] = []
        for policy in (_Times(coefficient), _TimesByRow(coefficient)):
            parameter = nn.Parameter(torch.zeros(5, 1, dtype=dtype))
            parameter.grad = gradient.reshape(5, 1).clone()
            named = [("w", parameter)]
            GradClipper(named, policy, on_nonfinite="pass").clip_()
            have = local(parameter).flatten()
            tolerance = torch.finfo(dtype).eps
            least = torch.finfo(dtype).smallest_normal * tolerance
            assert ((have - want).abs() <= tolerance * want.abs() + least).all(), (
                coefficient,
                policy,
                have,
                want,
            )


def test_a_tiny_coefficient_beside_a_nan_and_others() -> None:
    parameter = nn.Parameter(torch.zeros(3, 1))
    parameter.grad = torch.tensor([[1e30], [math.nan], [2.0]])
    GradClipper([("w", parameter)], _TimesByRow(1e-40), on_nonfinite="pass").clip_()
    assert local(parameter)[0].item() == pytest.approx(1e-10, rel=1e-6)


@pytest.mark.ranks(1, 2)
def test_a_joint_norm_beyond_float64_still_gives_the_coefficient() -> None:
    for policy in (
        policies.global_norm(1.0),
        policies.chain(policies.measure(), policies.global_norm(1.0)),
    ):
        named = [(name, sharded(torch.full((3, 1), 0.9e308, dtype=torch.float64))) for name in "ab"]
        report = GradClipper(named, policy).clip_()
        for _, parameter in named:
            assert torch.allclose(local(parameter), torch.tensor(6**-0.5, dtype=torch.float64))
        assert math.isinf(report.total_norm)
        assert float(report.clipped_norm) == pytest.approx(1.0)
        assert report.nonfinite == ()


@pytest.mark.ranks(1, 2)
def test_a_finite_gradient_whose_norm_is_too_large_is_told_from_one_with_an_inf() -> None:
    large = sharded(torch.full((4, 1), 1.7e308, dtype=torch.float64))
    bad = sharded(torch.tensor([[1.0], [2.0], [3.0], [math.inf]], dtype=torch.float64))
    fine = sharded(torch.ones(4, 1, dtype=torch.float64))
    named = [("large", large), ("bad", bad), ("fine", fine)]
    with pytest.raises(NonFiniteGradientError) as caught:
        GradClipper(named, policies.global_norm(1.0)).clip_()
    assert caught.value.parameters == ("large", "bad")
    assert (
        "NaN or inf in the gradient of 'bad'; the 2-norm of the gradient of 'large' is larger"
        in (str(caught.value))
    )
    with pytest.raises(NonFiniteGradientError, match=r"^the 2-norm of the gradient of 'large'"):
        GradClipper(named[:1], policies.global_norm(1.0)).clip_()
    # By the maximum it is like any other.
    GradClipper(named[:1], policies.global_norm(1.0, math.inf)).clip_()
    assert torch.allclose(local(large), torch.ones((), dtype=torch.float64))


class _Times(Policy):
    """Multiply by a number."""

    name = "times"

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, statistics: Any, state: Any) -> Any:
        ones = torch.ones(len(statistics.parameters), dtype=torch.float64)
        return (policies.Scale(ones * self.coefficient),), state


class _TimesByRow(policies.UnitPolicy):
    """Multiply every row by a number."""

    name = "times by row"

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def unit_dims(self, parameter: Any) -> tuple[int, ...]:
        return (0,)

    def unit_coefficients(self, gradient_norms: Tensor, weight_norms: Tensor) -> Tensor:
        coefficients = torch.full_like(gradient_norms, self.coefficient)
        return torch.where(torch.isnan(gradient_norms), math.nan, coefficients)


@pytest.mark.parametrize(("order", "value"), [(1.0, 1.2e302), (2.0, 1.2e151)])
def test_parts_whose_sum_leaves_float64_do_not_warn(order: float, value: float) -> None:
    """numpy says so of its own sums, and a warning is an error to some."""
    gradient = torch.full(((1 << 21) + 5,), value, dtype=torch.float64)
    found = distclip.get_total_norm([gradient], order).item()
    assert found == pytest.approx(value * len(gradient) ** (1.0 / order), rel=1e-9)
