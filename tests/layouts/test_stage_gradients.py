"""Pipeline stages: gradients that are missing, partial, or not finite on some ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import GradClipper, policies
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import mesh_of

SECONDS = 60


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_row_26_all_stages_raise_or_none() -> None:
    rank = dist.get_rank()
    stage = nn.ParameterDict({f"own{rank}": nn.Parameter(torch.ones(2))})
    stage[f"own{rank}"].grad = torch.full((2,), math.nan if rank == 1 else 1.0)
    with pytest.raises(distclip.NonFiniteGradientError, match="'own1'"):
        GradClipper([stage], policies.global_norm(1.0)).clip_()
    with pytest.raises(distclip.NonFiniteGradientError):
        distclip.clip_grad_norm_(
            stage.parameters(), 1.0, error_if_nonfinite=True, pipeline_group=dist.group.WORLD
        )
    dist.barrier()


@pytest.mark.ranks(2, 3, 4, timeout=20)
@pytest.mark.parametrize("how", ["clipper", "function"])
def test_row_27_stages_whose_gradients_come_and_go(how: str) -> None:
    """The plan is made from parameters: other gradients on every stage and step, none on some."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shapes = [(3, 2), (4,), (2, 2, 2)]
    stage = nn.ParameterDict(
        {f"s{rank}p{i}": nn.Parameter(torch.ones(shapes[i])) for i in range(1 + (rank + 1) % 3)}
    )
    clipper = GradClipper([stage], policies.chain(policies.agc(10.0), policies.global_norm(0.5)))
    for step in range(4):
        square = 0.0
        for other in range(world):
            for i in range(1 + (other + 1) % 3):
                there = (i + step + other) % 3 > 0 and not (step == 3 and other == 0)
                square += there * math.prod(shapes[i]) * (1.0 + other) ** 2
                if other == rank:
                    p = stage[f"s{rank}p{i}"]
                    p.grad = torch.full_like(p, 1.0 + rank) if there else None
        with watch() as seen:
            if how == "clipper":
                norm = clipper.clip_().total_norm
            else:
                norm = distclip.clip_grad_norm_(
                    stage.parameters(), 0.5, pipeline_group=dist.group.WORLD
                )
        assert seen.collective_names == [REDUCTION]
        assert norm.item() == pytest.approx(math.sqrt(square), rel=1e-6)
        for p in stage.parameters():
            if p.grad is not None:
                want = (1.0 + rank) * min(1.0, 0.5 / (math.sqrt(square) + 1e-6))
                torch.testing.assert_close(p.grad, torch.full_like(p, want))


@pytest.mark.ranks(2, 3, 4, timeout=20)
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
@pytest.mark.parametrize("how", ["clipper", "function", "group"])
def test_a_partial_gradient_that_is_missing_on_one_rank(placement: Any, how: str) -> None:
    """Reducing it is a collective: the rank without it has to hear of it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = mesh_of((world,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh, [placement]))
    q = nn.Parameter(torch.ones(3))
    terms = [torch.randn(5, 4, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    whole = torch.stack([t for r, t in enumerate(terms) if r != 1]).double().sum(0)
    truth = whole.norm().item()
    clipper = GradClipper([("w", p), ("q", q)], policies.global_norm(0.5))
    for step in range(3):
        p.grad = None
        if rank != 1:
            p.grad = DTensor.from_local(terms[rank], mesh, [Partial()], run_check=False)
        if step == 2:  # nobody has it: it stays missing, also where it is expected by now
            p.grad = None
        if how == "clipper":
            norm = clipper.clip_().total_norm
        elif how == "function":
            norm = distclip.clip_grad_norm_([p, q], 0.5)
        else:
            norm = distclip.clip_grad_norm_([p, q], 0.5, pipeline_group=dist.group.WORLD)
        if step == 2:
            assert norm.item() == 0.0
            assert p.grad is None
            continue
        assert norm.item() == pytest.approx(truth, rel=1e-5)
        assert isinstance(p.grad, DTensor)
        want = whole * 0.5 / (truth + 1e-6)
        torch.testing.assert_close(p.grad.full_tensor().double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.ranks(2, timeout=20)
def test_a_gradient_that_lies_differently_on_the_ranks_is_refused_on_all() -> None:
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    placement: Any = Partial() if dist.get_rank() else Replicate()
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [placement], run_check=False)
    with pytest.raises(distclip.UnsupportedGradientError, match=r"'w' is .* on rank 0 but"):
        GradClipper([("w", p)], policies.global_norm(0.5)).clip_()
    dist.barrier()


@pytest.mark.ranks(2, 3, timeout=20)
def test_a_wrong_gradient_where_partial_ones_are_expected_is_told_to_all() -> None:
    """From the second step on gradients are moved before anything is measured."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    clipper = GradClipper([("w", p)], policies.global_norm(0.5))
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    clipper.clip_()
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    if dist.get_rank() == 1:
        p.grad = torch.ones(4, 4)  # type: ignore[assignment]
    with pytest.raises(distclip.UnsupportedGradientError, match="'w' is a DTensor but"):
        clipper.clip_()
    dist.barrier()
