"""What a policy is given, what it gives back, and the two base classes.

A policy is mathematics only: whole-tensor statistics in, actions out. It never sees a rank, a
shard or a gradient, so the same policy is right under every sharding. Everything is float64 on
the statistics' device; nothing here may read a value on the host.
"""

from __future__ import annotations

import abc
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""A policy's memory: tensors of fixed size, independent of the number of ranks."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One logical (unsharded) parameter.

    ``shape`` is the logical shape; ``group`` the index of its optimizer parameter group, or None
    when no optimizer is known.
    """

    name: str
    shape: tuple[int, ...]
    group: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the logical parameter."""
        return math.prod(self.shape)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name matches a pattern (``fnmatch``, case-sensitive).

    Of ranks that hold different experts under one name, that of rank r is called ``name@r``; a
    pattern matches it with or without the place.
    """
    return fnmatch.fnmatchcase(name, pattern) or (
        "@" in name and fnmatch.fnmatchcase(name.rpartition("@")[0], pattern)
    )


@dataclass(frozen=True, slots=True)
class Needs:
    """The statistics that a policy reads, by norm order ``p`` (``math.inf`` for the maximum).

    ``groups``: whether it reads ``ParameterInfo.group``.
    ``loss``: whether it reads the loss, which the training loop gives by ``observe(loss)``.
    """

    gradient_norms: frozenset[float] = frozenset()
    weight_norms: frozenset[float] = frozenset()
    groups: bool = False
    loss: bool = False

    @classmethod
    def of(cls, *, gradients: Sequence[float] = (), weights: Sequence[float] = ()) -> Needs:
        """Build from plain sequences of orders."""
        return cls(frozenset(map(float, gradients)), frozenset(map(float, weights)))


SMALLEST = torch.finfo(torch.float64).tiny


def combine_norms(norms: Tensor, norm_type: float, *, in_range: bool = False) -> Tensor:
    """The p-norm of a whole from the p-norms of its disjoint parts.

    Scaled by the largest part, so nothing overflows or underflows on the way.

    Args:
        norms: float64, shape ``(parts,)``.
        norm_type: the order p > 0, or ``math.inf``.
        in_range: their p-th powers are known to stay in float64's range; saves the scaling.

    Returns:
        0-dim float64 tensor; 0 for no parts; NaN and inf pass through.
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    if math.isinf(norm_type):
        return norms.max()
    if in_range:
        whole: Tensor = torch.linalg.vector_norm(norms, norm_type)
        return whole
    largest = norms.max()
    # 1 instead of NaN and inf, which then speak for themselves; and never a division by 0.
    unit = torch.nan_to_num(largest, nan=1.0, posinf=1.0).clamp_(min=SMALLEST)
    total: Tensor = torch.linalg.vector_norm(norms / unit, norm_type) * unit
    return total


@dataclass(frozen=True, slots=True)
class Statistics:
    """Whole-tensor statistics of the parameters that one policy is responsible for.

    All tensors are float64 of shape ``(len(parameters),)``, in the order of ``parameters``. A
    parameter without a gradient has norm 0. ``loss`` is 0-dim float64, the mean over the ranks that
    gave one, NaN where none did; None for a policy that does not need it.

    ``in_range``: powers of the gradients' norms neither leave float64's range nor vanish in it.
    """

    parameters: Sequence[ParameterInfo]
    gradients: Mapping[float, Tensor]
    weights: Mapping[float, Tensor] = field(default_factory=dict)
    in_range: bool = False
    loss: Tensor | None = None

    def gradient_norms(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of each gradient; ``norm_type`` must be among the policy's ``needs``."""
        return self.gradients[norm_type]

    def weight_norms(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of each weight; ``norm_type`` must be among the policy's ``needs``."""
        return self.weights[norm_type]

    def total_norm(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of all the gradients together, 0-dim float64."""
        return combine_norms(self.gradients[norm_type], norm_type, in_range=self.in_range)


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply each gradient by its coefficient.

    ``coefficients``: float64, shape ``(len(parameters),)``, or 0-dim for one that serves all.
    ``threshold``: 0-dim, what the report shows; None where there is no single number.
    """

    coefficients: Tensor
    threshold: Tensor | float | None = None


@dataclass(frozen=True, slots=True)
class Clamp:
    """Clamp every element to ``[-bound, bound]``; NaN stays NaN.

    ``bound`` is the policy's own ``bound``, a plain number known before the step, so that a chain
    knows its passes.
    """

    bound: float


@dataclass(frozen=True, slots=True)
class Skip:
    """Where ``flag`` (0-dim bool) is true, this whole update is skipped on every rank."""

    flag: Tensor


Action: TypeAlias = Scale | Clamp | Skip


class Policy(abc.ABC):
    """A pure, replicated clipping algorithm.

    Subclasses are frozen dataclasses: the fields are the configuration, checked in
    ``__post_init__`` and printed by ``repr`` (ranks compare the ``repr``).
    """

    name: ClassVar[str]
    """The name in a configuration file."""

    per_parameter: ClassVar[frozenset[str]] = frozenset()
    """Keys of the state whose tensors have one entry per parameter, along their first dim, in the
    order of ``init(parameters)``. Checkpoints keep these by parameter name."""

    @property
    def needs(self) -> Needs:
        """The statistics that ``update`` reads."""
        return Needs()

    @property
    def bound(self) -> float | None:
        """For a policy that clamps every element: the bound, the same at every step."""
        return None

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        """The state before the first step; ``{}`` for a policy without memory.

        Tensors that keep their shape and dtype; the clipper moves them to the statistics' device.
        """
        return {}

    @abc.abstractmethod
    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        """Decide one step. Must not change ``state`` or ``statistics`` in place."""


class UnitPolicy(Policy):
    """A policy without memory that decides for each unit by that unit's norms alone.

    Being elementwise in units is what lets every rank decide for the rows that it holds, before
    any communication.
    """

    @abc.abstractmethod
    def unit_dims(self, parameter: ParameterInfo) -> tuple[int, ...]:
        """The dims that index this parameter's units; all others are reduced. ``()``: one unit."""

    @abc.abstractmethod
    def unit_coefficients(self, gradient_norms: Tensor, weight_norms: Tensor) -> Tensor:
        """Coefficients of units from their 2-norms; all float64 of one shape ``(units,)``."""

    @property
    def threshold(self) -> float | None:
        """What the report shows as threshold."""
        return None

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        """Decide with each parameter taken as one unit (used where that is what units are)."""
        coefficients = self.unit_coefficients(
            statistics.gradient_norms(2.0), statistics.weight_norms(2.0)
        )
        return (Scale(coefficients, self.threshold),), state
