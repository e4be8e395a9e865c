"""Copies and pickles of a clipper, and of an optimizer that it is attached to."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW

from distclip import ConfigurationError, GradClipper, policies

NAMES = ("model", "optimizer", "clipper")


def made(policy: Any = None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = AdamW(model.parameters(), lr=0.1, eps=1.0)
    clipper = GradClipper(model, policy or policies.adagc(warmup_steps=2), on_nonfinite="skip")
    clipper.attach(optimizer)
    return {"model": model, "optimizer": optimizer, "clipper": clipper}


def train(things: dict[str, Any], first: int, last: int) -> None:
    for step in range(first, last):
        things["model"].zero_grad()
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        (things["model"](data).square().sum() * 4.0**step).backward()
        things["optimizer"].step()


def weights(things: dict[str, Any]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in things["model"].parameters()]


@pytest.mark.parametrize("policy", [None, policies.group_norm(0.1), policies.global_norm(0.01)])
@pytest.mark.parametrize(
    "order",
    [
        ("model", "optimizer", "clipper"),
        ("clipper", "optimizer", "model"),
        ("model", "clipper", "optimizer"),
        ("model", "optimizer"),
        ("optimizer", "model"),
    ],
    ids="-".join,
)
def test_a_deep_copy_trains_as_the_original_and_apart_from_it(
    order: tuple[str, ...], policy: Any
) -> None:
    things, uninterrupted = made(policy), made(policy)
    train(things, 0, 3)
    copied = dict(zip(order, copy.deepcopy([things[name] for name in order]), strict=True))
    kept, state = weights(things), str(things["clipper"].state_dict())
    train(copied, 3, 6)
    assert all(map(torch.equal, kept, weights(things)))
    assert str(things["clipper"].state_dict()) == state
    train(things, 3, 6)
    train(uninterrupted, 0, 6)
    for each in (things, copied):
        assert all(map(torch.equal, weights(uninterrupted), weights(each)))
    if "clipper" in copied:
        want = str(uninterrupted["clipper"].state_dict())
        assert str(copied["clipper"].state_dict()) == want
        assert copied["clipper"].on_nonfinite == "skip"
        with pytest.raises(ConfigurationError, match="attached already"):
            copied["clipper"].attach(copied["optimizer"])


def test_a_copied_clipper_notices_what_the_original_would() -> None:
    things = made()
    model, clipper = copy.deepcopy((things["model"], things["clipper"]))
    model.new = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"'new\.weight'"):
        clipper.clip_()
    assert clipper._once.handle is not None
    assert not clipper._once.attached  # the copied optimizer was not asked for


def test_a_clipper_by_hand_is_copied_unattached() -> None:
    model = nn.Linear(2, 2)
    clipper = GradClipper(model, policies.global_norm(1.0))
    twin_model, twin = copy.deepcopy((model, clipper))
    twin_model.weight.grad = torch.full((2, 2), 3.0)
    model.weight.grad = torch.full((2, 2), 3.0)
    assert twin.clip_().total_norm == 6.0
    assert twin_model.weight.grad.norm() < 1.001
    assert model.weight.grad.norm() == 6.0


def test_after_remove_a_copied_optimizer_has_no_clipper() -> None:
    things = made()
    things["clipper"]._once.handle.remove()
    twin = copy.deepcopy(things["optimizer"])
    assert not twin._optimizer_step_pre_hooks
    assert "__deepcopy__" not in things["optimizer"].__dict__


def test_of_two_clippers_on_one_optimizer_both_are_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    for part in model:
        GradClipper(part, policies.global_norm(0.1)).attach(optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for p in twin_model.parameters():
        p.grad = torch.ones_like(p)
    twin.step()
    for part in twin_model:
        norm = torch.stack([p.grad.norm() for p in part.parameters()]).norm()
        assert norm.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy])
def test_pickling_is_refused_with_the_mend(way: Any) -> None:
    things = made()
    with pytest.raises(ConfigurationError, match=r"save clipper\.state_dict\(\)"):
        way((things["clipper"],) if way is pickle.dumps else things["clipper"])
    _, optimizer = pickle.loads(pickle.dumps((things["model"], things["optimizer"])))
    # As torch does it: hooks stay behind. docs/reliability.md says so.
    assert not optimizer._optimizer_step_pre_hooks
    assert "__deepcopy__" not in optimizer.__dict__


@pytest.mark.ranks(2, timeout=20)
def test_in_a_distributed_run_the_copy_is_refused_on_the_rank_that_copies() -> None:
    things = made()
    if dist.get_rank() == 1:
        with pytest.raises(ConfigurationError, match="build GradClipper"):
            copy.deepcopy((things["model"], things["clipper"]))
        with pytest.warns(UserWarning, match="the copied optimizer has no step hooks"):
            copy.deepcopy((things["model"], things["optimizer"]))
    train(things, 0, 1)
