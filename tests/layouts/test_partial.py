"""Gradients that autograd left ``Partial``, in passes that need nothing from other ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import GradClipper, policies
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import mesh_of

SECONDS = 20
HOW = pytest.mark.parametrize("how", ["function", "value", "rows"])


def pair(placement: Any) -> tuple[nn.Parameter, nn.Parameter]:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    ones = distribute_tensor(torch.ones(5, 4), mesh, [placement], src_data_rank=None)
    return nn.Parameter(ones), nn.Parameter(torch.ones(3, 2))


def clipping(how: str, p: Tensor, q: Tensor) -> Any:
    """Clips to 0.5 each element, or to norm 1 each row."""
    if how == "function":
        return lambda: distclip.clip_grad_value_([p, q], 0.5)
    policy = policies.value(0.5) if how == "value" else policies.agc(0.5)
    return GradClipper([("w", p), ("q", q)], policy, norms=False, on_nonfinite="pass").clip_


def clipped(how: str, whole: Tensor) -> Tensor:
    if how != "rows":
        return whole.clamp(-0.5, 0.5)
    return whole * (1.0 / whole.norm(dim=1, keepdim=True)).clamp(max=1.0)


def terms() -> list[Tensor]:
    return [
        torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))
        for rank in range(dist.get_world_size())
    ]


def partial(term: Tensor, p: DTensor) -> Any:
    return DTensor.from_local(term.clone(), p.device_mesh, [Partial()], run_check=False)


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
@HOW
def test_of_a_replicated_tensor_they_are_reduced_by_all_ranks(how: str) -> None:
    """Also where one rank lacks it; where nobody has one, and where none is Partial."""
    rank = dist.get_rank()
    p, q = pair(Replicate())
    act = clipping(how, p, q)
    for lacking in (None, 1, None, 0):
        p.grad = None if rank == lacking else partial(terms()[rank], p)
        whole = torch.stack([t for r, t in enumerate(terms()) if r != lacking]).sum(0)
        act()
        assert isinstance(p.grad, DTensor)
        assert p.grad.placements == (Replicate(),)
        torch.testing.assert_close(p.grad.to_local(), clipped(how, whole))
    p.grad = None
    act()
    assert p.grad is None
    p.grad = distribute_tensor(torch.full((5, 4), 9.0), p.device_mesh, [Replicate()])
    act()
    torch.testing.assert_close(p.grad.to_local(), clipped(how, torch.full((5, 4), 9.0)))


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
@HOW
@pytest.mark.parametrize("lacking", [None, 1])
def test_of_a_sharded_tensor_they_are_refused(how: str, lacking: int | None) -> None:
    """No rank waits for another: those that have one raise, with the mend, and change nothing."""
    p, q = pair(Shard(0))
    act = clipping(how, p, q)
    act()
    rank = dist.get_rank()
    p.grad = None if rank == lacking else partial(terms()[rank], p)
    q.grad = torch.full((3, 2), 9.0)
    if rank == lacking:
        act()
    else:
        name = "'0'" if how == "function" else "'w'"
        with pytest.raises(distclip.UnsupportedGradientError, match=f"{name} .*redistribute"):
            act()
        assert bool((q.grad == 9.0).all())
        assert torch.equal(p.grad.to_local(), terms()[rank])  # type: ignore[union-attr]
    dist.barrier()
    if lacking is None:  # the mend of the message
        p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[union-attr]
        act()
        full = clipped(how, torch.stack(terms()).sum(0))
        torch.testing.assert_close(p.grad.full_tensor(), full)


@pytest.mark.ranks(2, timeout=SECONDS)
@HOW
def test_what_travels(how: str) -> None:
    """Where a mesh replicates a flag and the two numbers by which ranks find that they disagree
    (beside the numbers that rows decide by); else nothing."""
    for placement in (Shard(0), Replicate()):
        p, q = pair(placement)
        p.grad = distribute_tensor(torch.ones(5, 4), p.device_mesh, [placement])
        act = clipping(how, p, q)
        act()  # the replica check, the first agreement
        with watch() as seen:
            act()
        travels = [] if placement == Shard(0) else [REDUCTION]
        assert seen.collective_names == travels
        assert sum(size for _, size in seen.collectives) <= 8 * 7


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_rank_that_has_forgotten_its_session_goes_on_like_the_others() -> None:
    """Once gradients were Partial, all bring them into place before anything is reduced."""
    p, q = pair(Replicate())
    for step in range(4):
        if step == 2 and dist.get_rank() == 0:
            distclip.functional.clear_cache()
        p.grad, q.grad = partial(terms()[dist.get_rank()], p), torch.zeros(3, 2)
        norm = distclip.clip_grad_norm_([p, q], 0.5)
        whole = torch.stack(terms()).sum(0)
        torch.testing.assert_close(norm, whole.norm())
        torch.testing.assert_close(p.grad.to_local(), whole * 0.5 / (whole.norm() + 1e-6))


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_rank_that_cannot_take_part_says_so_when_they_would_be_moved() -> None:
    p, q = pair(Replicate())
    for _ in range(2):
        p.grad, q.grad = partial(terms()[dist.get_rank()], p), torch.ones(3, 2)
        distclip.clip_grad_norm_([p, q], 0.5)
    p.grad, q.grad = partial(terms()[dist.get_rank()], p), torch.ones(3, 2)
    if dist.get_rank() == 0:
        q._in_backward_optimizers = [object()]  # type: ignore[attr-defined]
    with pytest.raises(distclip.DistclipError, match="during backward"):
        distclip.clip_grad_norm_([p, q], 0.5)
    assert torch.equal(p.grad.to_local(), terms()[dist.get_rank()])
    dist.barrier()
