"""The contract of policies that decide per unit, for ``check_policy``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

UNIT_SHAPES = {
    "scale": (),
    "fc.bias": (5,),
    "fc.weight": (5, 4),
    "conv.weight": (3, 2, 4),
    "no": (0, 3),
}
UNIT_GRADIENTS = [0.5, 3.0, 0.0, 1e-8, 1e4, 5e-324, 1e300, 1.0, 0.02, 7.0]
UNIT_WEIGHTS = [1.0, 0.0, 2.0, 0.5, 1e-4, 3.0, 0.1, 1e3, 1.0, 0.0]


@dataclass(frozen=True)
class Parameter:
    """One logical parameter, as a policy is told of it."""

    name: str
    shape: tuple[int, ...]
    group: int | None = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def check_unit_contract(factory: Callable[[], Any], as_rank: Callable[[int], Any]) -> None:
    """Raise an AssertionError that names the rule that is broken."""
    _check_dims(factory)
    gradients, weights = _vector(UNIT_GRADIENTS), _vector(UNIT_WEIGHTS)
    want = _checked_coefficients(factory(), gradients, weights, sound=True)
    _check_alone(factory, gradients, weights, want)
    for rank in (0, 5):
        with as_rank(rank):
            got = _checked_coefficients(factory(), gradients, weights, sound=True)
        assert same(got, want), f"rank {rank} decides otherwise, or random numbers do"
    for bad in (math.nan, math.inf):  # anything but a change of the other units
        troubled = gradients.clone()
        troubled[3] = bad
        got = _checked_coefficients(factory(), troubled, weights, sound=False)
        others = torch.arange(len(gradients)) != 3
        assert same(got[others], want[others]), f"a unit of norm {bad} changes those of others"
    _checked_coefficients(factory(), gradients[:0], weights[:0], sound=True)
    _check_units_no_sync(factory())
    threshold = getattr(factory(), "threshold", None)
    assert threshold is None or isinstance(threshold, (int, float)), (
        f"`threshold` must be a number or None, got {threshold!r}"
    )


def host_read_message(error: Exception) -> str:
    """The message for an error that came up with tensors without values."""
    first = str(error).splitlines()[0] if str(error) else ""
    return (
        f"it reads a value on the host (or fails without values): {type(error).__name__}: {first}; "
        f"use torch.where instead of `if`, and neither item() nor tolist() nor masks"
    )


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _check_dims(factory: Callable[[], Any]) -> None:
    for name, shape in UNIT_SHAPES.items():
        parameter = Parameter(name, shape)
        dims = factory().unit_dims(parameter)
        where = f"unit_dims of a parameter of shape {list(shape)}"
        whole = isinstance(dims, tuple) and all(type(dim) is int for dim in dims)
        assert whole, f"{where} must be a tuple of dims, got {dims!r}"
        sound = all(0 <= dim < len(shape) for dim in dims) and list(dims) == sorted(set(dims))
        assert sound, f"{where} must be dims of it, each once and in order, got {dims!r}"
        policy = factory()
        again = [policy.unit_dims(parameter) for _ in range(2)]
        assert again == [dims, dims], f"{where} are not the same whenever they are asked for"


def _checked_coefficients(
    policy: Any, gradients: Tensor, weights: Tensor, *, sound: bool
) -> Tensor:
    """The coefficients, one a unit, checked."""
    before = [gradients.clone(), weights.clone()]
    found = policy.unit_coefficients(gradients, weights)
    again = policy.unit_coefficients(gradients, weights)
    assert isinstance(found, Tensor), f"unit_coefficients must return a tensor, got {found!r}"
    kept = same(before[0], gradients) and same(before[1], weights)
    assert kept, "it changed the norms that it was given in place"
    assert found.dtype == torch.float64, f"coefficients are {found.dtype}, not torch.float64"
    assert found.shape in ((), gradients.shape), (
        f"coefficients have shape {list(found.shape)} for {len(gradients)} units"
    )
    assert same(found, again), "not pure: the same norms gave other coefficients"
    good = bool(torch.isfinite(found).all()) and bool((found >= 0).all())
    assert good or not sound, f"finite norms gave coefficients {found}"
    return found.expand_as(gradients)


def _check_alone(
    factory: Callable[[], Any], gradients: Tensor, weights: Tensor, want: Tensor
) -> None:
    """Ranks decide for the units that they hold: which others there are must not matter."""
    policy = factory()  # in another order, so that a memory would show
    for stop in range(len(gradients), 0, -1):
        for start in range(stop):
            here = slice(start, stop)
            got = _checked_coefficients(policy, gradients[here], weights[here], sound=True)
            assert same(got, want[here]), (
                "a unit's coefficient depends on the other units (or on earlier calls), which may "
                "lie on another rank"
            )


def _check_units_no_sync(policy: Any) -> None:
    norms = _vector(UNIT_GRADIENTS), _vector(UNIT_WEIGHTS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = map(mode.from_tensor, norms)
        try:
            policy.unit_coefficients(*fakes)
        except Exception as error:
            raise AssertionError(host_read_message(error)) from error


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, with NaN in the same places."""
    return bool(torch.equal(torch.isnan(one), torch.isnan(other))) and bool(
        torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    )
