"""Norms measured during backward, as FSDP2 hands out each reduced gradient.

FSDP2 calls the post-accumulate hooks of its sharded parameters after its reduce-scatter, and the
all-reduce of HSDP, on the stream of that reduction, while backward goes on. What is measured there
counts at the clip only if the gradient is still the one that was measured: the same tensors, with
the same version counters and, since torch changes DTensors without counting in its multi-tensor
operations, the same sampled elements. Everything else is measured at the clip as ever.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from distclip.kernels.transfer import to_device
from distclip.layouts.plan import Plan
from distclip.statistics import local
from distclip.statistics.neighbours import Neighbours
from distclip.statistics.request import Request
from distclip.statistics.units import UnitTable

FSDP2 = "torch.distributed.fsdp._fully_shard"
"""Hooks that its code calls see a reduced gradient; those that autograd calls may not."""
MEASURED_EARLY = frozenset((1.0, 2.0, float("inf")))


class _Seal(NamedTuple):
    """What a gradient was when it was measured. Holds no memory."""

    gradient: weakref.ref[Tensor]
    shard: weakref.ref[Tensor]
    versions: tuple[int, int]

    @classmethod
    def of(cls, gradient: DTensor) -> _Seal:
        """Of a gradient as it is now. Views of one storage share the counter of its shard."""
        shard = gradient._local_tensor
        versions = (gradient._version, shard._version)
        return cls(weakref.ref(gradient), weakref.ref(shard), versions)

    def holds(self, gradient: Tensor | None, shard: Tensor | None) -> bool:
        """Whether these are the same, unchanged as far as torch counts."""
        return (
            gradient is not None
            and shard is not None
            and self.gradient() is gradient
            and self.shard() is shard
            and self.versions == (gradient._version, shard._version)
        )


@dataclass(frozen=True)
class _Batch:
    """Gradients that were measured together.

    Its tensors come from the stream of the reduction. FSDP2 makes the main stream wait for that at
    the end of backward, and the reductions of the next backward wait for the main stream: so their
    memory is not used again before it has been read.

    Attributes:
        positions: of their pieces.
        whole: those of them that are measured as a whole.
        norms: order -> float64 ``(whole,)``.
        units: order -> position -> float64 ``(units,)``.
        samples, sampled: elements of every gradient, one after another, and how many of each.
    """

    positions: list[int]
    whole: list[int]
    norms: Mapping[float, Tensor]
    units: Mapping[float, Mapping[int, Tensor]]
    samples: Tensor
    sampled: list[int]


class _Entry(NamedTuple):
    seal: _Seal
    batch: _Batch


class Known:
    """Pieces whose norms are known already, and still true as far as can be seen."""

    def __init__(self, entries: Mapping[int, _Entry]) -> None:
        self._entries = entries
        self.positions = frozenset(entries)
        batches: dict[int, tuple[_Batch, list[int]]] = {}
        for position, entry in entries.items():
            batches.setdefault(id(entry.batch), (entry.batch, []))[1].append(position)
        self._batches = list(batches.values())

    def others(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those that have still to be measured."""
        return [None if each in self.positions else t for each, t in enumerate(tensors)]

    def fill(self, norms: Tensor, order: float) -> Tensor:
        """``norms``, float64 ``(pieces,)``, with those that are known."""
        where: list[int] = []
        found: list[Tensor] = []
        for batch, positions in self._batches:
            if len(positions) == len(batch.positions):
                some = batch.whole
            else:
                some = [each for each in batch.whole if each in self.positions]
            if some:
                where += some
                found.append(_some(batch.norms[order], batch.whole, some))
        if not where:
            return norms
        return norms.index_copy(0, to_device(where, norms.device), torch.cat(found))

    def units(self, order: float, position: int) -> Tensor:
        """Float64 ``(units,)`` of one piece."""
        return self._entries[position].batch.units[order][position]

    def edited(self, present: Sequence[Tensor | None]) -> Tensor:
        """Float64 ``(1,)``, > 0 where a sampled element is another one than it was."""
        before: list[Tensor] = []
        now: list[Tensor] = []
        for batch, positions in self._batches:
            if len(positions) == len(batch.positions):
                before.append(batch.samples)
                positions = batch.positions
            else:
                parts = torch.split(batch.samples, batch.sampled)
                chosen = dict(zip(batch.positions, parts, strict=True))
                before += [chosen[position] for position in positions]
            now += [_sample(cast(Tensor, present[position])) for position in positions]
        old, new = torch.cat(before), torch.cat(now)
        differs = (old != new) & ~(old.isnan() & new.isnan())
        return differs.any().double().reshape(1)


def _some(values: Tensor, positions: Sequence[int], some: Sequence[int]) -> Tensor:
    """Of values that belong to positions, those of some of these."""
    if len(some) == len(positions):
        return values
    places = {position: place for place, position in enumerate(positions)}
    return values[to_device([places[position] for position in some], values.device)]


class Early:
    """Measures in hooks, and says at the clip what is known.

    Args:
        plan: of the clipper; only pieces that are all of a DTensor parameter come early.
        request: what the first pass measures.
        table: of its units.
    """

    def __init__(self, plan: Plan, request: Request, table: UnitTable) -> None:
        self._plan, self._request, self._table = plan, request, table
        self._places: dict[int, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._pending: dict[int, Tensor] = {}
        self._neighbour: weakref.ref[Tensor] | None = None
        self._run: dict[int, None] = {}
        """Those that fired one after the other with gradients in one storage."""
        self._sizes: dict[int, int] = {}
        """How many there are, by the first of them."""
        self._memory: dict[int, Neighbours] = {}
        self.used = 0
        """How many pieces were known at the last clip."""
        self._units = dict(zip(table.local.positions, table.local.counts, strict=True))
        handles = []
        if self._can_measure():
            fired = weakref.WeakMethod(self._fired)

            def hook(parameter: Tensor) -> None:
                call = fired()
                if call is not None and _called_by_fsdp2():
                    call(parameter)

            for position, piece in enumerate(plan.pieces):
                parameter: Any = None if piece.hold is None else piece.hold()
                if parameter is not None and _may_come_early(parameter):
                    self._places[id(parameter)] = position
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))
        weakref.finalize(self, _remove, handles).atexit = False
        _forget_when_unscaled(self)

    @property
    def watched(self) -> int:
        """How many parameters may come early."""
        return len(self._places)

    def forget(self) -> None:
        """Nothing is known any more: gradients were changed, or have been clipped."""
        self._entries.clear()
        self._pending.clear()
        self._run.clear()

    def known(self, present: Sequence[Tensor | None]) -> Known | None:
        """What need not be measured of the gradients that are there now."""
        entries = {}
        for position, entry in self._entries.items():
            hold = self._plan.pieces[position].hold
            gradient = None if hold is None else hold().grad
            if entry.seal.holds(gradient, present[position]):
                entries[position] = entry
        self.used = len(entries)
        return Known(entries) if entries else None

    def _can_measure(self) -> bool:
        request = self._request
        orders = {*request.orders, *request.unit_orders}
        return not request.bounds and bool(orders) and orders <= MEASURED_EARLY

    def _fired(self, parameter: Tensor) -> None:
        """A gradient is there, for good unless another backward adds to it."""
        gradient = parameter.grad
        position = self._places[id(parameter)]
        self._entries.pop(position, None)
        if not isinstance(gradient, DTensor) or type(gradient._local_tensor) is not Tensor:
            return
        shard = gradient._local_tensor
        if position in self._run or not self._is_beside(shard):
            self._flush()
            self._run.clear()
            self._neighbour = weakref.ref(shard)
        self._pending[position] = parameter
        self._run[position] = None
        first, length = next(iter(self._run)), len(self._run)
        known = self._sizes.get(first, 0)
        if length == known:
            self._flush()
        self._sizes[first] = max(length, known)

    def _is_beside(self, shard: Tensor) -> bool:
        """Whether the gradient before lies in the same storage, as those of one module do."""
        before = None if self._neighbour is None else self._neighbour()
        if before is None:
            return False
        return before.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()

    def _flush(self) -> None:
        """Measure what is pending, in one go."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            with torch.no_grad():
                self._measure(pending)
        except Exception:
            # Not here: other ranks are in the middle of backward. The clip meets it again.
            for position in pending:
                self._entries.pop(position, None)

    def _measure(self, pending: Mapping[int, Any]) -> None:
        gradients = {p: g for p, parameter in pending.items() if (g := parameter.grad) is not None}
        shards = {position: gradient._local_tensor for position, gradient in gradients.items()}
        if not shards:
            return
        positions = sorted(shards)
        pieces = [self._plan.pieces[position] for position in positions]
        unit_dims = self._request.unit_dims
        whole = [
            position
            for position, piece in zip(positions, pieces, strict=True)
            if piece.share > 0.0 and piece.index not in unit_dims
        ]
        by_unit = [position for position in positions if position in self._units]
        tensors = [shards[position] for position in positions]
        numbers = {position: number for number, position in enumerate(positions)}
        device, widths = self._plan.device, self._table.widths
        near = self._memory.setdefault(positions[0], Neighbours()).find(
            tensors, widths=None if widths is None else [widths[p] for p in positions]
        )
        units = {}
        for order in self._request.unit_orders if by_unit else ():
            counts = [self._units[position] for position in by_unit]
            found = local.unit_norms(
                [shards[position] for position in by_unit],
                [unit_dims[self._plan.pieces[position].index] for position in by_unit],
                counts,
                order,
                device=device,
                positions=[numbers[position] for position in by_unit],
                together=near,
            )
            units[order] = dict(zip(by_unit, torch.split(found, counts), strict=True))
        norms = {}
        for order in self._request.orders:
            if whole:
                some = [shards[position] for position in whole]
                alike = near if len(whole) == len(positions) else None
                norms[order] = local.norms(some, order, device=device, together=alike)
        known = [position for position in positions if position in {*whole, *by_unit}]
        if known:
            samples = [_sample(shards[position]) for position in known]
            sizes = [len(sample) for sample in samples]
            batch = _Batch(known, whole, norms, units, torch.cat(samples), sizes)
            for position in known:
                self._entries[position] = _Entry(_Seal.of(gradients[position]), batch)


def _may_come_early(parameter: Tensor) -> bool:
    """FSDP2's hooks would make its copies to the host wait: offloaded parameters are left alone."""
    return (
        isinstance(parameter, DTensor)
        and parameter.requires_grad
        and parameter.is_leaf
        and parameter._local_tensor.device.type == parameter.device_mesh.device_type
    )


def _called_by_fsdp2() -> bool:
    """Whether the hook that asks was called by FSDP2's own reduction.

    Autograd calls the hooks of every other parameter, which DDP, or the user, may still reduce.
    """
    try:
        caller = sys._getframe(2)
    except ValueError:  # a thread of autograd's
        return False
    return str(caller.f_globals.get("__name__", "")).startswith(FSDP2)


def _sample(shard: Tensor) -> Tensor:
    """First, middle and last element, as a view."""
    numel = shard.numel()
    if numel > 2 and shard.is_contiguous():
        return shard.as_strided((3,), ((numel - 1) // 2,))
    return shard.as_strided((min(numel, 1),), (1,))


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


_unscaled: weakref.WeakSet[Early] = weakref.WeakSet()


def _forget_when_unscaled(early: Early) -> None:
    """``GradScaler.unscale_`` multiplies gradients without counting it: let it tell."""
    _unscaled.add(early)
    scalers: tuple[Any, ...] = (torch.amp.GradScaler, ShardedGradScaler)
    for scaler in scalers:
        unscale = scaler.__dict__["unscale_"]
        if not getattr(unscale, "tells_distclip", False):
            scaler.unscale_ = _telling(unscale)


def _telling(unscale: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(unscale)
    def telling(self: Any, optimizer: Any) -> None:
        try:
            unscale(self, optimizer)
        finally:
            for each in list(_unscaled):
                each.forget()

    telling.tells_distclip = True  # type: ignore[attr-defined]
    return telling
