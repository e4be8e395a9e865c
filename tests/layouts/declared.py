"""Parameters that are declared as sharded."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.sharded import mesh_of


def expert_mesh() -> Any:
    """Expert-data-parallel replicas outside, expert-parallel ranks inside; 2 of them, or 3."""
    world = dist.get_world_size()
    return mesh_of((world // 2, 2) if world % 2 == 0 else (1, world), ("edp", "ep"))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(whole: Tensor, dim: int, sizes: tuple[int, ...] | None) -> list[Tensor]:
    """Slices of a tensor of 24 along ``dim``, one for each rank."""
    world = dist.get_world_size()
    if sizes is None:
        return list(whole.chunk(world, dim))
    return list(whole.split([*sizes[: world - 1], sum(sizes[world - 1 :])], dim))
