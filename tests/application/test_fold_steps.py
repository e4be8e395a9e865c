"""Folding: coefficients at the ends of float32, steps that are not made, closures."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from distclip import ClipReport, GradClipper, policies
from distclip.application import folded
from tests.application.folding import Reference, clean, fused, give, model_of, same

MAX_NORM = 0.3


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e18, 3e37])
@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1e-6, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_tiny_coefficients(size: float, max_norm: float, scaled: bool) -> None:
    found = []
    for fold in (True, False):
        parameter = nn.Parameter(torch.zeros(3))
        parameter.grad = torch.tensor([1.0, -2.0, 0.5]) * size
        optimizer: Any = SGD([parameter], lr=1.0, fused=True)
        GradClipper([parameter], policies.global_norm(max_norm), fold=fold).attach(optimizer)
        if scaled:
            optimizer.grad_scale = theirs = torch.tensor(4.0)
        optimizer.step()
        if scaled:
            assert optimizer.grad_scale is theirs
        found.append(parameter.detach())
    # In place, float32 loses bits below 1e-38 that the quotient keeps.
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-37)


def test_the_divisor_on_a_device_stays_finite() -> None:
    """Where no number is read: as 0-dim tensors, here of the host."""

    def divisor(coefficient: float, scale: float | None = None) -> float:
        given = None if scale is None else torch.tensor(scale)
        made = folded.divisor_of(torch.tensor(coefficient, dtype=torch.float64), given)
        assert made is not None
        assert made.dtype == torch.float32
        assert made.dim() == 0
        return made.item()

    largest = torch.finfo(torch.float32).max
    assert divisor(0.25) == 4.0
    assert divisor(0.25, 1024.0) == 4096.0
    assert divisor(1.0) == 1.0
    assert divisor(0.0) == math.inf  # gradients become 0, those that are inf or NaN become NaN
    assert divisor(1e-300) == largest
    assert divisor(1e-30, 65536.0) == pytest.approx(6.5536e34)
    assert divisor(1e-36, 65536.0) == largest
    assert math.isnan(divisor(math.nan))
    for coefficient in (1e-40, 0.0, math.nan, 1e39):
        assert folded.divisor_of(coefficient, None) is None


def test_a_number_on_another_device_than_the_parameters_is_not_folded() -> None:
    """CPU offload: torch copies it to the host without waiting for it."""
    optimizer = fused("adamw", model_of())
    step = folded.FusedStep(optimizer, None, False)
    assert not step.multiply(torch.ones((), dtype=torch.float64, device="meta"))
    assert step.multiply(torch.ones((), dtype=torch.float64))
    folded.take_back(optimizer)
    assert clean(optimizer)


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adagrad"])
def test_a_skipped_step_leaves_everything(name: str, told: list[float]) -> None:
    model, reference = model_of(), Reference(name)
    optimizer = fused(name, model)
    GradClipper(model, policies.global_norm(MAX_NORM), on_nonfinite="skip").attach(optimizer)
    for step in range(4):
        give(model, step)
        if step in (0, 2):
            model[0].weight.grad[0, 0] = math.nan  # type: ignore[index]
        optimizer.step()
        if step not in (0, 2):
            reference.step(step)
    assert len(told) == 2
    same(model, reference.model)


def test_zero_and_pass_do_folded_what_they_do_in_place() -> None:
    for mode in ("zero", "pass"):
        made = []
        for fold in (True, False):
            model = model_of()
            optimizer = fused("adamw", model)
            GradClipper(
                model,
                policies.global_norm(MAX_NORM),
                on_nonfinite=mode,  # type: ignore[arg-type]
                fold=fold,
            ).attach(optimizer)
            for step in range(2):
                give(model, step)
                if step:
                    model[0].weight.grad[0, 0] = math.nan  # type: ignore[index]
                optimizer.step()
            made.append([p.detach() for p in model.parameters()])
        for p, q in zip(*made, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7, equal_nan=True)
        assert torch.isfinite(made[0][0]).all() == (mode == "zero")


def test_a_step_that_raises_is_history_at_the_next(
    told: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = model_of(), Reference("adamw")
    optimizer = fused("adamw", model)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)

    def out_of_luck(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    for _ in range(2):
        give(model, 9)
        with monkeypatch.context() as broken:
            broken.setattr(sys.modules["torch.optim.adam"], "adam", out_of_luck)
            with pytest.raises(RuntimeError, match="out of luck"):
                optimizer.step()
    give(model, 0)
    optimizer.step()
    # `_init_group` of the steps that raised has made moments of zeros, and no more.
    reference.step(0)
    same(model, reference.model)
    assert clean(optimizer)
    assert len(told) == 3
    give(model, 1)
    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["torch.optim.adam"], "adam", out_of_luck)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    assert not clean(optimizer)
    handle.remove()
    assert clean(optimizer)


def test_a_sink_that_raises_leaves_no_divisor_for_others(told: list[float]) -> None:
    model = model_of()
    optimizer = fused("adamw", model)

    def full(step: int, report: ClipReport) -> None:
        raise OSError("disk full")

    handle = GradClipper(model, policies.global_norm(MAX_NORM), sinks=[full]).attach(optimizer)
    give(model, 0)
    with pytest.raises(OSError, match="disk full"):
        optimizer.step()
    assert len(told) == 1
    assert clean(optimizer)
    handle.remove()


@pytest.mark.parametrize("scaled", [False, True])
def test_two_clippers_on_one_optimizer_multiply_one_after_the_other(
    scaled: bool, told: list[float]
) -> None:
    model, reference = model_of(), Reference("adamw", MAX_NORM / 2)
    optimizer = fused("adamw", model)
    seen: list[float] = []
    first, second = (
        GradClipper(
            model,
            policies.global_norm(MAX_NORM * factor),
            sinks=[lambda _, report: seen.append(report.total_norm.item())],
        )
        for factor in (1.0, 0.5)
    )
    first.attach(optimizer)
    with pytest.warns(UserWarning, match="one after the other"):
        second.attach(optimizer)
    for step in range(2):
        if scaled:
            optimizer.grad_scale = theirs = torch.tensor(8.0)
        give(model, step, 8.0 if scaled else 1.0)
        optimizer.step()
        if scaled:
            assert optimizer.grad_scale is theirs
            del optimizer.grad_scale
        reference.step(step)
        assert clean(optimizer)
    assert len(told) == 4
    assert seen[1::2] == pytest.approx([MAX_NORM] * 2, rel=1e-5)
    same(model, reference.model)


def test_closures(told: list[float]) -> None:
    model, reference = model_of(), Reference("adamw")
    optimizer = fused("adamw", model)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    for step in range(2):
        assert optimizer.step(lambda step=step: give(model, step)) is None
        reference.step(step)
    assert len(told) == 2
    assert clean(optimizer)
    same(model, reference.model)
    handle.remove()
    give(model, 2)
    optimizer.step()
    assert len(told) == 2
