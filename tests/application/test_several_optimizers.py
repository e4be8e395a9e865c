"""One clipper on several optimizers: one norm, one clip per update, one skip for all."""

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

import distclip
from distclip import ConfigurationError, GradClipper, policies
from tests.application.several import KINDS, ORDERS, Seen, assert_same, loss_of, model_of, pair_of
from tests.sharded import mesh_of

MAX_NORM = 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_all_step_with_the_joint_clip_in_any_order(kind: str, order: tuple[int, int]) -> None:
    model, reference, seen, want = model_of(), model_of(), Seen(), []
    pair, theirs = pair_of(model, kind), pair_of(reference, kind)
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(reference, step).backward()
        want.append(nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM).item())
        for number in order if step < 2 else reversed(order):
            pair[number].step()
            theirs[number].step()
            pair[number].zero_grad()
            theirs[number].zero_grad()
    assert seen.norms == pytest.approx(want, rel=1e-5)
    assert_same(model, reference)


def test_closures_evaluate_anew_and_are_clipped_anew() -> None:
    model, reference, seen = model_of(), model_of(), Seen()
    pair, theirs = pair_of(model, "muon"), pair_of(reference, "muon")
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)

    def evaluated(which: nn.Module, step: int, clip: bool) -> Callable[[], Any]:
        def closure() -> Tensor:
            which.zero_grad()
            loss = loss_of(which, step)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(which.parameters(), MAX_NORM)
            return loss

        return closure

    for step in range(2):
        for number in (0, 1):
            pair[number].step(evaluated(model, step, False))
            theirs[number].step(evaluated(reference, step, True))
    assert len(seen.norms) == 4
    assert_same(model, reference)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_alternating_steps_each_after_its_own_backward(
    to_none: bool, scaled: bool, fused: bool
) -> None:
    """As of a GAN: a step after a new backward is a new update, whoever steps."""
    models, references, seen = [model_of(1), model_of(2)], [model_of(1), model_of(2)], Seen()
    pair = [AdamW(m.parameters(), lr=0.01, eps=1.0, fused=fused) for m in models]
    theirs = [AdamW(m.parameters(), lr=0.01, eps=1.0) for m in references]
    GradClipper(models, policies.global_norm(MAX_NORM), sinks=[seen]).attach(pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    turns = [0, 1, 0, 1, 1, 0, 0]
    for step, turn in enumerate(turns):
        for optimizer in (*pair, *theirs):
            optimizer.zero_grad(set_to_none=to_none)
        scaler.scale(loss_of(models[turn], step)).backward()
        scaler.step(pair[turn])
        if step == len(turns) - 1 or turns[step + 1] == turn or turn == 1:
            scaler.update()
        loss_of(references[turn], step).backward()
        nn.utils.clip_grad_norm_(references[turn].parameters(), MAX_NORM)
        theirs[turn].step()
        assert len(seen.norms) == step + 1
    for mine, reference in zip(models, references, strict=True):
        assert_same(mine, reference)


def test_an_optimizer_that_sits_out_some_updates() -> None:
    model, reference, seen = model_of(), model_of(), Seen()
    pair, theirs = pair_of(model, "muon"), pair_of(reference, "muon")
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)
    for step, turns in enumerate([(0, 1), (0,), (1, 0), (1,), (1,), (0, 1)]):
        loss_of(model, step).backward()
        loss_of(reference, step).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
        for number in turns:
            pair[number].step()
            theirs[number].step()
        model.zero_grad()
        reference.zero_grad()
        assert len(seen.norms) == step + 1
    assert_same(model, reference)


def test_gradients_that_are_views_of_one_buffer() -> None:
    """They count their changes together: a fused step of one seems to change the other's."""
    model, seen = model_of(), Seen()
    pair = pair_of(model, "fused")
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)
    parameters = list(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        buffer = torch.randn(sum(p.numel() for p in parameters))
        for parameter, part in zip(
            parameters, buffer.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        scaler.scale(torch.ones(()))
        for optimizer in pair:
            if step == 1:
                scaler.step(optimizer)
            else:
                optimizer.step()
        if step == 1:
            scaler.update()
    assert len(seen.norms) == 3


def test_a_scheduler_and_a_step_that_clips_once() -> None:
    model, seen = model_of(), Seen()
    pair = pair_of(model, "muon")
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in pair]
    GradClipper(model, policies.zclip(warmup_steps=2), sinks=[seen]).attach(*pair)
    for step in range(3):
        loss_of(model, step).backward()
        for optimizer, scheduler in zip(pair, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
    assert len(seen.norms) == 3


def test_remove_takes_the_hooks_off_all() -> None:
    model, seen = model_of(), Seen()
    pair = pair_of(model, "mixed")
    clipper = GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen])
    handle = clipper.attach(*pair)
    assert handle.active
    handle.remove()
    assert not handle.active
    loss_of(model, 0).backward()
    for optimizer in pair:
        optimizer.step()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert seen.norms == []
    clipper.attach(*pair).remove()


def test_what_attach_refuses() -> None:
    model = model_of()
    pair = pair_of(model, "muon")
    clipper = GradClipper(model, policies.global_norm(1.0))
    stranger = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    for given, words in (
        (([],), "an empty list"),
        ((*pair, pair[0]), "optimizer 2 is given twice"),
        ((*pair, stranger), r"the optimizer \(number 2, SGD\) steps none"),
        ((*pair, nn.Linear(1, 1)), "got a Linear"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            clipper.attach(*given)  # type: ignore[arg-type]
        assert not any(o._optimizer_step_pre_hooks for o in pair)
    clipper.attach(pair[0])
    with pytest.raises(ConfigurationError, match=r"clipper\.attach\(first, second\)"):
        clipper.attach(pair[1])


def test_a_scale_set_by_hand_on_one_of_them_is_refused() -> None:
    model = model_of()
    pair = pair_of(model, "fused")
    GradClipper(model, policies.global_norm(1.0)).attach(*pair)
    loss_of(model, 0).backward()
    pair[1].grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="optimizers 0 and 1"):
        pair[0].step()


@pytest.mark.parametrize("way", ["constructor", "attach"])
def test_group_norm_numbers_the_groups_through(way: str) -> None:
    model, reference = model_of(), model_of()
    pair = pair_of(model, "muon")
    pair[1].add_param_group({"params": [p := nn.Parameter(torch.ones(3))]})
    given = [*model.parameters(), p]
    together = list(pair) if way == "constructor" else None
    clipper = GradClipper(given, policies.group_norm(MAX_NORM), optimizer=together)
    if way == "attach":
        clipper.attach(*pair)
    loss_of(model, 0).backward()
    p.grad = torch.full((3,), 2.0)
    loss_of(reference, 0).backward()
    for dims in (2, 1):
        nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.ndim == dims], MAX_NORM)
    clipper.clip_() if way == "constructor" else [optimizer.step() for optimizer in pair]
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert p.grad.norm().item() == pytest.approx(MAX_NORM, rel=1e-4)


def test_a_parameter_that_nobody_steps_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "distclip")
    model = model_of()
    pair = pair_of(model, "muon")
    clipper = GradClipper(model, policies.global_norm(1.0))
    clipper.attach(*pair).remove()
    assert caplog.text == ""
    clipper.attach(pair[0]).remove()
    assert "no attached optimizer steps '0.bias', '2.bias'" in caplog.text
    assert len(caplog.records) == 1
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    GradClipper(model, policies.global_norm(1.0)).attach(pair[0])
    assert len(caplog.records) == 1


@pytest.mark.ranks(2, 3)
def test_on_shards() -> None:
    model, reference, seen = model_of(), model_of(), Seen()
    theirs = pair_of(reference, "fused")
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    pair = pair_of(model, "fused")
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)
    for step, order in enumerate(itertools.islice(itertools.cycle(ORDERS), 4)):
        loss_of(model, step).backward()
        loss_of(reference, step).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM)
        for number in order:
            pair[number].step()
            theirs[number].step()
        model.zero_grad()
        reference.zero_grad()
        assert len(seen.norms) == step + 1
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), other, rtol=2e-5, atol=1e-6)


@pytest.mark.ranks(2, 3, timeout=20)
def test_an_optimizer_whose_gradients_change_on_one_rank_only() -> None:
    """Experts that got no token on the other ranks: all ranks begin the new update together."""
    rank = dist.get_rank()
    dense, expert = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3) * (rank + 1))
    distclip.declare_sharded(expert, dist.group.WORLD)
    pair = SGD([dense], lr=0.1), SGD([expert], lr=0.1)
    seen = Seen()
    named = [("dense", dense), ("expert", expert)]
    GradClipper(named, policies.global_norm(1.0), sinks=[seen]).attach(*pair)
    for step in range(3):
        dense.grad, expert.grad = torch.full((4,), 3.0), None
        pair[0].step()
        assert len(seen.norms) == 2 * step + 1
        dense.grad = None
        if rank == 1:
            expert.grad = torch.full((3,), 5.0)
        pair[1].step()
        assert len(seen.norms) == 2 * step + 2
        assert seen.norms[-1] == pytest.approx(math.sqrt(75.0))
