"""What the drop-ins remember of parameters between calls changes no result."""

import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import distclip
from tests.functional.drawn import cut, parameter, plain, randn
from tests.sharded import mesh_of


@pytest.mark.ranks(2)
def test_names_are_the_callers_whatever_was_asked_of_these_parameters_before() -> None:
    pairs = [("first", randn(3).requires_grad_()), ("second", randn(2).requires_grad_())]
    for _, each in pairs:
        each.grad = torch.ones_like(each)
    distclip.clip_grad_norm_([p for _, p in pairs], math.inf, pipeline_group=dist.group.WORLD)
    assert set(distclip.grad_norms(pairs)) == {"first", "second"}
    renamed = [(name.upper(), parameter) for name, parameter in pairs]
    assert set(distclip.grad_norms(renamed)) == {"FIRST", "SECOND"}


@pytest.mark.ranks(1, 2)
def test_gradients_of_an_earlier_call_are_not_measured_again() -> None:
    parameters = plain()
    group = dist.group.WORLD
    for process_group in (None, group, None, group):
        for each in parameters:
            each.grad = torch.randn_like(each)
        distclip.clip_grad_norm_(parameters, 1e9, pipeline_group=process_group)
    parameters[0].grad = None
    parameters[1].grad = torch.full_like(parameters[1], 2.0)
    left = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    norm = distclip.clip_grad_norm_(parameters, 1e9)
    assert norm.item() == pytest.approx(math.sqrt(sum(left)), rel=1e-6)


def test_nothing_is_remembered_between_calls() -> None:
    p = parameter(torch.ones(2), torch.tensor([300.0, 400.0]))
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 400.0
    p.grad = torch.tensor([3.0, 4.0])
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 4.0
    p.grad = None
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 0.0


def test_a_parameter_that_changes_is_seen_as_it_is() -> None:
    """``model.double()`` keeps the parameter and changes what it is."""
    p = parameter(torch.ones(2), torch.full((2,), 3.0))
    distclip.clip_grad_norm_([p], 1.0, 7.0)
    p.data = torch.ones(3, dtype=torch.float64)
    p.grad = torch.full((3,), 1e200, dtype=torch.float64)
    assert distclip.clip_grad_norm_([p], 1.0).item() == pytest.approx(math.sqrt(3) * 1e200)
    p.data = torch.ones(4, 2)
    p.grad = torch.full((4, 2), 9.0)
    distclip.clip_grad_agc_([p], 0.1)
    torch.testing.assert_close(p.grad.norm(dim=1), torch.full((4,), 0.1 * math.sqrt(2)))


@pytest.mark.ranks(1, 2)
def test_parameters_are_not_kept_alive() -> None:
    def use() -> list[weakref.ref[Tensor]]:
        parameters: list[Tensor] = [*plain()]
        if dist.get_world_size() > 1:
            parameters.append(parameter(cut(randn(4, 3)), cut(randn(4, 3))))
        distclip.clip_grad_norm_(parameters, 1.0)
        distclip.clip_grad_agc_(parameters, 1.0)
        distclip.clip_grad_value_(parameters, 1.0)
        distclip.grad_norms([(str(i), p) for i, p in enumerate(parameters)])
        distclip.get_total_norm(p.grad for p in parameters if p.grad is not None)
        kept = [weakref.ref(p) for p in parameters]
        return kept + [weakref.ref(p.grad) for p in parameters if p.grad is not None]

    references = use()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.ranks(2)
def test_a_parameter_that_is_stepped_in_backward_from_now_on_is_noticed() -> None:
    """The drop-ins remember what they know of parameters; this changes it."""
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    distclip.clip_grad_norm_([p], 1.0)
    setattr(p, "_in_backward_optimizers", [object()])  # noqa: B010 - as torch sets it
    with pytest.raises(distclip.UnsupportedGradientError, match="stepped during backward"):
        distclip.clip_grad_norm_([p], 1.0)
