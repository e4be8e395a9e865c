"""Accelerate: updates that are skipped or refused, and what they leave alone."""

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("accelerate")
import distclip
from distclip.application.stepping import StepHandle
from distclip.errors import NonFiniteGradientError
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    SkipAbove,
    adamw,
    batch,
    by_hook,
    by_norm,
    clip_all,
    local_gradients,
    loss_of,
    make,
    mine,
    prepared,
    same,
    sgd,
    snapshot,
    start,
    whole,
)

LR = 0.5


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("explicit", [True, False], ids=["call", "hook"])
@pytest.mark.parametrize("reason", ["nan", "policy"])
def test_a_skipped_update_leaves_everything_alone(layout: str, explicit: bool, reason: str) -> None:
    config = {"policy": {"name": "measure"}, "on_nonfinite": "skip"}
    accelerator, handle, model, optimizer = prepared(
        layout, config if reason == "nan" else SkipAbove(100.0), adamw
    )
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.9**step)
    )
    reference = Reference(plain := make(), adamw(plain))
    for number, factor in enumerate([1.0, math.nan if reason == "nan" else 1e6, 1.0, 1.0]):
        skipped = factor != 1.0
        before = whole(model), snapshot(optimizer), scheduler.get_last_lr()
        loss = loss_of(model, mine(batch(number)))
        # The trouble is on the last rank alone; the others have to know.
        accelerator.backward(loss * (factor if dist.get_rank() + 1 == dist.get_world_size() else 1))
        gradients = local_gradients(model)
        if explicit:
            clip_all(accelerator, model)
        optimizer.step()
        scheduler.step()
        assert accelerator.optimizer_step_was_skipped is skipped
        assert bool(handle.last_report.skipped) is skipped
        torch.testing.assert_close(local_gradients(model), gradients, equal_nan=True)
        optimizer.zero_grad()
        if skipped:
            after = whole(model), snapshot(optimizer), scheduler.get_last_lr()
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            reference.optimizer.param_groups[0]["lr"] = before[2][0]
            reference.update(1.0, loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(2)
@LAYOUTS
@pytest.mark.parametrize("explicit", [True, False], ids=["call", "hook"])
def test_an_error_is_raised_on_all_ranks_and_the_next_update_is_sound(
    layout: str, explicit: bool
) -> None:
    accelerator, _, model, optimizer = prepared(layout, Halve())
    before = whole(model)
    bad = math.nan if dist.get_rank() == 0 else 1.0
    accelerator.backward(loss_of(model, mine(batch(0))) * bad)
    with pytest.raises(NonFiniteGradientError, match=r"body\.weight"):
        clip_all(accelerator, model) if explicit else optimizer.step()
    same(whole(model), before, 0.0)
    optimizer.zero_grad()
    reference = Reference(plain := make(), sgd(plain))
    (by_norm if explicit else by_hook)(accelerator, model, optimizer, mine(batch(1)))
    reference.update(0.5, loss_of(plain, batch(1)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1)
def test_a_skip_reaches_a_scheduler_of_an_optimizer_that_is_wrapped_twice() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, SkipAbove(1e-9))
    raw = make()
    model = accelerator.prepare_model(raw)
    inner = accelerator.prepare_optimizer(sgd(raw))
    outer = accelerator.prepare(inner)
    by_hook(accelerator, model, outer, batch(0))

    assert inner.step_was_skipped
    assert outer.step_was_skipped


def stepping(skips: Iterable[bool] | None = None) -> Callable[..., Any]:
    """A `clip` that halves, or skips as told."""
    plan = None if skips is None else iter(skips)

    def clip(optimizer: torch.optim.Optimizer) -> Any:
        def decide(loss_scale: Tensor | None, found_inf: Tensor | None, coming: Any) -> Any:
            if plan is not None:
                flag = torch.tensor(next(plan))
                return SimpleNamespace(skipped=flag, leave_out=flag)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            return None

        return decide

    return clip


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter group, gradients or not, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_a_skip_gives_group_counters_back() -> None:
    model = make()
    optimizer = Counting(model.parameters(), lr=LR)
    skipped: list[Any] = []
    StepHandle(optimizer, stepping([False, True, False])(optimizer), skipped.append)
    for _ in range(3):
        loss_of(model, batch(0)).backward()
        optimizer.step()

    assert optimizer.param_groups[0]["k"] == 2
    assert skipped == [False, True, False]


def test_lbfgs_is_clipped_at_each_evaluation() -> None:
    def train(handled: bool) -> dict[str, Tensor]:
        model = make()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        if handled:
            StepHandle(optimizer, stepping()(optimizer))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0))
            (loss if handled else loss * 0.5).backward()
            return loss

        optimizer.step(closure)
        return whole(model)

    same(train(True), train(False))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_skip_within_a_closure(by_keyword: bool) -> None:
    model = make()
    before = whole(model)
    optimizer = adamw(model)
    StepHandle(optimizer, stepping([True])(optimizer))
    closure = lambda: loss_of(model, batch(0)).backward()  # noqa: E731
    optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)

    same(whole(model), before, 0.0)
    assert not optimizer.state
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_that_raised_does_not_bring_old_gradients_back() -> None:
    model = make()
    optimizer = sgd(model)
    StepHandle(optimizer, stepping([True, False])(optimizer))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    (loss_of(model, batch(0)) * math.nan).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    optimizer.zero_grad()
    loss_of(model, batch(0)).backward()
    optimizer.step()

    assert all(torch.isfinite(p).all() for p in model.parameters())


class Idle(torch.optim.AdamW):
    """Stands for a fused kernel on an accelerator: notes what it is told."""

    def step(self, closure: Any = None) -> Any:
        self.told = getattr(self, "found_inf", None)


@pytest.mark.parametrize("scaler", [False, True])
def test_several_handles_take_their_found_inf_back(scaler: bool) -> None:
    optimizer = Idle(make().parameters(), fused=True)
    unread = torch.zeros((), dtype=torch.bool, device="meta")
    flag = SimpleNamespace(skipped=unread, leave_out=unread)
    skipped: list[Any] = []
    handles = [StepHandle(optimizer, lambda *_: flag, skipped.append) for _ in range(2)]
    for _ in range(2):
        if scaler:
            optimizer.found_inf = theirs = torch.zeros((), device="meta")
        optimizer.step()
        assert isinstance(optimizer.told, Tensor)
        assert all(isinstance(each, Tensor) for each in skipped)
        if scaler:
            assert optimizer.found_inf is theirs
            del optimizer.found_inf
        assert not hasattr(optimizer, "found_inf")
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert optimizer.told is None
