"""Models whose parameters are sharded in every way, with gradients that the oracle knows whole.

Which elements a rank holds is found without the library: tensors of element numbers are sharded by
torch itself, in the same way as the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from distclip.testing.norms import wide

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 7),
    "fc.weight": (13, 7),
    "fc.bias": (13,),
    "conv.weight": (5, 3, 3, 2),
    "experts.weight": (3, 5, 4),
    "wide.weight": (3, 700),
    "norm.gain": (6,),
    "one": (1,),
    "scalar": (),
    "zero_init.weight": (5, 4),
    "unused.weight": (4, 3),
    "quiet.weight": (4, 4),
}
"""Uneven on 2, 3 and 4 ranks; some shards are empty, one gradient is missing, one is all zero."""

MIXED = (torch.float32, torch.bfloat16, torch.float16)


def dtypes_of(kind: str) -> dict[str, torch.dtype]:
    """A dtype per parameter; ``kind`` is a dtype's name or ``"mixed"``."""
    if kind == "mixed":
        return {name: MIXED[i % 3] for i, name in enumerate(SHAPES)}
    return dict.fromkeys(SHAPES, getattr(torch, kind))


@dataclass
class Whole:
    """The whole, unsharded weights and gradients, as rounded to each parameter's dtype."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


def whole(kind: str = "float32", *, scale: float = 1.0, seed: int = 0) -> Whole:
    """Seeded weights and gradients; gradients differ by orders of magnitude between parameters."""
    generator = torch.Generator().manual_seed(seed)
    result = Whole()
    for number, (name, dtype) in enumerate(dtypes_of(kind).items()):
        shape = SHAPES[name]
        weight = torch.randn(shape, generator=generator) * 0.5
        gradient = torch.randn(shape, generator=generator) * scale * 10.0 ** (number % 3 - 1)
        if name == "zero_init.weight":
            weight.zero_()
        if name == "quiet.weight":
            gradient.zero_()
        result.weights[name] = weight.to(dtype)
        result.gradients[name] = None if name == "unused.weight" else gradient.to(dtype)
    return result


@dataclass
class Sharded:
    """One rank's view of a sharded model."""

    parameters: dict[str, Tensor]
    elements: dict[str, Tensor]
    """Flat element numbers of this rank's part, in the shape of the part."""
    values: Whole | None = None
    """What it is the sharding of, where that is more than what it was made of."""
    apart: dict[str, ProcessGroup] = field(default_factory=dict)
    """Plain parameters that are another tensor on each rank of a group: to be declared."""

    def named(self) -> list[tuple[str, Tensor]]:
        """The (name, parameter) pairs, as a GradClipper takes them."""
        return list(self.parameters.items())

    def set_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, parameter in self.parameters.items():
            gradient = gradients[name]
            if gradient is None:
                parameter.grad = None
                continue
            part = gradient.flatten()[self.elements[name]]
            parameter.grad = like(parameter, part)

    def local_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each parameter's gradient on this rank, in the shape of its ``elements``."""
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def beside(
        self, wholes: Mapping[str, npt.ArrayLike | None]
    ) -> Iterator[tuple[str, Tensor | None, np.ndarray | None]]:
        """Each parameter's gradient on this rank, and the part here of a whole one, in float64."""
        for name, gradient in self.local_gradients():
            whole = wholes[name]
            part = None if whole is None else wide(whole).reshape(-1)[self.elements[name].numpy()]
            yield name, gradient, part


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """``part`` as a tensor sharded like ``parameter``."""
    if not isinstance(parameter, DTensor):
        return part.clone()
    return DTensor.from_local(
        part.clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def numbers(shape: tuple[int, ...]) -> Tensor:
    """The flat number of every element, int64 of that shape."""
    return torch.arange(math.prod(shape)).view(shape)


def cut(references: Mapping[str, Tensor], values: Whole) -> Sharded:
    """The parameters of ``values``, each sharded as the element numbers of the same name are."""
    parameters: dict[str, Tensor] = {}
    elements: dict[str, Tensor] = {}
    for name, reference in references.items():
        local = reference.to_local() if isinstance(reference, DTensor) else reference
        elements[name] = local.long()
        part = values.weights[name].flatten()[local.long()]
        parameters[name] = nn.Parameter(like(reference, part))
    return Sharded(parameters, elements)


_meshes: dict[object, DeviceMesh] = {}


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh over all ranks; making one costs process groups, so it is kept with the world."""
    key = (id(dist.group.WORLD), shape, names)
    if key not in _meshes:
        _meshes[key] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[key]


def placement_of(
    layout: str, world: int, index: int, shape: tuple[int, ...]
) -> tuple[DeviceMesh | None, list[Placement]]:
    """Where the parameter of this index lies in a layout of DTensors; no mesh: a plain tensor."""
    line = mesh_of((world,), ("x",))
    last = max(0, len(shape) - 1)
    rows: Placement = Shard(0) if shape else Replicate()
    columns: Placement = Shard(last) if shape else Replicate()
    if layout == "replicate":
        return line, [Replicate()]
    if layout == "tp":
        return line, [(rows, columns, Replicate())[index % 3]]
    if layout != "mixed":
        raise ValueError(layout)
    grid = mesh_of((world // 2, 2) if world % 2 == 0 else (world, 1), ("a", "b"))
    choices: list[tuple[DeviceMesh | None, list[Placement]]] = [
        (None, []),
        (line, [rows]),
        (grid["b"], [columns]),
        (grid["a"], [rows]),
        (grid, [rows, columns]),
        (grid, [Replicate(), rows]),
    ]
    return choices[index % len(choices)]


class _Holder(nn.Module):
    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name.replace(".", "__"), nn.Parameter(value))


def fully_sharded(layout: str, world: int) -> dict[str, Tensor]:
    """Element numbers, sharded by FSDP2 itself."""
    two = (world // 2, 2) if world % 2 == 0 else (world, 1)
    grid = mesh_of(two, ("outer", "inner"))
    values: dict[str, Tensor] = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        number = numbers(shape).float()
        if layout == "fsdp2_tp":
            last = max(0, len(shape) - 1)
            kinds: list[Placement] = [Shard(0), Shard(last), Replicate()]
            placement = kinds[index % 3] if shape else Replicate()
            number = distribute_tensor(number, grid["inner"], [placement], src_data_rank=None)
        values[name] = number
    # FSDP2 shards along dim 0 and refuses scalars: those stay what they were.
    kept = {name: value for name, value in values.items() if value.dim() == 0}
    module = _Holder({name: value for name, value in values.items() if name not in kept})
    if layout == "fsdp2":
        fully_shard(module, mesh=mesh_of((world,), ("dp",)))
    elif layout == "hsdp":
        fully_shard(module, mesh=grid)
    else:
        fully_shard(module, mesh=grid["outer"])
    found = {name.replace("__", "."): p.detach() for name, p in module.named_parameters()}
    return {name: kept[name] if name in kept else found[name] for name in SHAPES}
