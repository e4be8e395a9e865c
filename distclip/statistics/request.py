"""What one pass over the gradients is to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True)
class Request:
    """What one pass measures. Indices are rows of the plan's table.

    Attributes:
        orders: orders of the per-parameter gradient norms.
        weight_orders: orders of the per-parameter weight norms.
        weighted: parameters whose weight norms are wanted.
        unit_dims: parameters measured per unit -> the dims that index their units.
        decided_locally: those of them whose units lie whole on a rank and are decided there,
            before the reduction; the others' units are summed over ranks.
        deciding_orders: orders of the unit norms, of gradients and weights, that decisions read.
        bounds: parameters to measure as if clamped to +-bound.
        raw_orders: orders to measure also without the clamping.
        reduced: whether anything has to be known on all ranks.
        loss: whether the loss is averaged over ranks along with the norms.
        exponents: whether the elements of each binary exponent are counted.
    """

    orders: tuple[float, ...]
    weight_orders: tuple[float, ...] = ()
    weighted: frozenset[int] = frozenset()
    unit_dims: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    decided_locally: frozenset[int] = frozenset()
    deciding_orders: tuple[float, ...] = ()
    bounds: Mapping[int, float] = field(default_factory=dict)
    raw_orders: tuple[float, ...] = ()
    reduced: bool = True
    loss: bool = False
    exponents: bool = False

    def scaled(self, factor: float) -> Request:
        """The request for gradients that are ``factor`` times too large."""
        bounds = {member: bound * factor for member, bound in self.bounds.items()}
        return replace(self, bounds=bounds)

    def with_weights(self, order: float, parameters: int) -> Request:
        """The request with the norms of all weights, of one order, known on all ranks."""
        return replace(
            self,
            weight_orders=tuple(dict.fromkeys((*self.weight_orders, order))),
            weighted=frozenset(range(parameters)),
            reduced=True,
        )

    def with_exponents(self) -> Request:
        """The request with counts of binary exponents, known on all ranks."""
        return replace(self, exponents=True, reduced=True)

    @cached_property
    def unit_orders(self) -> tuple[float, ...]:
        """Orders of the gradients' unit norms: for decisions, and for norms of whole parameters."""
        return tuple(dict.fromkeys((*self.deciding_orders, *self.orders)))
