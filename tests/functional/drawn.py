"""Parameters with gradients that are drawn."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.sharded import mesh_of


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = []
    for number, shape in enumerate([(7, 5), (5,), (), (3, 2, 4), (0, 3)]):
        p = nn.Parameter(randn(*shape, seed=seed + number).to(dtype))
        p.grad = randn(*shape, seed=100 + seed + number, scale=3.0).to(dtype)
        parameters.append(p)
    parameters.append(nn.Parameter(torch.ones(2, dtype=dtype)))  # without a gradient
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def cut(tensor: Tensor, *placements: object) -> DTensor:
    """Over all ranks in a row."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    tensor = tensor.clone()  # torch 2.9 gives a view of it
    return distribute_tensor(tensor, mesh, placements or [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]


def parameter(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    result = nn.Parameter(weight)
    result.grad = gradient
    return result
