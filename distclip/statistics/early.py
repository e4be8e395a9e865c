"""What was measured of gradients during backward, and whether they are still what was measured.

A norm is used at the clip only if its gradient is unchanged, by three signs:

* identity: the same local tensor, at the same address;
* versions: torch counts in-place operations, on a DTensor and on its local tensor apart;
* samples: some elements of each gradient, bit by bit. Operations on lists of DTensors
  (``torch._foreach_*``, and so ``GradScaler.unscale_`` and ``torch.nn.utils.clip_grad_norm_``),
  collectives, ``.data`` and numpy leave no version behind, but they change elements.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distclip.kernels import measuring
from distclip.kernels.measuring import PlanTables
from distclip.layouts.tensors import own
from distclip.statistics.request import Request

SAMPLES = 8
"""Elements compared of each gradient, at least, where it has so many."""
SPACING = 4093
"""Elements from one sample to the next, at most; prime, to come through all columns."""

_version = operator.attrgetter("_version")
_address = Tensor.data_ptr


@dataclass(eq=False)
class Pattern:
    """Parameters that are measured together, and what is the same of them at every step.

    Attributes:
        positions: of their pieces in the plan.
        index: int64, ``positions`` on the plan's device.
        plain: whether each is measured as a whole.
        numbers, dims, counts: those that are measured per unit: their places in ``positions``, the
            dims that index their units, how many units each has.
        units: int64, where those units lie among all on this rank.
        tables: of their gradients, for the kernels.
    """

    positions: tuple[int, ...]
    index: Tensor
    plain: list[bool]
    numbers: list[int]
    dims: list[tuple[int, ...]]
    counts: list[int]
    units: Tensor
    tables: PlanTables = field(default_factory=PlanTables)
    _offsets: list[int] = field(default_factory=list)
    _places: Tensor | None = None

    def measured(
        self, shards: Sequence[Tensor], request: Request, device: torch.device
    ) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
        """Norms of these tensors, and of their units, by order: as :class:`Batch` has them."""
        units = {
            order: measuring.unit_norms(
                [shards[number] for number in self.numbers],
                self.dims,
                self.counts,
                order,
                device=device,
                tables=self.tables,
                what="units",
            )
            for order in (request.unit_orders if self.numbers else ())
        }
        whole = [s if plain else None for s, plain in zip(shards, self.plain, strict=True)]
        norms = {
            order: measuring.norms(whole, order, device=device, tables=self.tables)
            for order in (request.orders if any(self.plain) else ())
        }
        return norms, units

    def sampled(self, shards: Sequence[Tensor]) -> Tensor:
        """Some elements of each of these contiguous tensors; a copy."""
        storage = shards[0].untyped_storage().data_ptr()
        if any(shard.untyped_storage().data_ptr() != storage for shard in shards):
            return torch.cat(list(map(_spaced, shards)))
        offsets = [int(shard.storage_offset()) for shard in shards]
        if self._places is None or offsets != self._offsets:
            self._places = _places(offsets, [shard.numel() for shard in shards], shards[0].device)
            self._offsets = offsets
        ends = (offset + shard.numel() for offset, shard in zip(offsets, shards, strict=True))
        start, stop = min(offsets), max(ends)
        flat = shards[0].as_strided((stop - start,), (1,), start)
        return flat.index_select(0, self._places)


def _spaced(tensor: Tensor) -> Tensor:
    """Some elements of a contiguous tensor: a view."""
    numel = tensor.numel()
    step = max(1, min(SPACING, numel // SAMPLES))
    return tensor.as_strided((-(-numel // step),), (step,), tensor.storage_offset())


def _places(offsets: Sequence[int], numels: Sequence[int], device: torch.device) -> Tensor:
    """Where the samples lie, counted from the first gradient; int32, half of what int64 takes."""
    start = min(offsets)
    parts = [
        torch.arange(
            offset - start,
            offset - start + numel,
            max(1, min(SPACING, numel // SAMPLES)),
            device="cpu",
        )
        for offset, numel in zip(offsets, numels, strict=True)
        if numel
    ]
    places = torch.cat(parts) if parts else torch.zeros(0, device="cpu")
    return places.to(device, torch.int32 if not parts or places[-1] < 2**31 else torch.int64)


Footprint: TypeAlias = tuple[list[int], list[int], list[int], list[int]]


@dataclass(frozen=True, eq=False)
class Batch:
    """What was measured of some gradients, and how they were then.

    Attributes:
        pattern: whose they are.
        norms: order -> float64 ``(pieces,)``, 0 for those that are measured per unit.
        units: order -> float64, the units of the others one after another.
        samples: some elements.
        telling: 0-dim bool, whether any of the samples would change if all were multiplied.
    """

    # On CUDA all of these were made on FSDP2's stream, or on that of the future of DDP's bucket. At
    # the end of backward FSDP2 (`finalize_backward`) and DDP make the main stream wait for it, so
    # the main stream may read them. Their memory goes back to that stream's pool when the clip has
    # let go of them, and is written next by the next backward, before whose reductions that stream
    # waits for the main one. FSDP2 keeps the gradients themselves by the same two rules.
    pattern: Pattern
    shards: list[weakref.ref[Tensor]]
    footprint: Footprint
    norms: Mapping[float, Tensor]
    units: Mapping[float, Tensor]
    samples: Tensor
    telling: Tensor

    def untouched(self, gradients: Sequence[Any]) -> list[Tensor] | None:
        """The local gradients, if they are the ones that were measured, as far as torch counts."""
        if NoneType in set(map(type, gradients)):
            return None
        shards = list(map(own, gradients))
        if any(map(operator.is_not, shards, [ref() for ref in self.shards])):
            return None
        return shards if footprint(gradients, shards) == self.footprint else None


def batch_of(
    pattern: Pattern,
    gradients: Sequence[Tensor],
    norms: Mapping[float, Tensor],
    units: Mapping[float, Tensor],
) -> Batch:
    """What was measured of these gradients, which are now as they were then."""
    shards = list(map(own, gradients))
    samples = pattern.sampled(shards)
    telling = ((samples != 0) & torch.isfinite(samples)).any()
    return Batch(
        pattern,
        [weakref.ref(shard) for shard in shards],
        footprint(gradients, shards),
        norms,
        units,
        samples,
        telling if len(samples) else torch.ones_like(telling),
    )


def footprint(gradients: Sequence[Tensor], shards: Sequence[Tensor]) -> Footprint:
    """What changes with most changes: versions of both, where the shards lie, and which they are.

    Of DTensors the ``id``: a weak reference would keep torch from converting the model.
    """
    versions = list(map(_version, gradients)), list(map(_version, shards))
    return list(map(id, gradients)), *versions, list(map(_address, shards))


@dataclass(frozen=True)
class Early:
    """Norms that came during backward, and that the clip may use."""

    batches: Sequence[Batch]

    @cached_property
    def positions(self) -> frozenset[int]:
        """Positions of the pieces that were measured early."""
        return frozenset(each for batch in self.batches for each in batch.pattern.positions)

    def rest(
        self, tensors: Sequence[Tensor | None], positions: Sequence[int]
    ) -> list[Tensor | None]:
        """The positions, of those given, that are still to be measured."""
        known = self.positions
        pairs = zip(positions, tensors, strict=True)
        return [None if each in known else tensor for each, tensor in pairs]

    def insert(self, norms: Tensor, order: float) -> None:
        """Write the norms to the places of their pieces, ``(pieces,)``."""
        for batch in self.batches:
            if order in batch.norms:
                norms.index_copy_(0, batch.pattern.index, batch.norms[order])

    def insert_units(self, norms: Tensor, order: float) -> None:
        """Write the norms of units to their places, ``(units on this rank,)``."""
        for batch in self.batches:
            if batch.pattern.numbers:
                norms.index_copy_(0, batch.pattern.units, batch.units[order])
