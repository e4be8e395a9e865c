"""Folding on several ranks: all do the same, however their parts of the gradients look."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from distclip import GradClipper, policies
from distclip.policies import Policy
from tests.sharded import mesh_of

LAST = policies.global_norm(0.3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "policy",
    [
        policies.chain(policies.value(1e6), LAST),  # of copies one is measured
        policies.chain(policies.by_name({"shards": policies.value(2.0)}), LAST),
        policies.chain(policies.by_name({"shards": policies.agc(0.5)}), LAST),
    ],
    ids=["value of all", "value", "agc"],
)
def test_copies_stay_the_same_bit_by_bit(policy: Policy) -> None:
    """A step that multiplies rounds otherwise than a clipper: on every rank, or on none.

    Of the gradient that is cut, only rank 0 has rows with something to clip.
    """
    mesh = mesh_of((2,), ("ranks",))
    generator = torch.Generator().manual_seed(0)
    ones, rows = torch.ones(40, 1), torch.ones(40, 1)
    rows[20:] = 1e-3

    def drawn(kind: Placement, factor: Tensor) -> DTensor:
        return distribute_tensor(torch.randn(40, 50, generator=generator) * factor, mesh, [kind])

    copies, shards = nn.Parameter(drawn(Replicate(), ones)), nn.Parameter(drawn(Shard(0), ones))
    optimizer = torch.optim.AdamW([copies, shards], lr=0.1, eps=1.0, fused=True)
    GradClipper([("copies", copies), ("shards", shards)], policy).attach(optimizer)
    for _ in range(2):
        copies.grad, shards.grad = drawn(Replicate(), 0.01 * ones), drawn(Shard(0), 10 * rows)
        optimizer.step()
        for tensor in (copies.detach(), copies.grad):
            here = tensor.to_local()
            found = [torch.empty_like(here) for _ in range(2)]
            dist.all_gather(found, here)
            assert torch.equal(*found)
