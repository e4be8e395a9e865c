"""A policy that reads the loss under Accelerate sees what ``accelerator.backward`` was given."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip import ConfigurationError, policies
from tests.helpers.watching import REDUCTION, watch
from tests.integrations.accelerated import LAYOUTS, batch, loss_of, make, sgd, start, whole

pytest.importorskip("accelerate")
POLICY = policies.skip_spikes(window=8, min_history=4, sigma=6.0, loss=True)


def begin(layout: str, **options: Any) -> Any:
    accelerator = start(layout, **options)
    handle = distclip.accelerate.attach(accelerator, POLICY)
    model, optimizer = accelerator.prepare(model := make(), sgd(model))
    optimizer.param_groups[0]["lr"] = 1e-3  # so that norms and losses change slowly
    return accelerator, handle, model, optimizer


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_a_spike_of_the_loss_on_one_rank_skips_the_update_on_all(layout: str) -> None:
    accelerator, handle, model, optimizer = begin(layout, gradient_accumulation_steps=2)
    for number in range(8):
        before = whole(model)
        for part in range(2):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch(0)) + 0.01 * (number % 3)
                # The gradient is as before: the loss alone is a spike, in one micro-batch of one
                # rank. Ranks see different losses: only their mean is that of all.
                spike = number == 6 and part == 0 and dist.get_rank() == 0
                accelerator.backward(loss + (100.0 if spike else 0.0) + dist.get_rank())
                optimizer.step()
                optimizer.zero_grad()
        assert bool(handle.last_report.skipped) == (number == 6), number
        after = whole(model)
        assert all(torch.equal(before[k], after[k]) for k in before) == (number == 6), number
        assert accelerator.optimizer_step_was_skipped == (number == 6)
    (clipper,) = handle._clippers.known.values()
    state: Any = clipper.state_dict()["states"]
    kept = state[""]["shared"]
    assert kept["losses_seen"] == kept["seen"] == 7
    handle.remove()
    assert "backward" not in accelerator.__dict__


@pytest.mark.ranks(2)
def test_the_loss_rides_on_the_one_all_reduce() -> None:
    accelerator, _, model, optimizer = begin("fsdp2")
    for _ in range(2):
        accelerator.backward(loss_of(model, batch(0)))
        with watch() as seen:
            optimizer.step()
        optimizer.zero_grad()
    assert seen.collective_names == [REDUCTION]


@pytest.mark.ranks(1)
def test_a_script_that_does_not_go_through_the_accelerator() -> None:
    _, handle, model, optimizer = begin("ddp")
    loss_of(model, batch(0)).backward()
    with pytest.warns(UserWarning, match=r"accelerator\.backward\(loss\), or the handle's"):
        optimizer.step()
    for number in range(6):
        loss = loss_of(model, batch(0))
        loss.backward()
        handle.observe(loss.item() + (100.0 if number == 5 else 0.0))
        optimizer.step()
        optimizer.zero_grad()
        assert bool(handle.last_report.skipped) == (number == 5)


@pytest.mark.ranks(1, 2)
def test_several_sets_of_parameters_are_refused_on_all_ranks() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, POLICY)
    models = [make(1), make(2)]
    models[0], models[1], *optimizers = accelerator.prepare(*models, *map(sgd, models))
    for model in models:
        accelerator.backward(loss_of(model, batch(0)))
    optimizers[0].step()
    before = whole(models[1])
    with pytest.raises(ConfigurationError, match="to which of them a loss belongs"):
        optimizers[1].step()
    assert all(torch.equal(before[name], value) for name, value in whole(models[1]).items())


@pytest.mark.ranks(1)
def test_other_policies_leave_backward_alone() -> None:
    accelerator = start("ddp")
    handle = distclip.accelerate.attach(accelerator, policies.zclip())
    assert "backward" not in accelerator.__dict__
    handle.observe(1.0)
    assert not handle._clippers._losses
