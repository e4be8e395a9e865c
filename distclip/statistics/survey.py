"""What one pass measures of a plan, and what one step has found of it on this rank."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.errors import DistclipError
from distclip.kernels import measuring
from distclip.kernels.look import Look
from distclip.kernels.plain import is_wide
from distclip.layouts import sparse
from distclip.layouts.plan import Plan
from distclip.statistics.request import Request
from distclip.statistics.units import UnitTable


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass measures of a plan; the same at every step.

    Attributes:
        plan: the parameters, and the pieces of them on this rank.
        request: what is measured.
        table: where units lie, of the parameters that are measured per unit.
    """

    plan: Plan
    request: Request
    table: UnitTable

    @classmethod
    def of(
        cls, plan: Plan, request: Request, deciding: Mapping[int, Hashable] | None = None
    ) -> Survey:
        """The survey of a plan, with its unit table; ``deciding`` as for :class:`UnitTable`."""
        return cls(plan, request, UnitTable(plan, request, deciding))

    def asking(self, request: Request) -> Survey:
        """The survey of a step that measures more, or with other bounds."""
        return self if request is self.request else replace(self, request=request)

    @cached_property
    def is_plain(self) -> bool:
        """Whether norms of whole gradients, of one order at most, are all that is measured.

        As they are, or as if clamped and as they are; on the host, by the compiled loops.
        """
        request, plan = self.request, self.plan
        if plan.device.type != "cpu" or not measuring.has_loops(plan.dtypes, request.orders):
            return False
        if request.unit_dims or request.weight_orders or request.exponents or request.loss:
            return False
        both = not request.bounds or request.raw_orders == request.orders
        return both and len(request.orders) <= 1

    @cached_property
    def counted(self) -> tuple[int, ...] | None:
        """Positions of the pieces that are measured as a whole, and counted here; None for all."""
        divided, pieces = self.request.unit_dims, self.plan.pieces
        found = [p for p, each in enumerate(pieces) if each.share and each.index not in divided]
        return None if len(found) == len(pieces) else tuple(found)

    @cached_property
    def wide(self) -> Mapping[float, bool]:
        """Per order, whether p-th powers of norms of these dtypes can leave float64."""
        request, kinds = self.request, [getattr(torch, dtype) for dtype in self.plan.dtypes]
        orders = (*request.unit_orders, *request.weight_orders)
        return {order: any(is_wide(kind, order) for kind in kinds) for order in orders}

    @cached_property
    def in_range(self) -> bool:
        """Whether powers of the norms stay in float64's range."""
        return True not in self.wide.values()

    @cached_property
    def bounds(self) -> npt.NDArray[np.float64] | None:
        """float64 ``(pieces,)``, what each is measured as if clamped to; inf, or None, for none."""
        bounds = self.request.bounds
        if not bounds:
            return None
        return np.array([bounds.get(piece.index, math.inf) for piece in self.plan.pieces])

    @cached_property
    def weighted(self) -> tuple[int, ...]:
        """Positions of the pieces here whose weights are measured as a whole."""
        wanted, pieces = self.request.weighted, self.plan.pieces
        return tuple(p for p, piece in enumerate(pieces) if piece.index in wanted)

    @cached_property
    def weighs_all(self) -> bool:
        """Whether the weights of all pieces here are measured, and counted."""
        read = {*self.weighted, *self.table.positions}
        return self.plan.shares is None and len(read) == len(self.plan.pieces)

    @cached_property
    def unit_counts(self) -> Tensor:
        """float64 ``(parameters,)``: how many units each has; 1 where it is one."""
        dims = self.request.unit_dims
        counts = [
            math.prod(entry.shape[dim] for dim in dims.get(row, ()))
            for row, entry in enumerate(self.plan.entries)
        ]
        return torch.tensor(counts, dtype=torch.float64, device=self.plan.device).clamp(min=1)


@dataclass
class Local:
    """What this rank found in one pass, and decided before the all-reduce.

    Attributes:
        present: the gradient of each piece of the plan; None where there is none.
        seen: what a look at those that are there has found, where nothing in it is unusual.
        sparse: whether any gradient is, so that ``present`` has its values in its place.
        misplaced: whether a gradient here has to be redistributed, by all ranks of its mesh.
        trouble: the error on this rank; it is raised when all ranks know of one.
        norms: order -> float64 ``(pieces,)``, 0 where not measured or not counted.
        raw: the same without the clamping, for ``raw_orders``.
        kept: bool ``(pieces,)``, those that their clamp is known to leave as they are; None where
            nothing is known.
        weights: order -> float64 ``(pieces,)``.
        unit_norms: order -> float64 ``(local.size,)`` of :class:`UnitTable`, 0 where a gradient is
            missing.
        raw_units: as ``unit_norms``, without the clamping, where any piece is clamped.
        unit_weights: order -> float64, norms of the weights of those units that are not decided on
            here, ``(local.size - whole.size,)``.
        deciding: the weights of the pieces that are decided here; None where the gradient is
            missing.
        seen_weights: what a look at the weights of all pieces has found; None where one was not
            looked at, or is unusual.
        missing: numbers in the table of the pieces that have no gradient.
        loss: float64 ``(2,)``, the sum of the losses given on this rank, and how many those are.
        exponents: float64 ``(parameters, columns)``, the elements here; None where not asked for.
        coefficients: float64 ``(whole.size,)`` of :class:`UnitTable`, what was decided here; None
            where all are 1.
        after: order -> float64 ``(pieces,)``, ``norms`` after scaling by them.
        clipped: float64 ``(parameters,)``, how many units they scale, counted once over replicas;
            None where no rank decides before the reduction.
        smallest: 0-dim, the smallest of them; None as ``clipped``.
    """

    present: Sequence[Tensor | None] = ()
    seen: Look | None = None
    sparse: bool = False
    misplaced: bool = False
    trouble: DistclipError | None = None
    norms: dict[float, Tensor] = field(default_factory=dict)
    raw: dict[float, Tensor] = field(default_factory=dict)
    kept: npt.NDArray[np.bool_] | None = None
    weights: dict[float, Tensor] = field(default_factory=dict)
    unit_norms: dict[float, Tensor] = field(default_factory=dict)
    raw_units: dict[float, Tensor] = field(default_factory=dict)
    unit_weights: dict[float, Tensor] = field(default_factory=dict)
    deciding: Sequence[Tensor | None] = ()
    seen_weights: Look | None = None
    missing: Sequence[int] = ()
    loss: Tensor | None = None
    exponents: Tensor | None = None
    coefficients: Tensor | None = None
    after: dict[float, Tensor] = field(default_factory=dict)
    clipped: Tensor | None = None
    smallest: Tensor | None = None

    def pairs(self) -> list[tuple[int, Tensor]]:
        """``(position of the piece in the plan, gradient)``, of those that are there."""
        return [(p, g) for p, g in enumerate(self.present) if g is not None]

    def dense(self, plan: Plan) -> Sequence[Tensor | None]:
        """``present``, with what is sparse written out."""
        if not self.sparse:
            return self.present
        pairs = zip(plan.pieces, self.present, strict=True)
        return [sparse.dense(piece, gradient) for piece, gradient in pairs]

    def divide(self, scale: Tensor) -> None:
        """Divide all gradient norms by a 0-dim loss scale."""
        for by_order in (self.norms, self.raw, self.unit_norms):
            for order in by_order:
                by_order[order] = by_order[order] / scale
