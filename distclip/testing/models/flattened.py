"""Models that FSDP1 has flattened, with gradients that the oracle knows whole.

FSDP1 itself says which elements a rank holds: a model whose weights are element numbers is wrapped
in the same way, and what is left of them on this rank is read off.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from distclip.testing.models.sharded import SHAPES, Sharded, Whole, mesh_of, numbers

CPU = torch.device("cpu")
UNITS = ("fc", "conv", "wide", "quiet", "norm")
"""Modules that are wrapped by themselves; the rest belongs to the root."""


def wrap(module: nn.Module, **options: Any) -> FullyShardedDataParallel:
    """FSDP1 on CPU, without what it says about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(module, device_id=CPU, **options)


def named_tree(values: Mapping[str, Tensor]) -> nn.Module:
    """A module of modules whose parameters have these dotted names."""
    root = nn.Module()
    for name, value in values.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(value))
    return root


def wrap_units(root: nn.Module, layout: str) -> nn.Module:
    """Nested wrapping. A unit has one dtype and no scalars, so all other parameters are ignored."""
    world = dist.get_world_size()
    inner = 2 if world % 2 == 0 and world > 2 else world
    grid = mesh_of((world // inner, inner), ("replicas", "shards"))
    full, zero2 = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP
    hybrid, hybrid2 = ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2
    strategies = {
        "fsdp1_hybrid": (hybrid, hybrid2),
        "fsdp1_mixed": (full, zero2, ShardingStrategy.NO_SHARD, hybrid),
    }.get(layout, (full,))
    turn = itertools.cycle(strategies)
    ignored: set[nn.Parameter] = set()

    def unit(module: nn.Module) -> nn.Module:
        strategy = next(turn)
        mine = [p for p in module.parameters() if p not in ignored and not flattened(p)]
        first = next(p for p in mine if p.dim())
        ignored.update(p for p in mine if p.dim() == 0 or p.dtype != first.dtype)
        mesh = {"device_mesh": grid} if "HYBRID" in strategy.name else {}
        return wrap(
            module,
            sharding_strategy=strategy,
            use_orig_params=layout in ("fsdp1_orig", "fsdp1_mixed"),
            ignored_states=list(ignored),
            **mesh,
        )

    for name in UNITS:
        setattr(root, name, unit(getattr(root, name)))
    return unit(root)


def flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has flattened this parameter."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


BASES = dict(
    zip(SHAPES, itertools.accumulate(map(math.prod, SHAPES.values()), initial=1), strict=False)
)
"""The number of each parameter's first element; 0 is padding."""

DIGIT = 128


@dataclass
class Flattened(Sharded):
    """One rank's view of a model under FSDP1. ``parameters``: by the names that FSDP1 gives."""

    numbered: dict[str, Tensor] = field(default_factory=dict)
    """Per parameter, the numbers of the elements that it holds here."""
    model: nn.Module = field(default_factory=nn.Module)
    """Kept alive: nothing else holds the flat parameters."""
    missing: set[str] = field(default_factory=set)

    def set_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        self.missing = {name for name, gradient in gradients.items() if gradient is None}
        for name, parameter in self.parameters.items():
            parameter.grad = None
            numbered = self.numbered[name]
            found = torch.zeros_like(parameter)
            absent = True
            for original, shape in SHAPES.items():
                gradient = gradients[original]
                here = elements_within(numbered, original, shape)
                if gradient is not None and (bool(here.any()) or math.prod(shape) == 0):
                    found[here] = gradient.flatten()[numbered[here] - BASES[original]]
                    absent = False
            # An original parameter without elements here has no gradient under FSDP1.
            parameter.grad = None if absent else found

    def local_gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for original, shape in SHAPES.items():
            parts = []
            for name, parameter in self.parameters.items():
                here = elements_within(self.numbered[name], original, shape)
                if parameter.grad is None:
                    assert original in self.missing or not bool(here.any())
                elif bool(here.any()):  # not from a unit of another dtype
                    parts.append(parameter.grad[here])
            if original in self.missing:  # FSDP1 has zeros where others of the unit have gradients
                assert all(not bool(part.any()) for part in parts)
                yield original, None
            else:
                yield original, torch.cat(parts) if parts else torch.empty(0)


def elements_within(numbered: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Which of these elements belong to a parameter."""
    first = BASES[name]
    return (numbered >= first) & (numbered < first + math.prod(shape))


def flatten(layout: str, values: Whole) -> Flattened:
    """Wrap a whole model in FSDP1 over all ranks."""
    model = wrap_units(named_tree(values.weights), layout)
    # Padding depends on the dtype, and bf16 holds no number above 256 exactly: two digits.
    whole = {name: numbers(shape) + BASES[name] for name, shape in SHAPES.items()}
    digits = []
    for digit in (torch.remainder, torch.floor_divide):
        like = {n: digit(number, DIGIT).to(values.weights[n].dtype) for n, number in whole.items()}
        digits.append(dict(wrap_units(named_tree(like), layout).named_parameters()))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    low, high = ({n: p.detach().long() for n, p in digit.items()} for digit in digits)
    numbered = {name: low[name] + DIGIT * high[name] for name in parameters}
    elements = {}
    for original, shape in SHAPES.items():
        parts = [held[elements_within(held, original, shape)] for held in numbered.values()]
        elements[original] = torch.cat(parts) - BASES[original]
    return Flattened(parameters, elements, numbered=numbered, model=model)
