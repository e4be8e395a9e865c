"""What an error of a step refers to goes with it, without waiting for the garbage collector."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies

CALLS: dict[str, Callable[[list[Tensor]], object]] = {
    "clip_grad_norm_": lambda ps: distclip.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True),
    "clip_grad_agc_": lambda ps: distclip.clip_grad_agc_(ps),
    "GradClipper": lambda ps: GradClipper(ps, policies.global_norm(1.0)).clip_(),
}
OVERLAPPING, NAN = torch.ones(1).expand(4), torch.full((4,), torch.nan)


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing(call: Callable[[list[Tensor]], object], gradient: Tensor) -> weakref.ref[Tensor]:
    """Calls it with this gradient; returns the parameter that should be gone by then."""
    parameters: list[Tensor] = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    parameters[0].grad = gradient
    parameters[1].grad = torch.ones(4)
    with pytest.raises(distclip.DistclipError):
        call(parameters)
    return weakref.ref(parameters[0])


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("name", "gradient"),
    [*((name, OVERLAPPING) for name in CALLS), ("clip_grad_norm_", NAN), ("GradClipper", NAN)],
)
def test_parameters_go_with_their_names(name: str, gradient: Tensor) -> None:
    assert failing(CALLS[name], gradient)() is None


class Refusing(policies.GlobalNorm):
    """A policy of a user's, which raises an error of distclip's."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        seen = "mine"
        raise distclip.ConfigurationError(f"no: {seen}")


def test_the_frames_of_a_user_keep_their_variables() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    with pytest.raises(distclip.ConfigurationError) as caught:
        GradClipper([parameter], Refusing(1.0)).clip_()
    frames = [each.frame for each in caught.traceback]
    mine = [each.f_locals for each in frames if each.code.name == "update"]
    assert mine
    assert mine[0]["seen"] == "mine"
