"""The 2-norms of gradients on the host, before they are rounded to float32: within 1e-9."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distclip import GradClipper, policies
from tests.sharded import mesh_of

BOUND = 1e-9
SCALES = {
    torch.float32: (1e-30, 1.0, 1e30),
    torch.bfloat16: (1e-30, 1.0),
    torch.float16: (1e-3, 1.0),
}
SHAPES = ((3,), (257, 1031), (1_100_003,))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("dtype", SCALES, ids=str)
def test_norms_within_the_bound(dtype: torch.dtype) -> None:
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    pairs, truth = [], {}
    for number, scale in enumerate(SCALES[dtype]):
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(number)
            # Of one sign and far from each other: sums in float32 lose most there.
            gradient = (torch.rand(shape, generator=generator).square() * scale).to(dtype)
            for cut in (Shard(0), Replicate()):
                name = f"{scale}-{shape}-{cut}"
                parameter = nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, [cut]))
                parameter.grad = distribute_tensor(gradient, mesh, [cut])
                pairs.append((name, parameter))
                # float64 adds a million numbers pairwise to 1e-15; the scale keeps it in range.
                exact = (gradient.double() / scale).square().sum().sqrt() * scale
                truth[name] = exact.item()
    norms = GradClipper(pairs, policies.measure()).clip_().parameter_norms
    errors = {name: abs(norms[name] / truth[name] - 1.0) for name in truth}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= BOUND, (worst, errors[worst])
    assert math.isfinite(sum(norms.values()))
