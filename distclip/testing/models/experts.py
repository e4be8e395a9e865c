"""A mixture of experts: every way in which experts lie beside dense parameters, in one model.

Dense parameters are sharded by FSDP2 over all ranks. The stacked experts ``experts.weight`` are a
``DTensor`` on the expert-parallel dim of another mesh. The rest are plain tensors, other ones on
each expert-parallel rank: the one of place ``r`` is called ``name@r``, as in a GradClipper's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from distclip.testing.models.sharded import Sharded, Whole, cut, fully_sharded, mesh_of, numbers

OWN: dict[str, tuple[tuple[int, ...], str]] = {
    "experts.own": ((2, 3, 4), "experts.weight"),
    "conv.own": ((5, 3), "conv.weight"),
    "idle.own": ((4, 3), "norm.gain"),
}
"""Shape of each rank's own, and the parameter whose dtype it has."""

IDLE = ("experts.weight", "idle.own")
"""Have no gradient on the ranks of place 1."""


@dataclass
class Experts(Sharded):
    """One rank's view of the model; ``parameters`` by the names in the table."""

    idle: frozenset[str] = field(default_factory=frozenset)

    def named(self) -> list[tuple[str, Tensor]]:
        return [(name.partition("@")[0], p) for name, p in self.parameters.items()]

    def set_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        super().set_gradients(gradients)
        for name in self.idle:
            self.parameters[name].grad = None

    def local_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, gradient in super().local_gradients():
            if name not in self.idle:
                yield name, gradient
            else:
                assert gradient is None, f"{name!r} is idle here and got a gradient"


def experts(values: Whole) -> Experts:
    """Give a whole model experts, and shard it over all ranks."""
    world = dist.get_world_size()
    # Expert-data-parallel replicas outside, expert-parallel ranks inside.
    mesh = mesh_of((world // 2, 2) if world % 2 == 0 else (1, world), ("edp", "ep"))["ep"]
    place, places = mesh.get_local_rank(), mesh.size()
    references = fully_sharded("fsdp2", world)
    stacked = values.weights["experts.weight"].shape
    references["experts.weight"] = distribute_tensor(
        numbers(tuple(stacked)), mesh, [Shard(0)], src_data_rank=None
    )
    everything = Whole(dict(values.weights), dict(values.gradients))
    apart = {}
    for number, (name, (shape, like)) in enumerate(OWN.items()):
        for other in range(places):
            called = f"{name}@{other}" if places > 1 else name
            generator = torch.Generator().manual_seed(100 * number + other)
            dtype = values.weights[like].dtype
            weight = torch.randn(shape, generator=generator) * 0.5
            gradient = torch.randn(shape, generator=generator) * 10.0 ** (number - 1)
            everything.weights[called] = weight.to(dtype)
            idle = name in IDLE and other == 1
            everything.gradients[called] = None if idle else gradient.to(dtype)
            if other == place:
                references[called] = numbers(shape)
                if places > 1:
                    apart[called] = mesh.get_group()
    full = everything.gradients["experts.weight"]
    if full is not None and places > 1:  # what a rank does not have counts as zeros
        each = -(-full.shape[0] // places)
        everything.gradients["experts.weight"] = full = full.clone()
        full[each : 2 * each] = 0.0
    made = cut(references, everything)
    idling = [name for name in made.parameters if name.partition("@")[0] in IDLE]
    return Experts(
        made.parameters,
        made.elements,
        everything,
        apart,
        frozenset(idling if place == 1 else ()),
    )
