"""All gradients at once are the gradients that the pieces give one by one; or nothing."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distclip.kernels.look import Kinds, Places, look, there
from distclip.layouts import zero
from distclip.layouts.detect import describe
from distclip.layouts.names import named_parameters
from distclip.layouts.plan import Plan, local_plan
from distclip.testing.models.flattened import flatten
from tests.layouts.test_fsdp1 import batch, loss_of, make, mine, wrapped
from tests.sharded import mesh_of, whole


def plan_of(target: Any) -> Plan:
    """Of this rank alone; a GradClipper lets go of the parameters when it goes."""
    _, described = describe(named_parameters(target))
    return local_plan(described, torch.device("cpu"))


def compare(plan: Plan) -> int:
    """How many gradients there are; all as the pieces have them, and as a look describes them."""
    found = plan.fetching()
    assert found is not None
    alone = [piece.gradient() for piece in plan.pieces]
    assert len(found.gradients) == len(alone)
    for gradient, expected in zip(found.gradients, alone, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None and expected is not None:
            assert gradient.shape == expected.shape
            assert gradient.data_ptr() == expected.data_ptr()
            assert torch.equal(gradient, expected)
    seen, described = found.seen, look(there(alone))
    assert seen is not None
    assert described is not None
    assert seen.places.addresses.tolist() == described.places.addresses.tolist()
    assert seen.kinds == described.kinds
    assert all(map(torch.equal, seen.tensors, described.tensors))
    return len(seen.tensors)


def test_plain_parameters_some_without_gradient_some_with_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Linear(2, 2).half())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[1].weight.grad = model[1].weight.grad.to(memory_format=torch.channels_last)
    plan = plan_of(model)
    assert compare(plan) == 6
    model[0].weight.grad = None
    assert compare(plan) == 5


def seen(tensors: Sequence[torch.Tensor], before: Places | None = None) -> Places:
    """What a look at tensors finds."""
    found = look(tensors, before)
    assert found is not None
    return found.places


def test_what_an_earlier_step_found_is_taken_over_where_it_is_the_same() -> None:
    tensors = [torch.ones(3), torch.ones(2, 3, 2, 2).half()]
    first = seen(tensors)
    assert seen(tensors, first) is first
    moved = seen([each.clone() for each in tensors], first)
    assert moved is not first
    assert moved.kinds is first.kinds
    assert moved.addresses.tolist() != first.addresses.tolist()
    lasts = tensors[1].as_strided(tensors[1].shape, (12, 1, 6, 3))  # in the same memory
    assert seen([tensors[0], lasts], first).kinds is first.kinds
    assert not seen([tensors[0], lasts], first).row_major
    for others in (
        [tensors[0], tensors[1].view(torch.bfloat16)],
        [tensors[0][:2], tensors[1]],
        tensors[:1],
        [*tensors, torch.ones(2)],
        tensors[::-1],
    ):
        found = seen(others, first)
        assert found.kinds is not first.kinds
        assert found.kinds == seen(others).kinds
        assert found.kinds.sizes.tolist() == [each.nbytes for each in others]
    assert first.at((1,)).kinds is first.at((1,)).kinds
    assert first.at((1,)).kinds == Kinds([torch.float16], np.array([24]), True)
    assert first.at((0, 1)) is first


def test_memory_that_comes_to_be_shared_is_seen_whatever_was_found_before() -> None:
    room = torch.zeros(8)
    apart, shared = [room[:3], room[3:6]], [room[:3], room[2:5]]
    first = seen(apart)
    assert first.apart
    assert not seen(shared, first).apart
    assert seen(apart, seen(shared)).apart


def test_a_main_gradient_stands_for_one_that_is_missing() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    plan = plan_of(parameters)
    parameters[0].grad, parameters[1].main_grad = torch.randn(3), torch.randn(2)  # type: ignore[attr-defined]
    assert compare(plan) == 2


def test_what_has_gaps_or_no_memory_is_left_to_the_pieces() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    plan = plan_of(nn.ParameterList([parameter]))
    parameter.grad = torch.randn(4, 8)[:, ::2]
    assert plan.fetching() is None
    parameter.grad = torch.randn(4, 4).to_sparse()
    assert plan.fetching() is None


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("original", [False, True])
def test_fsdp1(original: bool) -> None:
    model = wrapped(original)
    loss_of(model, mine(batch())).backward()
    plan = plan_of(model)
    assert compare(plan) == len(plan.pieces)
    found = plan.fetching()
    assert found is not None
    assert found.seen is not None
    assert found.seen.whole is not None
    stepped = [p for p in model.parameters() if p.grad is not None]
    assert len(found.seen.whole.tensors) == len(stepped)  # each is looked at once
    assert found.seen.have_memory_of_their_own()
    if not original:
        first, second = stepped[:2]
        kept = second.grad
        shared = torch.zeros(first.numel() + second.numel() - 1)
        first.grad, second.grad = shared[: first.numel()], shared[-second.numel() :]
        found = plan.fetching()
        assert found is not None
        assert found.seen is not None
        assert not found.seen.have_memory_of_their_own()
        second.grad = kept
    model.zero_grad()
    assert plan.fetching() is None  # without a gradient the pieces are asked


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp1_orig"])
def test_fsdp1_of_uneven_parts(layout: str) -> None:
    values = whole()
    flattened = flatten(layout, values)
    flattened.set_gradients(values.gradients)
    plan = plan_of(list(flattened.parameters.items()))
    compare(plan)


@pytest.mark.ranks(2)
def test_fsdp1_under_no_sync_is_left_to_the_pieces() -> None:
    model = wrapped(False, nested=False)
    plan = plan_of(model)
    with model.no_sync():
        loss_of(model, mine(batch())).backward()
    assert plan.fetching() is None


@pytest.mark.ranks(1, 2, 3)
def test_dtensors_beside_plain_tensors_some_without_gradient() -> None:
    model = make()
    fully_shard(model.middle, mesh=mesh_of((torch.distributed.get_world_size(),), ("dp",)))
    loss_of(model, batch()).backward()
    plan = plan_of(model)
    assert compare(plan) == 6
    model.middle.bias.grad = None
    model.head.bias.grad = None
    assert compare(plan) == 4


@pytest.mark.ranks(2)
def test_a_gradient_in_other_placements_is_left_to_the_pieces() -> None:
    from torch.distributed.tensor import Replicate

    model = make()
    fully_shard(model, mesh=mesh_of((2,), ("dp",)))
    loss_of(model, batch()).backward()
    plan = plan_of(model)
    gradient: Tensor = model.body.weight.grad
    model.body.weight.grad = gradient.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
    assert plan.fetching() is None


def stretched(sizes: list[tuple[tuple[int, ...], int, int]]) -> tuple[list[Tensor], list[Any]]:
    """Parameters of these shapes, of which ZeRO has put ``start : stop`` here; and gradients."""
    parameters: list[Tensor] = []
    gradients: list[Any] = []
    for number, (shape, start, stop) in enumerate(sizes):
        parameter = nn.Parameter(torch.randn(shape))
        gradients.append(torch.randn(stop - start))
        fetch = functools.partial(gradients.__getitem__, number)
        stretch = zero.Stretch(start, stop - start, torch.zeros(stop), 0, fetch)
        zero.mark(parameter, zero.Extent((stretch,), (start,) if start else (), (0, 1)))
        parameters.append(parameter)
    return parameters, gradients


def test_stretches_of_zero_are_fetched_once_and_give_every_box() -> None:
    parameters, gradients = stretched([((5, 3), 4, 13), ((4,), 0, 4), ((2, 3, 4), 5, 21)])
    plan = plan_of(parameters)
    assert len(plan.pieces) > 5  # a stretch that begins and ends within rows is several boxes
    assert compare(plan) == len(plan.pieces)
    gradients[2] = gradients[2].double()  # other addresses, and other sizes of elements
    assert compare(plan) == len(plan.pieces)
    gradients[0] = None
    assert 0 < compare(plan) < len(plan.pieces)
    gradients[0] = torch.randn(9)
    assert compare(plan) == len(plan.pieces)


def test_a_gradient_that_has_kept_its_shape_is_its_box() -> None:
    parameters, gradients = stretched([((2, 3, 4, 4), 0, 96), ((4,), 0, 4)])
    plan = plan_of(parameters)
    gradients[0] = torch.randn(2, 3, 4, 4)
    assert compare(plan) == 2
    gradients[0] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert compare(plan) == 2
    found = plan.fetching()
    assert found is not None
    assert found.seen is not None
    assert not found.seen.places.row_major  # so that rows are not looked for where they are not


def test_what_is_odd_in_a_stretch_is_left_to_the_pieces() -> None:
    parameters, gradients = stretched([((5, 3), 4, 13), ((4,), 0, 4)])
    plan = plan_of(parameters)
    for odd in (torch.randn(18)[::2], torch.randn(7), torch.randn(9).to_sparse()):
        gradients[0] = odd
        assert plan.fetching() is None
    gradients[:] = [None, None]
    assert plan.fetching() is None
