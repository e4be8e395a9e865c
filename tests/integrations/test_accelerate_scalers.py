"""Accelerate: gradient scalers, fused optimizers, and overlap."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("accelerate")
from distclip.application import folded
from tests.helpers.shards import local
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    SkipAbove,
    adamw,
    batch,
    clip_all,
    counted,
    fused,
    loss_of,
    make,
    mine,
    prepared,
    same,
    scaled,
    sgd,
    snapshot,
    whole,
)

LR = 0.5


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, adamw, sgd])
@pytest.mark.parametrize("calls", ["all", "none", "first two"])
def test_gradient_scaler(layout: str, optimizer: Any, calls: str) -> None:
    """FIELD row 24: unscaled norms and a right clip, where the gradients are still scaled too."""
    policy = {"name": "global_norm", "max_norm": 0.2}
    accelerator, handle, model, stepper = scaled(layout, {"policy": policy}, optimizer)
    reports = counted(handle)
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.LambdaLR(stepper.optimizer, lambda step: 1.0)
    )
    reference = Reference(plain := make(), optimizer(plain))
    # One overflow right after another: what a dropped update leaves behind concerns no later one.
    for number, factor in enumerate([1.0, math.inf, math.inf, 1.0, 1.0, 1.0]):
        skipped = factor != 1.0
        before = whole(model), snapshot(stepper)
        loss = loss_of(model, mine(batch(number)))
        scale = accelerator.scaler.get_scale()
        accelerator.backward(loss * (factor if dist.get_rank() == 0 else 1))
        called = calls == "all" or (calls == "first two" and number < 2)
        if called:
            norm = clip_all(accelerator, model)
            assert clip_all(accelerator, model).equal(norm) or skipped
        stepper.step()
        scheduler.step()
        stepper.zero_grad()
        assert accelerator.optimizer_step_was_skipped is skipped, number
        if skipped:
            torch.testing.assert_close((whole(model), snapshot(stepper)), before, rtol=0, atol=0)
            assert accelerator.scaler.get_scale() == scale / 2
            continue
        reference.update(policy, loss_of(plain, batch(number)))
        found = norm if called else handle.last_report.total_norm
        assert found.item() == pytest.approx(reference.norms[-1], rel=1e-6)
        assert not hasattr(stepper.optimizer, "found_inf")

    same(whole(model), whole(plain))
    assert accelerator.scaler.get_scale() == 1024 / 4 * 2
    seen_by_us = 6 if calls == "all" or optimizer is fused else 5 if calls == "first two" else 4
    assert len(reports) == seen_by_us


def norm_there(model: nn.Module, layout: str) -> float:
    """Of the gradients as they lie on the ranks."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    parts = map(local, found)
    square = sum((part.double().square().sum() for part in parts), torch.zeros(()).double())
    if layout != "ddp":
        dist.all_reduce(square)
    return square.sqrt().item()


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_a_fused_step_multiplies_unless_the_script_asks_for_clipped_gradients(layout: str) -> None:
    policy = {"name": "global_norm", "max_norm": 1e-3}
    told: list[str] = []
    tell = folded.tell
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            folded, "tell", lambda o, name, value: (told.append(name), tell(o, name, value))
        )
        for fold in (True, False):
            accelerator, handle, model, stepper = scaled(
                layout, {"policy": policy, "fold": fold}, fused
            )
            for called in (False, True):
                accelerator.backward(loss_of(model, mine(batch(0))))
                if called:
                    clip_all(accelerator, model)
                    assert norm_there(model, layout) == pytest.approx(1e-3, rel=1e-4)
                stepper.step()
                assert norm_there(model, layout) == pytest.approx(1e-3, rel=1e-4)
                assert handle.last_report.clipped_norm.item() == pytest.approx(1e-3, rel=1e-4)
                stepper.zero_grad()
                assert told == ["grad_scale"]


@pytest.mark.ranks(1, 2)
def test_overlap_measures_during_backward_under_fsdp2() -> None:
    policy = {"name": "global_norm", "max_norm": 0.3}
    accelerator, handle, model, optimizer = prepared(
        "fsdp2", {"policy": policy, "overlap": True}, gradient_accumulation_steps=2
    )
    reference = Reference(plain := make(), sgd(plain))
    early = []
    for number in range(4):
        for half in mine(batch(number)).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                if number % 2:  # and otherwise by the hook
                    clip_all(accelerator, model)
                optimizer.step()
                optimizer.zero_grad()
        reference.update(policy, loss_of(plain, batch(number)))
        found = handle.last_report.total_norm.item()
        assert found == pytest.approx(reference.norms[-1], rel=1e-6)
        (clipper,) = handle._clippers.known.values()
        early.append(clipper.measured_early)
    same(whole(model), whole(plain))
    # The clipper was built at the first step, after its backward, and the second told it how many
    # gradients come together.
    assert early == [0, 0, 4, 4]
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert all(len(each) == 1 for each in hooks)
    del clipper
    accelerator.free_memory()
    assert not any(hooks)


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, sgd])
def test_gradient_scaler_with_accumulation_and_calls_for_parts(layout: str, optimizer: Any) -> None:
    """Accelerate itself unscales too early here, and raises at the second call."""
    accelerator, _, model, stepper = scaled(
        layout, Halve(), optimizer, gradient_accumulation_steps=2
    )
    reference = Reference(plain := make(), optimizer(plain))
    for number in range(3):
        x = mine(batch(number))
        for half in x.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                for name in ("body", "head"):
                    part = [p for n, p in model.named_parameters() if name in n]
                    norm = accelerator.clip_grad_norm_(part, 1e-9)
                    assert norm < 100  # and not a thousand times as much
                stepper.step()
                stepper.zero_grad()
        reference.update(0.5, loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("mode", ["pass", "zero"])
def test_the_scheduler_stands_still_where_a_fused_optimizer_drops_an_overflow(
    layout: str, mode: str
) -> None:
    """Accelerate by itself does not notice: there the optimizer's step is called all the same."""
    config = {"policy": {"name": "measure"}, "on_nonfinite": mode}
    accelerator, _, model, stepper = scaled(layout, config, fused)
    before = whole(model)
    for factor in (math.inf, 1.0):
        accelerator.backward(loss_of(model, mine(batch(0))) * factor)
        stepper.step()
        stepper.zero_grad()
        assert accelerator.optimizer_step_was_skipped is (factor != 1.0)
        if factor != 1.0:
            same(whole(model), before, 0.0)


@pytest.mark.ranks(2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, adamw])
def test_a_policy_skips_under_a_gradient_scaler(layout: str, optimizer: Any) -> None:
    for explicit in (True, False):
        accelerator, _, model, stepper = scaled(layout, SkipAbove(1e-9), optimizer)
        before = whole(model)
        accelerator.backward(loss_of(model, mine(batch(0))))
        if explicit:
            clip_all(accelerator, model)
        stepper.step()
        assert accelerator.optimizer_step_was_skipped
        assert accelerator.scaler.get_scale() == 1024
        same(whole(model), before, 0.0)
        assert not snapshot(stepper)
