"""Overlap: parameters that FSDP2 does not manage, and the rest of a clipper."""

import gc
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from distclip import ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.statistics import early
from tests.engine.test_matrix import build
from tests.sharded import mesh_of
from tests.statistics.overlapping import (
    GROUPS,
    TIGHT,
    Model,
    backward,
    clip_and_check,
    full,
    gradients_of,
    hooks_on,
    loss_of,
    make,
    oracle,
    same_on_all_ranks,
    used,
    warm,
)


@pytest.mark.ranks(2)
def test_ignored_parameters() -> None:
    """Plain tensors in an FSDP2 model: the user reduces them after backward."""
    torch.manual_seed(0)
    model: Any = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.middle.parameters()))
    clipper = GradClipper(model, build(TIGHT), overlap=True)
    for number in range(3):
        model.zero_grad()
        backward(model, number)
        for p in model.middle.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        clip_and_check(clipper, model, early=5 if number else 0)


@pytest.mark.ranks(2)
def test_tensor_parallel_parameters_beside_fsdp2() -> None:
    """DTensors whose hooks autograd calls, before anything is known to be reduced."""
    torch.manual_seed(0)
    model: Any = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    parallelize_module(model, mesh, {"body": ColwiseParallel(), "middle": RowwiseParallel()})
    fully_shard(model.head, mesh=mesh)
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith(("embed", "spare"))]
    clipper = GradClipper(named, build(TIGHT), overlap=True)
    assert len(clipper._session.early._handles) == 6  # type: ignore[union-attr]
    for number in range(3):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        before = torch.stack([full(p.grad).double().norm() for _, p in named])  # type: ignore[union-attr]
        report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(before.norm().item(), rel=1e-6)
        same_on_all_ranks(report)
        assert clipper.measured_early == (2 if number else 0)


@pytest.mark.ranks(2)
def test_a_loss_that_reads_sharded_weights() -> None:
    """Autograd adds to the gradient itself, before or after FSDP2 does."""
    model = make()
    clipper = warm(model)
    for number in (1, 2):
        model.zero_grad()
        decay = sum(p.square().sum().full_tensor() for p in model.body.parameters())
        (loss_of(model, number) + 0.1 * decay).backward()
        clip_and_check(clipper, model)


@pytest.mark.ranks(1, 2)
def test_without_fsdp2_it_warns_and_clips() -> None:
    torch.manual_seed(0)
    model = Model()
    with pytest.warns(UserWarning, match="overlap=True has no effect here"):
        clipper = GradClipper(model, build(TIGHT), overlap=True)
    assert hooks_on(model) == 0
    for _ in range(3):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        clip_and_check(clipper, model, early=0)


@pytest.mark.ranks(2)
def test_with_dtensors_but_without_fsdp2_it_warns_once() -> None:
    torch.manual_seed(0)
    model: Any = Model()
    parallelize_module(
        model,
        mesh_of((dist.get_world_size(),), ("dp",)),
        {"body": ColwiseParallel(), "middle": RowwiseParallel()},
    )
    named = [*model.body.named_parameters("body"), *model.middle.named_parameters("middle")]
    clipper = GradClipper(named, build(TIGHT), overlap=True)
    found = []
    for _ in range(4):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clipper.clip_()
        found.append(["no effect" in str(each.message) for each in caught])
    assert found == [[], [True], [], []]


@pytest.mark.ranks(2)
def test_non_finite_gradients() -> None:
    model = make()
    clipper = warm(model)
    with torch.no_grad():
        bias = model.head.bias.to_local().clone()
    backward(model, 1)
    if dist.get_rank() == 0:
        model.head.bias.grad.to_local()[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"head\.bias"):
        clipper.clip_()
    model.zero_grad()
    (loss_of(model, 2) * math.inf).backward()  # this one early, but its samples are not comparable
    with pytest.raises(NonFiniteGradientError):
        clipper.clip_()
    model.zero_grad()
    backward(model, 3)
    clip_and_check(clipper, model, early=used(model))
    assert torch.equal(bias, model.head.bias.to_local().detach())


@pytest.mark.ranks(2)
def test_training_attached_is_that_without() -> None:
    """Folded and not; the policy's memory and its state are the same, and load into one another."""
    for fused in (False, True):
        trained = []
        for overlap in (True, False):
            model = make()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
            clipper = GradClipper(model, policies.autoclip(50.0), overlap=overlap)
            clipper.attach(optimizer)
            for number in range(6):
                optimizer.zero_grad()
                backward(model, number)
                optimizer.step()
            assert clipper.measured_early == (used(model) if overlap else 0)
            trained.append((model, clipper))
        (one, first), (other, second) = trained
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-6, atol=1e-7)
        state = first.state_dict()
        assert state.keys() == second.state_dict().keys()
        second.load_state_dict(state)
        backward(one, 7)
        first.load_state_dict(state)
        clip = first.clip_()
        assert torch.isfinite(clip.total_norm)
        del first, second, trained
        gc.collect()


@pytest.mark.ranks(2)
def test_the_first_pass_of_several() -> None:
    """A later pass measures what the first has made of the gradients."""
    document = [
        {"name": "global_norm", "max_norm": 0.01},
        {"name": "value", "clip_value": 1e-4},
        {"name": "global_norm", "max_norm": 1e-3},
    ]
    model = make()
    clipper = GradClipper(model, build(document), overlap=True)
    assert len(clipper._session.program.passes) == 2
    for number in range(3):
        model.zero_grad()
        backward(model, number)
        want = oracle(document, model, gradients_of(model))
        clipper.clip_()
        for name, gradient in gradients_of(model).items():
            if gradient is not None:
                np.testing.assert_allclose(
                    gradient.numpy(), want.gradients[name], rtol=1e-5, atol=1e-10
                )
        assert clipper.measured_early == (used(model) if number else 0)


@pytest.mark.ranks(2)
def test_attached_between_backward_and_step() -> None:
    """The optimizer's groups change what is measured: what came before does not count."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = GradClipper(
        model, policies.group_norm(0.01, norm_type=1.0), optimizer=optimizer, overlap=True
    )
    for number in range(2):
        model.zero_grad()
        backward(model, number)
        clipper.clip_()
    assert clipper.measured_early == used(model)
    model.zero_grad()
    backward(model, 3)
    clipper.attach(optimizer)
    optimizer.step()
    assert clipper.measured_early == 0


@pytest.mark.ranks(1)
def test_arguments() -> None:
    with pytest.raises(ConfigurationError, match="overlap must be True or False, got 'yes'"):
        GradClipper(nn.Linear(2, 2), policies.measure(), overlap="yes")  # type: ignore[arg-type]


@pytest.mark.ranks(2)
def test_the_model_is_sharded_as_it_says() -> None:
    model = make()
    managed = [name for name, each in model.named_modules() if isinstance(each, FSDPModule)]
    assert sorted(managed) == ["", *sorted(GROUPS)]


@pytest.mark.parametrize("numels", [[1], [0, 3], [7, 8, 9], [100_000, 3], [3_000_000]])
def test_samples(numels: list[int]) -> None:
    """Of every gradient some, of a large one few, none outside."""
    offsets = [0]
    for numel in numels[:-1]:
        offsets.append(offsets[-1] + numel + 5)
    places = early._places(offsets, numels, torch.device("cpu")).tolist()
    for offset, numel in zip(offsets, numels, strict=True):
        mine = [each for each in places if offset <= each < offset + numel]
        assert len(mine) >= min(numel, early.SAMPLES)
        assert len(mine) <= numel / early.SPACING + 2 * early.SAMPLES
    assert len(places) == len({*places})
    assert all(any(o <= e < o + n for o, n in zip(offsets, numels, strict=True)) for e in places)
