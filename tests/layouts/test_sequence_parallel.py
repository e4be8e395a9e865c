"""torch's sequence parallelism: each rank's gradient of a norm layer is of its tokens alone."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import distclip
from distclip import policies
from distclip.testing import expected

POLICY: list[dict[str, Any]] = [
    {"name": "agc", "clip_factor": 0.1},
    {"name": "global_norm", "max_norm": 0.5},
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


PLAN: dict[str, Any] = {
    "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}


def block() -> Block:
    torch.manual_seed(0)
    return Block()


def trained(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return model


@pytest.mark.ranks(2, 4)
def test_partial_gradients_of_norm_layers_are_summed() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    alone = trained(block())
    gradients = {n: p.grad for n, p in alone.named_parameters()}
    want = expected(POLICY, gradients, dict(alone.named_parameters()))
    model = block()
    plan = copy.deepcopy(PLAN)
    parallelize_module(model, mesh, plan | {"": plan[""]})
    parallelize_module(
        model,
        mesh,
        PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
    )
    trained(model)
    partial = [
        name
        for name, p in model.named_parameters()
        if isinstance(p.grad, DTensor) and any(isinstance(x, Partial) for x in p.grad.placements)
    ]
    assert partial, "torch sums them itself now"
    norms = distclip.grad_norms(model)
    for name, norm in norms.items():
        assert float(norm) == pytest.approx(want.parameter_norms[name], rel=1e-5), name
    chain = policies.chain(policies.agc(0.1), policies.global_norm(0.5))
    report = distclip.GradClipper(model, chain).clip_()
    assert float(report.total_norm) == pytest.approx(want.total_norm, rel=1e-5)
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor)
        whole = torch.from_numpy(want.gradients[name]).float()
        torch.testing.assert_close(p.grad.full_tensor(), whole, rtol=1e-5, atol=1e-6)
