"""A whole model in any of the layouts."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from distclip.testing.models.experts import experts
from distclip.testing.models.flattened import flatten
from distclip.testing.models.sharded import (
    SHAPES,
    Sharded,
    Whole,
    cut,
    fully_sharded,
    numbers,
    placement_of,
)


def shard(layout: str, values: Whole) -> Sharded:
    """Shard a whole model over all ranks, in one of ``LAYOUTS``."""
    if layout.startswith("fsdp1"):
        return flatten(layout, values)
    if layout == "experts":
        return experts(values)
    meshes: dict[str, Tensor] = {}
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "plain":
        meshes = {name: numbers(shape) for name, shape in SHAPES.items()}
    elif layout in ("fsdp2", "hsdp", "fsdp2_tp"):
        meshes = fully_sharded(layout, world)
    else:
        for index, (name, shape) in enumerate(SHAPES.items()):
            mesh, placements = placement_of(layout, world, index, shape)
            meshes[name] = numbers(shape)
            if mesh is not None:
                meshes[name] = distribute_tensor(meshes[name], mesh, placements, src_data_rank=None)
    return cut(meshes, values)
