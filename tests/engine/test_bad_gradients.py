"""Gradients that cannot be measured are refused on all ranks, before any changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import (
    GradClipper,
    UnsupportedGradientError,
    policies,
)
from tests.engine.bad_input import plain, refused, sharded
from tests.helpers.watching import bits, same_bits
from tests.sharded import mesh_of

SECONDS = 20
"""A hang is a failure, and not a long wait."""


def freed(*shape: int) -> nn.Parameter:
    """With a gradient whose memory is gone."""
    result = plain(*shape)
    assert result.grad is not None
    result.grad.untyped_storage().resize_(0)
    return result


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("how", ["clipper", "norm", "agc", "group"])
@pytest.mark.parametrize("kind", ["freed", "plain for a DTensor", "max", "DTensor for a plain"])
def test_a_gradient_that_one_rank_cannot_measure(how: str, kind: str) -> None:
    """All ranks raise, the one concerned by name, and no gradient has changed."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    mine = dist.get_rank() == 1
    good, bad = sharded(4, 3), plain(5, 3)
    if kind == "freed":
        bad = freed(5, 3) if mine else bad
    elif kind == "DTensor for a plain":
        if mine:
            bad.grad = DTensor.from_local(torch.ones(5, 3), mesh, [Replicate()], run_check=False)
    else:
        bad = sharded(4, 3)
        if mine and kind == "max":
            local = torch.ones(4, 3)
            bad.grad = DTensor.from_local(local, mesh, [Partial("max")], run_check=False)
        elif mine:
            bad.grad = torch.ones(4, 3)
    before = [bits(p.grad) if p is not bad or not mine else None for p in (good, bad)]
    if how == "clipper":
        clipper = GradClipper([("good", good), ("bad", bad)], policies.global_norm(1.0))
        act: Callable[[], object] = clipper.clip_
    elif how == "norm":
        act = lambda: distclip.clip_grad_norm_([good, bad], 1.0)  # noqa: E731
    elif how == "agc":
        act = lambda: distclip.clip_grad_agc_([good, bad], 0.01)  # noqa: E731
    else:
        group = dist.group.WORLD
        act = lambda: distclip.clip_grad_norm_([good, bad], 1.0, pipeline_group=group)  # noqa: E731
    message = refused(act, UnsupportedGradientError)
    word = "'bad'" if how == "clipper" else "'1'"
    assert (word in message) if mine else ("another rank" in message), message
    after = [bits(p.grad) if p is not bad or not mine else None for p in (good, bad)]
    assert all(map(same_bits, before, after))


@pytest.mark.ranks(2)
def test_a_sparse_shard_is_named() -> None:
    """Its sharding is the parameter's own, so only a look at the shard itself tells."""
    mesh = mesh_of((2,), ("x",))
    parameters = [
        (name, nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])))
        for name in ("first", "second")
    ]
    clipper = GradClipper(parameters, policies.global_norm(1.0))
    for _, parameter in parameters:
        parameter.grad = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    bad: Any = parameters[1][1].grad
    owner: Any = parameters[1][1]
    bad._spec = owner._spec
    for layout in (torch.sparse_coo, torch.sparse_csr):
        bad._local_tensor = torch.ones(4, 8).to_sparse(layout=layout)
        refused(clipper.clip_, UnsupportedGradientError, "'second'", "sparse")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_tensor_of_another_kind_is_named() -> None:
    """Such a one cannot be a parameter's gradient."""
    rows = torch.ones(5, 3).to_sparse(layout=torch.sparse_csr)
    refused(lambda: distclip.get_total_norm([rows]), UnsupportedGradientError, "'0'", "sparse")


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=str)
def test_partial_gradients_are_reduced_first(op: str, placement: Any) -> None:
    world = dist.get_world_size()
    mesh = mesh_of((world,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh, [placement]))
    terms = [
        torch.randn(5, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(world)
    ]
    p.grad = DTensor.from_local(terms[dist.get_rank()], mesh, [Partial(op)], run_check=False)
    whole = torch.stack(terms).double().sum(0) / (world if op == "avg" else 1)
    report = GradClipper([("w", p)], policies.global_norm(0.5)).clip_()
    assert report.total_norm.item() == pytest.approx(whole.norm().item(), rel=1e-5)
    assert isinstance(p.grad, DTensor)
    assert p.grad.placements == p.placements
    want = whole * 0.5 / (whole.norm() + 1e-6)
    torch.testing.assert_close(p.grad.full_tensor().double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.ranks(2, timeout=SECONDS)
@pytest.mark.parametrize("op", ["max", "min", "product"])
def test_partial_gradients_that_no_sum_completes_are_refused(op: str) -> None:
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial(op)], run_check=False)
    clipper = GradClipper([("w", p)], policies.global_norm(0.5))
    refused(clipper.clip_, UnsupportedGradientError, "'w'", "redistribute")
    gradient = p.grad
    refused(lambda: distclip.get_total_norm([gradient]), UnsupportedGradientError, "redistribute")


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_partial_parameter_is_refused() -> None:
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    refused(
        lambda: GradClipper([("w", p)], policies.measure()),
        UnsupportedGradientError,
        "'w'",
        "Partial",
    )
