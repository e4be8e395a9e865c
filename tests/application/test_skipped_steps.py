"""What a skipped step leaves alone, whatever the optimizer; closures; steps that raise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import distclip
from distclip import ClipReport, GradClipper, policies
from distclip.application import stepping
from tests.engine.nonfinite import (
    OPTIMIZERS,
    Decided,
    adamw,
    backward,
    everything,
    foreach_adamw,
    fused_adamw,
    fused_sgd,
    sgd,
    small,
    unchanged,
)
from tests.helpers.watching import bits, same_bits


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_skipped_step_changes_nothing(make: Callable[..., Optimizer], first: bool) -> None:
    model = small()
    optimizer = make(model.parameters())
    GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip").attach(optimizer)
    if not first:
        backward(model)
        optimizer.step()
    before = everything(model, optimizer)
    backward(model, math.nan)
    gradients = [bits(p.grad) for p in model.parameters()]
    optimizer.step()
    assert unchanged(everything(model, optimizer), before)
    assert all(map(same_bits, gradients, (bits(p.grad) for p in model.parameters())))
    backward(model)
    optimizer.step()
    assert not unchanged(everything(model, optimizer), before)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_policy_that_skips_is_as_if_the_step_had_not_been(
    make: Callable[..., Optimizer],
) -> None:
    skipping, without = small(), small()
    one, other = make(skipping.parameters()), make(without.parameters())
    GradClipper(skipping, Decided(0, 2)).attach(one)
    for step in range(4):
        backward(skipping, 1.0 + step)
        one.step()
        if step not in (0, 2):
            backward(without, 1.0 + step)
            other.step()
    assert unchanged(everything(skipping, one), everything(without, other))


@pytest.mark.parametrize("made", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_kernel_is_told_by_found_inf(
    made: type[Optimizer], scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator no flag is read: the kernel gets it. Here the CPU's kernel does."""
    monkeypatch.setattr(stepping, "reads_on_host", lambda flag: False)
    model = small()
    optimizer = made(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)  # type: ignore[call-arg]
    skip = torch.tensor(False)

    class Decision:
        leave_out = skip

    told: list[bool | Tensor] = []
    stepping.StepHandle(optimizer, lambda scale, found, coming: Decision, told.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)

    def step() -> None:
        model.zero_grad()
        scaler.scale(model(torch.arange(3.0)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf")

    step()
    before = everything(model, optimizer)
    skip.fill_(True)
    step()
    assert unchanged(everything(model, optimizer), before)
    assert all(p.grad is not None for p in model.parameters())
    skip.fill_(False)
    step()
    assert not unchanged(everything(model, optimizer), before)
    assert len(told) == 3
    assert all(isinstance(flag, Tensor) for flag in told)


def test_found_inf_is_not_left_to_kernels_that_do_not_heed_it() -> None:
    parameters = list(small().parameters())
    assert stepping.skips_by_found_inf(fused_adamw(parameters))
    for make in (sgd, fused_sgd, adamw, foreach_adamw):
        assert not stepping.skips_by_found_inf(make(parameters))


def test_after_remove_the_optimizer_steps_as_before() -> None:
    model = small()
    optimizer = sgd(model.parameters())
    reports: list[ClipReport] = []
    clipper = GradClipper(
        model, policies.global_norm(1e-3), sinks=[lambda _, report: reports.append(report)]
    )
    handle = clipper.attach(optimizer)
    backward(model)
    optimizer.step()
    handle.remove()
    handle.remove()
    backward(model)
    gradients = [bits(p.grad) for p in model.parameters()]
    optimizer.step()
    assert len(reports) == 1
    assert all(map(same_bits, gradients, (bits(p.grad) for p in model.parameters())))


class Raising(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("out of luck")


def test_remove_gives_back_the_gradients_of_a_step_that_raised() -> None:
    model = small()
    optimizer = Raising(model.parameters(), lr=0.1)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip")
    handle = clipper.attach(optimizer)
    backward(model, math.inf)
    gradients = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    handle.remove()
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_after_a_step_that_raised_new_gradients_are_not_replaced_by_old_ones() -> None:
    model = small()
    optimizer = Raising(model.parameters(), lr=0.1)
    reports: list[ClipReport] = []
    GradClipper(
        model,
        policies.measure(),
        on_nonfinite="skip",
        sinks=[lambda _, report: reports.append(report)],
    ).attach(optimizer)
    for factor in (math.inf, 1.0):
        backward(model, factor)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    assert [bool(report.skipped) for report in reports] == [True, False]


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_with_a_closure_its_gradients_are_clipped(how: str) -> None:
    one, other = small(), small()
    clipped, by_hand = sgd(one.parameters()), sgd(other.parameters())
    GradClipper(one, policies.global_norm(1e-2)).attach(clipped)
    for _ in range(2):
        closure = lambda: backward(one)  # noqa: E731
        loss = clipped.step(closure) if how == "positional" else clipped.step(closure=closure)
        want = backward(other)
        distclip.clip_grad_norm_(other.parameters(), 1e-2)
        by_hand.step()
        torch.testing.assert_close(loss, want)
    assert unchanged(everything(one, clipped), everything(other, by_hand))


def test_a_closure_that_gives_nan_skips_the_step() -> None:
    model = small()
    optimizer = adamw(model.parameters())
    GradClipper(model, policies.measure(), on_nonfinite="skip").attach(optimizer)
    optimizer.step(lambda: backward(model).item())
    before = everything(model, optimizer)
    optimizer.step(lambda: backward(model, math.nan).item())
    assert unchanged(everything(model, optimizer), before)
    assert all(p.grad is not None for p in model.parameters())


def test_every_evaluation_of_lbfgs_is_clipped() -> None:
    model = small()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    norms: list[float] = []
    GradClipper(
        model, policies.global_norm(0.5), sinks=[lambda _, r: norms.append(r.clipped_norm.item())]
    ).attach(optimizer)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return backward(model)

    optimizer.step(closure)
    assert len(norms) == evaluations > 1
    assert max(norms) <= 0.5 + 1e-6
