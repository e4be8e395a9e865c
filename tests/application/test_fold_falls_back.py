"""Folding: where the optimizer's kernel must not multiply."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from distclip import ClipReport, ConfigurationError, GradClipper, clipper, policies
from distclip.application import folded
from distclip.testing import expected
from tests.application.folding import Reference, fused, give, gradients_of, groups, model_of

MAX_NORM = 0.3


class OwnStep(AdamW):
    """May look at the gradients before it calls torch's step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class SameStep(AdamW):
    """Changes something else."""


def two_groups(model: nn.Module, first: bool, second: bool) -> Any:
    made: Any = groups(model)
    for group, flag in zip(made, (first, second), strict=True):
        group["fused"] = flag
    return AdamW(made, lr=0.1, eps=1.0, fused=True)


def with_stranger(model: nn.Module, gradient: bool) -> Any:
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3) if gradient else None
    return AdamW([*model.parameters(), stranger], lr=0.1, eps=1.0, fused=True)


def without_last(model: nn.Module, gradient: bool) -> Any:
    listed = list(model.parameters())
    optimizer = AdamW(listed[:-1], lr=0.1, eps=1.0, fused=True)
    if not gradient:
        listed[-1].requires_grad_(False)
    return optimizer


MAKERS: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "fused": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, fused=True), True),
    "subclass": (lambda m: SameStep(m.parameters(), lr=0.1, eps=1.0, fused=True), True),
    "a step of its own": (lambda m: OwnStep(m.parameters(), lr=0.1, eps=1.0, fused=True), False),
    "foreach": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, foreach=True), False),
    "single": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, foreach=False), False),
    "not known": (lambda m: torch.optim.NAdam(m.parameters(), lr=0.1, eps=1.0), False),
    "mixed groups": (lambda m: two_groups(m, True, False), False),
    "both groups": (lambda m: two_groups(m, True, True), True),
    "stranger": (lambda m: with_stranger(m, True), False),
    "stranger at rest": (lambda m: with_stranger(m, False), True),
    "left out": (lambda m: without_last(m, True), False),
    "left out, frozen": (lambda m: without_last(m, False), True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_falls_back_where_the_kernel_would_do_more_or_less(name: str, told: list[float]) -> None:
    make, folds = MAKERS[name]
    model = model_of()
    optimizer = make(model)
    gradients = gradients_of(model, 0)
    give(model, 0)
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.grad = None
            gradients.pop(parameter_name)
    policy = {"name": "global_norm", "max_norm": MAX_NORM}
    want = expected(policy, gradients, gradients)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    optimizer.step()
    assert len(told) == folds
    for parameter_name in gradients:
        found = model.get_parameter(parameter_name).grad
        assert found is not None
        wanted = torch.as_tensor(want.gradients[parameter_name])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-9)
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None and id(parameter) not in set(map(id, model.parameters())):
            assert parameter.grad.tolist() == [1.0] * 3  # a stranger is left alone


@pytest.mark.parametrize("place", [-1, 0], ids=["a stranger's place", "a known one's"])
def test_parameters_that_are_exchanged_later_are_refused(told: list[float], place: int) -> None:
    """They are no parameters of the clipper's, and would be multiplied or stepped unclipped."""
    model = model_of()
    optimizer = with_stranger(model, False)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    before = len(told)
    exchanged = nn.Parameter(torch.ones(2))
    exchanged.grad = torch.ones(2)
    optimizer.param_groups[0]["params"][place] = exchanged
    give(model, 1)
    with pytest.raises(ConfigurationError, match=r"came \(or was replaced\)"):
        optimizer.step()
    assert len(told) == before
    assert exchanged.tolist() == exchanged.grad.tolist() == [1.0, 1.0]


def test_what_somebody_else_has_set_since_is_left_alone() -> None:
    optimizer = fused("adamw", model_of())
    folded.tell(optimizer, "grad_scale", torch.tensor(2.0))
    optimizer.grad_scale = theirs = torch.tensor(3.0)
    folded.take_back(optimizer)
    assert optimizer.grad_scale is theirs


def test_doubles_are_clipped_in_place_with_their_own_precision(told: list[float]) -> None:
    model, reference = model_of().double(), Reference("adamw")
    optimizer = fused("adamw", model)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    reference.step(0)
    assert told == []
    for p, q in zip(model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_who_looks_between_clipping_and_step_sees_clipped_gradients(
    told: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    optimizer = fused("adamw", model)
    norms = []

    def look(*_: Any) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    before = optimizer.register_step_pre_hook(look)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    assert len(told) == 1  # a hook that comes first sees what backward left
    assert norms.pop() > 1
    before.remove()
    after = optimizer.register_step_pre_hook(look)
    give(model, 1)
    optimizer.step()
    assert len(told) == 1
    assert norms.pop() == pytest.approx(MAX_NORM, rel=1e-5)
    after.remove()

    class Looking(clipper.Watcher):
        def after(self, clipper: Any, report: ClipReport, loss_scale: Any) -> None:
            look()

    monkeypatch.setattr(clipper, "watchers", [Looking()])
    give(model, 2)
    optimizer.step()
    assert len(told) == 2  # a watcher looks when the step has multiplied
    assert norms.pop() == pytest.approx(MAX_NORM, rel=1e-5)
    other = GradClipper(model, policies.measure()).attach(optimizer)
    give(model, 3)
    optimizer.step()
    assert len(told) == 2  # with another hook it would see what both of them did
    assert norms == [pytest.approx(MAX_NORM, rel=1e-5)] * 2
    other.remove()
    handle.remove()


def test_a_call_by_hand_clips_at_once(told: list[float]) -> None:
    model = model_of()
    fused("adamw", model)
    give(model, 0)
    GradClipper(model, policies.global_norm(MAX_NORM)).clip_()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm.item() == pytest.approx(MAX_NORM, rel=1e-5)
    assert told == []


def test_it_can_be_switched_off(told: list[float]) -> None:
    model = model_of()
    optimizer = fused("adamw", model)
    GradClipper(model, policies.global_norm(MAX_NORM), fold=False).attach(optimizer)
    give(model, 0)
    optimizer.step()
    assert told == []
    with pytest.raises(ConfigurationError, match="fold must be True or False"):
        GradClipper(model, policies.global_norm(1.0), fold="yes")  # type: ignore[arg-type]


def test_a_coefficient_of_one_tells_nothing(told: list[float]) -> None:
    model, plain = model_of(), model_of()
    one, other = fused("adamw", model), fused("adamw", plain)
    GradClipper(model, policies.global_norm(1e6)).attach(one)
    for step in range(2):
        give(model, step)
        give(plain, step)
        one.step()
        other.step()
    assert told == []
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
