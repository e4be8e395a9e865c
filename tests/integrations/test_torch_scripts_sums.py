"""Plain torch scripts: gradients that are partial, summed up or scaled when a call clips them."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distclip import policies
from tests.integrations.accelerated import (
    Halve,
    batch,
    loss_of,
    make,
    same,
    sgd,
    snapshot,
    whole,
)
from tests.integrations.scripted import (
    by_utils,
    measuring,
    mine,
    never,
    of_two,
    plain,
    reference,
    running,
    train,
    wrapped,
)


@pytest.mark.ranks(1, 2)
def test_micro_batches(world_size: int) -> None:
    """A call after each of them clips the sum of the first update twice, and then once a step."""
    layout = "one" if world_size == 1 else "fsdp2"
    wanted, _ = reference(0.5, 4)
    found, *_, count = train(layout, Halve(), never, steps=4, micro=2)
    same(found, wanted)
    assert count == 4
    with running(Halve()) as scripts:
        model = wrapped(layout, make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            for part in mine(batch(number)).chunk(2):
                (loss_of(model, part) / 2).backward()
                norm = plain(by_utils(model))
            whole_norm = plain(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert norm == pytest.approx(whole_norm)
            stepper.step()
            assert scripts.last_report.total_norm.item() == pytest.approx(norm)
            half = plain(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert half == pytest.approx(norm / 2)
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 5
        assert "late" in scripts._said


@pytest.mark.ranks(2)
def test_gradients_that_are_not_reduced_are_only_measured() -> None:
    wanted, _ = reference(0.5, 4)
    with running(Halve()) as scripts:
        model = wrapped("ddp", make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            first, second = mine(batch(number)).chunk(2)
            with model.no_sync():
                (loss_of(model, first) / 2).backward()
            assert by_utils(model) > 0
            (loss_of(model, second) / 2).backward()
            by_utils(model)
            stepper.step()
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("first", [0, 2])
def test_one_rank_alone_may_measure_what_is_not_sharded(first: int) -> None:
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    with running(policy):
        model = wrapped("ddp", make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            loss_of(model, mine(batch(number))).backward()
            if dist.get_rank() == 0 and number >= first:
                assert measuring(model).item() == pytest.approx(norms[number], rel=1e-5)
            stepper.step()
    same(whole(model), wanted, 2e-6)


@pytest.mark.ranks(2)
def test_a_forward_without_gradients_says_nothing_about_the_backward_before_it() -> None:
    """The clipped norm is that of both optimizers; without the call each has its own."""
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, _ = reference(policy, 4)
    with running(policy) as scripts:
        model = wrapped("ddp", make())
        pair = of_two(model.module)
        for number in range(4):
            model.zero_grad()
            first, second = mine(batch(number)).chunk(2)
            with model.no_sync():
                (loss_of(model, first) / 2).backward()
            with torch.no_grad():
                model(first)
            assert by_utils(model) > 0
            assert len(scripts._clippers.known) == (number > 0)
            (loss_of(model, second) / 2).backward()
            with torch.no_grad():
                model(first)
            by_utils(model)
            for stepper in pair:
                stepper.step()
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted, 2e-6)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("order", ["never", "unscaled", "scaled"])
def test_a_gradient_scaler(world_size: int, order: str) -> None:
    """Norms are of unscaled gradients, an overflow is no error, and drops the whole step."""
    layout = "one" if world_size == 1 else "ddp"
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    with running(policy):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        model = wrapped(layout, make())
        stepper = sgd(model)
        seen = []
        for number in (0, 1, "overflow", 2, 3):
            stepper.zero_grad()
            loss = loss_of(model, mine(batch(0 if number == "overflow" else number)))
            scaler.scale(loss * (math.inf if number == "overflow" else 1)).backward()
            if order == "unscaled":
                scaler.unscale_(stepper)
            norm = None if order == "never" else by_utils(model)
            before = snapshot(stepper)
            scaler.step(stepper)
            scaler.update()
            if number == "overflow":
                assert len(snapshot(stepper)) == len(before)
                assert all(map(torch.equal, snapshot(stepper), before))
            elif norm is not None:
                seen.append(norm.item())
        assert seen == pytest.approx([] if order == "never" else norms, rel=1e-5)
    same(whole(model), wanted, 2e-6)


def test_an_optimizer_without_the_scaler_of_another() -> None:
    """Each is clipped to 1e-3, in the first update and later, whichever of them comes first."""
    for scaled_first in (True, False):
        with running(policies.global_norm(1e-3)):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            models = [make(1), make(2)]
            pair = [sgd(model) for model in models]
            for number in range(3):
                for turn in (0, 1) if scaled_first else (1, 0):
                    model, stepper = models[turn], pair[turn]
                    stepper.zero_grad()
                    loss = loss_of(model, batch(number))
                    (loss if turn else scaler.scale(loss)).backward()
                    norm = by_utils(model)
                    true = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                    if number and turn:
                        assert norm > true  # clipped there and then
                    stepper.step() if turn else scaler.step(stepper)
                    after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                    assert after.item() == pytest.approx(1e-3, rel=1e-2)
                scaler.update()


@pytest.mark.parametrize("several", [False, True])
def test_micro_batches_under_a_gradient_scaler(several: bool) -> None:
    """One clip an update, of the whole sum, also where two optimizers are clipped as one."""
    wanted, _ = reference(0.5, 4)
    with running(Halve()) as scripts:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = make()
        steppers = of_two(model) if several else [sgd(model)]
        for number in range(4):
            model.zero_grad()
            for part in batch(number).chunk(2):
                scaler.scale(loss_of(model, part) / 2).backward()
                norm = by_utils(model)
            for stepper in steppers:
                scaler.step(stepper)
            scaler.update()
            assert scripts.last_report.total_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted, 2e-6)


def test_what_is_clipped_late_is_what_the_script_clips() -> None:
    with running(policies.global_norm(1e-3)):
        model = make()
        stepper = sgd(model)
        for _ in range(3):
            stepper.zero_grad()
            for part in batch(0).chunk(2):
                loss_of(model, part).backward()
                by_utils(model.body)
            left = [p.grad.clone() for p in model.head.parameters()]
            stepper.step()
            assert all(map(torch.equal, left, [p.grad for p in model.head.parameters()]))
            norm = nn.utils.get_total_norm([p.grad for p in model.body.parameters()])
            assert norm.item() == pytest.approx(1e-3, rel=1e-2)
