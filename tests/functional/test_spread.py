"""The drop-ins on DTensors: as on one device, on every mesh."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.testing import assert_rounded
from tests.functional.drawn import cut, parameter, randn
from tests.helpers.watching import watch
from tests.sharded import mesh_of, shard, whole

CALLS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "norm": lambda listed: distclip.clip_grad_norm_(listed, 1.0),
    "norm p=3": lambda listed: distclip.clip_grad_norm_(listed, 1.0, 3.0),
    "norm p=inf": lambda listed: distclip.clip_grad_norm_(listed, 0.5, math.inf),
    "agc": lambda listed: distclip.clip_grad_agc_(listed, 0.1),
    "agc tensor": lambda listed: distclip.clip_grad_agc_(listed, 0.1, unit="tensor"),
}


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "mixed"])
def test_a_norm_and_then_a_clip_with_it_as_one_clip(layout: str) -> None:
    """As torchtitan does: the norm first, joined over stages by the caller, then the scaling."""
    values = whole(seed=5)
    sharded, alone = shard(layout, values), shard(layout, values)
    for model in (sharded, alone):
        model.set_gradients(values.gradients)
    parameters = list(sharded.parameters.values())
    total = distclip.get_total_norm([p.grad for p in parameters if p.grad is not None])
    distclip.clip_grads_with_norm_(parameters, 0.01, total)
    assert distclip.clip_grad_norm_(alone.parameters.values(), 0.01).item() == total.item()
    for (name, one), (_, other) in zip(
        sharded.local_gradients(), alone.local_gradients(), strict=True
    ):
        if one is not None and other is not None:
            assert_rounded(one, other.double().numpy(), ulps=1.0, coefficient_error=1e-6, name=name)


@pytest.mark.ranks(2)
def test_clip_grads_with_norm_reduces_partial_gradients_first() -> None:
    mesh = mesh_of((2,), ("x",))
    terms = [randn(4, 3, seed=rank) for rank in range(2)]
    parameter = nn.Parameter(DTensor.from_local(randn(4, 3), mesh, [Replicate()], run_check=False))
    parameter.grad = DTensor.from_local(terms[dist.get_rank()], mesh, [Partial()], run_check=False)
    distclip.clip_grads_with_norm_([parameter], 1.0, DTensor.from_local(torch.tensor(4.0), mesh))
    assert parameter.grad.placements == (Replicate(),)
    assert_rounded(
        parameter.grad.to_local(),
        (sum(terms).double() / (4.0 + 1e-6)).numpy(),  # type: ignore[union-attr]
        ulps=2.0,
        coefficient_error=1e-6,
    )


@pytest.mark.ranks(2)
def test_clip_grads_with_norm_talks_to_nobody() -> None:
    sharded = shard("fsdp2", values := whole(seed=5))
    sharded.set_gradients(values.gradients)
    parameters = list(sharded.parameters.values())
    for _ in range(2):
        with watch() as seen:
            distclip.clip_grads_with_norm_(parameters, 1.0, 2.0)
    assert seen.collectives == []


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "tp", "replicate", "fsdp2_tp", "mixed"])
def test_dtensors_as_on_one_device(layout: str) -> None:
    values = whole(seed=5)
    sharded = shard(layout, values)
    alone = shard("plain", values)
    for label, call in CALLS.items():
        for model in (sharded, alone):
            model.set_gradients(values.gradients)
        norm, want = (call(list(model.parameters.values())) for model in (sharded, alone))
        assert not isinstance(norm, DTensor)
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0.0, msg=label)
        clipped = {name: p.grad for name, p in alone.parameters.items()}
        for name, gradient, part in sharded.beside(clipped):
            if gradient is not None:
                assert part is not None
                assert_rounded(gradient, part, coefficient_error=1e-6, name=name)
    sharded.set_gradients(values.gradients)
    norms = distclip.grad_norms(sharded.named())
    for name, norm in norms.items():
        gradient = values.gradients[name]
        truth = 0.0 if gradient is None else gradient.double().norm().item()
        assert norm.item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("axis", ["a", "b"])
def test_a_submesh_alone_is_reduced_over_itself(axis: str) -> None:
    """Here the two rows of the grid hold different values: each rank sees its own mesh's norm."""
    mesh = mesh_of((2, 2), ("a", "b"))[axis]
    other = mesh_of((2, 2), ("a", "b"))["b" if axis == "a" else "a"].get_local_rank()
    full = randn(5, 3, seed=other)
    p = parameter(
        distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)], src_data_rank=None),
        distribute_tensor(full.clone(), mesh, [Shard(0)], src_data_rank=None),
    )
    norm = distclip.clip_grad_norm_([p], 1.0)
    assert norm.item() == pytest.approx(full.double().norm().item(), rel=1e-6)
    assert isinstance(p.grad, DTensor)
    torch.testing.assert_close(p.grad.full_tensor(), full / (norm.item() + 1e-6))


@pytest.mark.ranks(2, 3)
def test_partial_tensors_are_summed_before_they_are_measured() -> None:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    terms = [randn(4, 3, seed=rank) for rank in range(dist.get_world_size())]
    partial = DTensor.from_local(terms[dist.get_rank()], mesh, [Partial()], run_check=False)
    other = cut(randn(5, 2, seed=9))
    replica = cut(randn(3, seed=10), Replicate())
    norm = distclip.get_total_norm([partial, other, replica, randn(2, seed=11)])
    parts = [torch.stack(terms).sum(0), randn(5, 2, seed=9), randn(3, seed=10), randn(2, seed=11)]
    truth = math.sqrt(sum(part.double().square().sum().item() for part in parts))
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    assert partial.placements == (Partial(),)


@pytest.mark.ranks(2, 3)
def test_error_if_nonfinite_raises_on_all_ranks() -> None:
    bad = cut(torch.ones(6, 2))
    if dist.get_rank() == 1:
        bad.to_local()[0, 0] = math.nan
    p = parameter(cut(torch.ones(6, 2)), bad)
    good = parameter(torch.ones(2), torch.full((2,), 7.0))
    group = dist.group.WORLD
    for call in (
        lambda: distclip.clip_grad_norm_([good, p], 1.0, error_if_nonfinite=True),
        lambda: distclip.get_total_norm([bad], error_if_nonfinite=True),
        lambda: distclip.clip_grad_norm_(
            [good, p], 1.0, error_if_nonfinite=True, pipeline_group=group
        ),
    ):
        with pytest.raises(distclip.NonFiniteGradientError):
            call()
    assert good.grad is not None
    assert good.grad.tolist() == [7.0, 7.0]
