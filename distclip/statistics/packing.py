"""From local measurements to whole-tensor statistics: one packed all-reduce.

Everything that is summed (p-th powers of norms, units cut by a shard border, flags) lies in one
float64 vector. Maxima (p = inf) need a reduction of another kind and travel in a second vector,
alone where nothing else is asked for. Norms of extreme orders (above 64) take both: the maximum
first, then powers relative to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.kernels.powers import scale_of
from distclip.layouts.plan import Plan
from distclip.statistics import collectives
from distclip.statistics.alignment import MISPLACED
from distclip.statistics.encoding import Encoding, is_far
from distclip.statistics.survey import Local, Survey


@dataclass(eq=False)
class Measurement:
    """Whole-tensor statistics, bitwise the same on every rank.

    Attributes:
        raw: order -> ``(parameters,)`` gradient norms as they are.
        clamped: the same as clamped at the head of the pass.
        norms: the same as clamped and scaled before the reduction: what the next stage sees.
        weights: order -> ``(parameters,)`` weight norms.
        units: order -> ``(units,)`` gradient norms of the units summed over ranks.
        unit_weights: order -> ``(units,)`` their weight norms.
        clipped: ``(parameters,)`` units scaled before the reduction; None where none is decided
            on by then.
        smallest: 0-dim, the smallest coefficient decided before the reduction; None as ``clipped``.
        flags: the first is >= 1 if any rank ran into an error, else > 0 if any has a gradient that
            must be redistributed; then the two numbers of a stamp, where one was sent.
        as_maxima: whether the flags were reduced as maxima.
        passengers: what else was summed along; None where nothing travelled.
        in_range: whether powers of the norms stay in float64's range.
        loss: 0-dim, mean of the losses that ranks gave, NaN for none; None where not asked for.
        exponents: ``(parameters, columns)`` counts of elements; None where not asked for.
    """

    raw: Mapping[float, Tensor]
    clamped: Mapping[float, Tensor]
    norms: Mapping[float, Tensor]
    weights: Mapping[float, Tensor]
    units: Mapping[float, Tensor]
    unit_weights: Mapping[float, Tensor]
    clipped: Tensor | None
    smallest: Tensor | None
    flags: Tensor
    as_maxima: bool
    passengers: Tensor | None
    in_range: bool
    loss: Tensor | None = None
    exponents: Tensor | None = None

    @cached_property
    def read_flags(self) -> list[float]:
        """The flags, read on the host once."""
        found: list[float] = self.flags.tolist()
        return found


@dataclass(frozen=True)
class Stamp:
    """A number that has to be the same on all ranks, sent so that each sees whether it is.

    With the number ``d`` goes its square: if the sums over all ``N`` ranks are ``N d`` and
    ``N d**2``, then no rank has another number (Cauchy and Schwarz). Of a maximum, ``d`` and
    ``limit - d`` do as well.

    Attributes:
        number: from 0 on, below ``limit``.
        limit: ``ranks * limit**2`` is at most ``2**53``, so that float64 sums are exact.
        ranks: how many ranks there are.
        idle: whether nothing is compared; alike on all ranks.
    """

    number: int
    limit: int
    ranks: int
    idle: bool = False

    def pair(self, *, maximum: bool) -> tuple[float, float]:
        """The two numbers that this rank sends."""
        number = float(self.number)
        return number, self.limit - number if maximum else number * number

    def is_everybodys(self, reduced: Sequence[float], *, maximum: bool) -> bool:
        """Whether every rank sent this number; if not, this gives False on every rank."""
        count = 1 if maximum else self.ranks
        first, second = self.pair(maximum=maximum)
        return reduced[0] == count * first and reduced[1] == count * second


class Packet:
    """Named tensors that travel together."""

    def __init__(self, group: ProcessGroup | None, *, wide: Mapping[float, bool]) -> None:
        self._group = group
        self._wide = wide
        self._sums: dict[object, tuple[Tensor, Encoding | None]] = {}
        self._maxima: dict[object, Tensor] = {}
        self._far: dict[object, _Far] = {}

    def add_sum(self, key: object, summands: Tensor) -> None:
        """Float64 numbers that are summed as they are."""
        self._sums[key] = (summands, None)

    def add_flag(self, key: object, flag: Tensor) -> None:
        """Float64, > 0 on any rank gives > 0 on all; rides on whatever travels anyway."""
        if self.only_maxima:
            self._maxima[key] = flag
        else:
            self._sums[key] = (flag, None)

    @property
    def only_maxima(self) -> bool:
        """Whether maxima travel and no sums: then flags are maxima too."""
        return bool(self._maxima) and not self._sums

    def add_norms(
        self,
        key: object,
        norms: Tensor,
        order: float,
        rows: Tensor | None,
        shares: Tensor | None,
        size: int,
    ) -> None:
        """Norms of parts: ``norms[i]`` counts ``shares[i]`` times for ``rows[i]`` of ``size``."""
        if self._group is None and rows is None and shares is None:  # the norms of wholes
            self._sums[key] = (norms, None)
        elif math.isinf(order):
            if rows is not None:
                norms = norms.new_zeros(size).scatter_reduce_(0, rows, norms, "amax")
            self._maxima[key] = norms
        elif is_far(order):
            self._far[key] = far = _Far(norms, order, rows, shares, size)
            self._maxima["largest", key] = far.largest()
        else:
            encoding = Encoding(order, self._wide[order])
            summands = encoding.encode(norms)
            if shares is not None:
                counted = shares.unsqueeze(1) if encoding.wide else shares
                summands = torch.where(counted > 0, summands * counted, 0.0)
            if rows is not None:
                empty = norms.new_zeros(size, *summands.shape[1:])
                summands = empty.index_add_(0, rows, summands)
            self._sums[key] = (summands, encoding)

    def exchange(self) -> dict[object, Tensor]:
        """Reduce over the group; every tensor under its key, norms as norms again."""
        largest = self._reduced(list(self._maxima.values()), collectives.all_reduce_max)
        result: dict[object, Tensor] = dict(zip(self._maxima, largest, strict=True))
        for key, far in self._far.items():
            self._sums[key] = (far.relative_to(result["largest", key]), None)
        summands = [each for each, _ in self._sums.values()]
        sums = self._reduced(summands, collectives.all_reduce_sum)
        for (key, (_, encoding)), part in zip(self._sums.items(), sums, strict=True):
            result[key] = part if encoding is None else encoding.decode(part)
        for key, far in self._far.items():
            result[key] = far.norms_of(result[key], result["largest", key])
        return result

    def _reduced(
        self, tensors: list[Tensor], reduce: Callable[[Tensor, ProcessGroup], Tensor]
    ) -> Sequence[Tensor]:
        """The tensors reduced over the group, by one collective for all of them."""
        if self._group is None or not tensors:
            return tensors
        flat = [each if each.dim() == 1 else each.reshape(-1) for each in tensors]
        joined = reduce(torch.cat(flat), self._group)
        parts = torch.split(joined, [each.numel() for each in flat])
        return [
            part if each.dim() == 1 else part.view(each.shape)
            for each, part in zip(tensors, parts, strict=True)
        ]


@dataclass(frozen=True)
class _Far:
    """Norms whose powers are summed relative to the largest of all ranks, once that is known.

    As given to :meth:`Packet.add_norms`.
    """

    norms: Tensor
    order: float
    rows: Tensor | None
    shares: Tensor | None
    size: int

    def largest(self) -> Tensor:
        """``(size,)``, the largest on this rank."""
        return self._per_row("amax", self.norms)

    def relative_to(self, largest: Tensor) -> Tensor:
        """``(size,)`` sums of powers in units of the largest of all ranks."""
        scale = scale_of(largest)
        powers = self.norms / (scale if self.rows is None else scale[self.rows])
        powers = powers.pow(self.order)
        if self.shares is not None:
            powers = torch.where(self.shares > 0, powers * self.shares, 0.0)
        return self._per_row("sum", powers)

    def norms_of(self, sums: Tensor, largest: Tensor) -> Tensor:
        """The norms, from the powers' sums over all ranks."""
        return sums.pow(1.0 / self.order) * scale_of(largest)

    def _per_row(self, how: str, values: Tensor) -> Tensor:
        if self.rows is None:
            return values
        return values.new_zeros(self.size).scatter_reduce_(0, self.rows, values, how)


def reduce(
    survey: Survey, local: Local, passengers: Tensor | None = None, stamp: Stamp | None = None
) -> Measurement:
    """All ranks' measurements as one. One all-reduce; a second one for maxima beside sums.

    Args:
        survey: what was measured.
        local: what was found here.
        passengers: float64 of any shape, summed along where something is reduced.
        stamp: sent along where something is reduced.
    """
    plan, request = survey.plan, survey.request
    group = plan.group if request.reduced else None
    if group is None and survey.is_plain and plan.one_to_one:
        return _alone(survey, local)
    wide = survey.wide
    packet = Packet(group, wide=wide)
    _add_norms(packet, survey, local)
    if group is not None:
        if local.clipped is not None and local.smallest is not None:
            packet.add_sum("clipped", local.clipped)
            packet.add_sum("smallest", _own_slot(local.smallest, group))
        if passengers is not None:
            packet.add_sum("passengers", passengers)
    if local.loss is not None:
        packet.add_sum("loss", local.loss)
    if local.exponents is not None:
        packet.add_sum("exponents", local.exponents)
    as_maxima = packet.only_maxima
    packet.add_flag("flags", _flags(plan, local, None if group is None else stamp, as_maxima))
    got = packet.exchange()
    return _unpacked(survey, local, got, as_maxima=as_maxima, in_range=survey.in_range)


def _alone(survey: Survey, local: Local) -> Measurement:
    """What :func:`reduce` gives for norms of wholes that nobody else has a part in."""
    nothing: Mapping[float, Tensor] = {}
    return Measurement(
        raw=local.raw or local.norms,
        clamped=local.norms,
        norms=local.norms,
        weights=nothing,
        units=nothing,
        unit_weights=nothing,
        clipped=None,
        smallest=None,
        flags=_flags(survey.plan, local, None, as_maxima=False),
        as_maxima=False,
        passengers=None,
        in_range=survey.in_range,
    )


def _kinds(local: Local) -> tuple[tuple[str, Mapping[float, Tensor]], ...]:
    """Norms of pieces, under the key of the field that they become."""
    return (
        ("norms", local.norms),
        ("raw", local.raw),
        ("after", local.after),
        ("weights", local.weights),
    )


def _add_norms(packet: Packet, survey: Survey, local: Local) -> None:
    """Norms of the pieces, and of the units that are summed over ranks."""
    plan, request, table = survey.plan, survey.request, survey.table
    rows, shares, size = plan.rows, plan.shares, len(plan.entries)
    for kind, by_order in _kinds(local):
        for order, norms in by_order.items():
            packet.add_norms((kind, order), norms, order, rows, shares, size)
    size = table.summed.size
    if not size:
        return
    for kind, orders, units, first in (
        ("units", request.unit_orders, local.unit_norms, table.whole.size),
        ("unit weights", request.deciding_orders, local.unit_weights, 0),
    ):
        for order in orders:
            some = units[order][first:]
            packet.add_norms((kind, order), some, order, table.places, table.shares, size)


def _unpacked(
    survey: Survey, local: Local, got: Mapping[object, Tensor], *, as_maxima: bool, in_range: bool
) -> Measurement:
    """What came of a packet that :func:`reduce` has filled."""
    request = survey.request
    reduced = {
        kind: {order: got[kind, order] for order in by_order} for kind, by_order in _kinds(local)
    }
    summed = survey.table.summed.size
    return Measurement(
        raw={**reduced["norms"], **reduced["raw"]},
        clamped=reduced["norms"],
        norms={**reduced["norms"], **reduced["after"]},
        weights=reduced["weights"],
        units={order: got["units", order] for order in request.unit_orders if summed},
        unit_weights={
            order: got["unit weights", order] for order in request.deciding_orders if summed
        },
        clipped=got.get("clipped", local.clipped),
        smallest=got["smallest"].min() if "smallest" in got else local.smallest,
        flags=got["flags"],
        as_maxima=as_maxima,
        passengers=got.get("passengers"),
        in_range=in_range,
        exponents=got.get("exponents"),
        loss=got["loss"][0] / got["loss"][1] if "loss" in got else None,
    )


def _flags(plan: Plan, local: Local, stamp: Stamp | None, as_maxima: bool) -> Tensor:
    """What :attr:`Measurement.flags` is reduced from; never changed in place."""
    if stamp is None:
        flag = plan.flag(local.trouble is not None)
        return flag + MISPLACED if local.misplaced else flag
    trouble = (local.trouble is not None) + MISPLACED * local.misplaced
    values = (float(trouble), *stamp.pair(maximum=as_maxima))
    # Where nothing is compared, nothing is copied to the device either.
    return _constant(plan.device, values) if stamp.idle else _float64(plan.device, values)


def _float64(device: torch.device, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


_constant = functools.lru_cache(maxsize=8)(_float64)


def _own_slot(value: Tensor, group: ProcessGroup) -> Tensor:
    """``value`` at this rank's place among zeros: the sum over ranks has the value of each."""
    slots = value.new_zeros(torch.distributed.get_world_size(group))
    slots[collectives.rank_in(group)] = value
    return slots
