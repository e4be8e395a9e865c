"""What a policy is given, what it gives back, and the three kinds of policies.

A policy is mathematics only: whole-tensor statistics in, actions out. It never sees a rank, a
shard or a gradient, so the same policy is right under every sharding. Everything is float64 on
the statistics' device; nothing here may read a value on the host.
"""

from __future__ import annotations

import abc
import contextlib
import fnmatch
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from distclip.errors import ConfigurationError
from distclip.policies import checks
from distclip.policies._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = dict[str, "Tensor"]
"""A policy's memory: tensors of fixed size, independent of the number of ranks."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One logical (unsharded) parameter.

    ``shape`` is the logical shape; ``group`` the index of its optimizer parameter group, or None
    when no optimizer is known. Of a composition that asks for them: ``optimizer`` and ``module``
    are the class names, bases included, of the optimizer that steps it and of the module that has
    it; ``options`` the values of keys of its parameter group, as text.
    """

    name: str
    shape: tuple[int, ...]
    group: int | None = None
    optimizer: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    module: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements of the logical parameter."""
        return math.prod(self.shape)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name matches a pattern (``fnmatch``, case-sensitive).

    Of ranks that hold different experts under one name, that of rank r is called ``name@r``; a
    pattern matches it with or without the place.
    """
    without_place = name.rpartition("@")[0] or name
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(without_place, pattern)


@dataclass(frozen=True, slots=True)
class Needs:
    """The statistics that a policy reads, by norm order ``p`` (``math.inf`` for the maximum).

    ``groups``, ``loss``: whether it reads ``ParameterInfo.group``, and the loss of ``observe``.
    """

    gradient_norms: frozenset[float] = frozenset()
    weight_norms: frozenset[float] = frozenset()
    groups: bool = False
    loss: bool = False

    @classmethod
    def of(cls, *, gradients: Sequence[float] = (), weights: Sequence[float] = ()) -> Needs:
        """Build from plain sequences of orders."""
        return cls(frozenset(map(float, gradients)), frozenset(map(float, weights)))


def combine_norms(norms: Tensor, norm_type: float, *, in_range: bool = False) -> Tensor:
    """The p-norm of a whole from those of its disjoint parts, without overflow or underflow.

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
        return cast("Tensor", torch.linalg.vector_norm(norms, norm_type))
    from distclip.kernels.powers import p_norm  # which imports torch

    return p_norm(norms, norm_type)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Whole-tensor statistics of the parameters that one policy is responsible for.

    All tensors are float64 of shape ``(len(parameters),)``, in the order of ``parameters``. A
    parameter without a gradient has norm 0. ``loss`` is 0-dim float64, the mean over the ranks that
    gave one, NaN where none did; None for a policy that does not need it. ``in_range``: powers of
    the gradients' norms neither leave float64's range nor vanish in it.
    """

    parameters: Sequence[ParameterInfo]
    gradients: Mapping[float, Tensor]
    weights: Mapping[float, Tensor] = field(default_factory=dict)
    in_range: bool = False
    loss: Tensor | None = None

    def gradient_norms(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of each gradient; ``norm_type`` must be among the policy's ``needs``."""
        return _declared(self.gradients, norm_type, "gradient")

    def weight_norms(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of each weight; ``norm_type`` must be among the policy's ``needs``."""
        return _declared(self.weights, norm_type, "weight")

    def total_norm(self, norm_type: float = 2.0) -> Tensor:
        """p-norm of all the gradients together, 0-dim float64."""
        return combine_norms(self.gradient_norms(norm_type), norm_type, in_range=self.in_range)


def _declared(norms: Mapping[float, Tensor], norm_type: float, what: str) -> Tensor:
    if norm_type in norms:
        return norms[norm_type]
    raise ConfigurationError(
        f"{what} norms of order {norm_type} are not among the policy's needs; declare them: "
        f"needs = property(lambda self: policies.Needs.of({what}s=[{norm_type}]))"
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply each gradient by its coefficient.

    ``coefficients``: float64, shape ``(len(parameters),)``, or 0-dim for one that serves all.
    ``threshold``: 0-dim, what the report shows; None where there is no single number.
    """

    coefficients: Tensor
    threshold: Tensor | float | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """Where ``flag`` (0-dim bool) is true, this whole update is skipped on every rank."""

    flag: Tensor


Action: TypeAlias = Scale | Skip


@dataclass(frozen=True, slots=True)
class Clamp:
    """No action: it is refused. A policy that clamps is a :class:`ClampingPolicy`.

    A chain has to know its clamps, and with them its passes, before the first step.
    """

    bound: float


class Policy(abc.ABC):
    """A pure, replicated clipping algorithm: the base of the three kinds of policies.

    * :class:`ScalingPolicy` multiplies gradients by coefficients, or skips the step.
    * :class:`ClampingPolicy` clamps every element to a bound.
    * :class:`UnitPolicy` multiplies each unit (an output row, for instance) by a coefficient of
      its own.

    A class that derives from ``Policy`` itself and defines ``update`` is a scaling policy.
    Subclasses are frozen dataclasses: the fields are the configuration, checked in
    ``__post_init__`` and printed by ``repr`` (ranks compare the ``repr``). Fields whose type hints
    have a :class:`Limit` are checked. A class with a member of another kind is refused.
    """

    name: ClassVar[str]
    """The name in a configuration file."""

    per_parameter: ClassVar[frozenset[str]] = frozenset()
    """Keys of the state whose tensors have one entry per parameter, along their first dim, in the
    order of ``init(parameters)``. Checkpoints keep these by parameter name."""

    memory_fields: ClassVar[frozenset[str] | None] = None
    """Fields that the meaning of the state depends on (a window, not a threshold). A checkpoint is
    loaded into a policy whose other fields have changed. None: it depends on all. What a class says
    is for its own fields; those of a subclass count until that says otherwise, and all of them do
    where it decides on the state itself."""

    counts_nonfinite: ClassVar[bool] = False
    """Whether a step that ``on_nonfinite="skip"`` drops leaves its trace in the state, which is to
    be as finite as ever."""

    _kind: ClassVar[str] = "a scaling policy"
    _refused: ClassVar[Mapping[str, str]] = {  # member that is not for this kind -> the kind
        "bound": "ClampingPolicy",
        "update_bound": "ClampingPolicy",
        "unit_dims": "UnitPolicy",
        "unit_coefficients": "UnitPolicy",
    }

    _limited: ClassVar[dict[str, Any] | None] = None  # checks.limited of the class

    def __post_init__(self) -> None:
        """Check the fields whose type hints have a limit, and store them as numbers.

        Raises:
            ConfigurationError: names the field, its value and the limit.
        """
        checks.check_fields(checks.name_of(self), self, self._limited)

    def __repr__(self) -> str:  # without an address, in a class that is no dataclass too
        return (
            f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"
        )

    @property
    def needs(self) -> Needs:
        """The statistics that the policy reads."""
        return Needs()

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        """The state before the first step; ``{}`` for a policy without memory.

        Tensors that keep their shape and dtype; the clipper moves them to the statistics' device.
        """
        return {}

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        if cls.__module__ == __name__:
            return
        cls._limited = checks.limited(cls)
        kinds = [kind for kind in cls.__mro__ if kind.__module__ == __name__ and kind is not Policy]
        if len(kinds) > 1:
            raise ConfigurationError(
                f"{cls.__qualname__} derives from {' and '.join(k.__name__ for k in kinds)}, and a "
                f"policy is of one kind; write two policies and put them together by "
                f"policies.chain(...)"
            )
        for member, kind in cls._refused.items():
            if _defines(cls, member):
                raise ConfigurationError(
                    f"{cls.__qualname__} is {cls._kind} and defines `{member}`, which would have "
                    f"no effect: {_MENDS[kind]}"
                )


def memory_depends_on(policy: Policy, field: str) -> bool:
    """Whether the meaning of a policy's state depends on one of its fields."""
    declared = type(policy).memory_fields
    if declared is None or field in declared:
        return True
    for each in type(policy).__mro__:
        if "memory_fields" in vars(each):
            return field not in getattr(each, "__dataclass_fields__", {})
        if _members(each) & {"init", "update", "update_bound", "needs"}:
            break
    return True


_MENDS = {
    "ScalingPolicy": "derive it from policies.ScalingPolicy, whose `init` and `update` are called "
    "at every step, or remove the member",
    "ClampingPolicy": "derive it from policies.ClampingPolicy to clamp elements (and return the "
    "scaling from a second policy in policies.chain(...)), or give the member another name",
    "UnitPolicy": "derive it from policies.UnitPolicy to decide per unit, or give the member "
    "another name",
    "": "every UnitPolicy is given the norms of gradients and weights of its `norm_type`; remove "
    "the member",
}


def _defines(cls: type, member: str) -> bool:
    """Whether a class, or a base of it outside of this module, defines a member or a field."""
    return any(member in _members(each) for each in cls.__mro__ if each.__module__ != __name__)


def _members(cls: type) -> set[str]:
    """Names that a class body defines or annotates (a field without a default is no attribute)."""
    with contextlib.suppress(NameError):  # an annotation that cannot be resolved yet (Python 3.14)
        return {*vars(cls), *inspect.get_annotations(cls)}
    return {*vars(cls)}


class ScalingPolicy(Policy):
    """A policy that multiplies gradients by coefficients, or skips the step."""

    @abc.abstractmethod
    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        """Decide one step. Must not change ``state`` or ``statistics`` in place.

        Returns:
            Any number of :class:`Scale` and :class:`Skip`, and the new state.
        """


class ClampingPolicy(Policy):
    """A policy that clamps every element to ``[-bound, bound]``; NaN stays NaN.

    It defines one of two members:

    * ``bound``, a field or a property: a number >= 0, the same at every step. It is measured along
      with the gradients and needs no state.
    * ``update_bound(statistics, state)``: the bound of this step and the new state, both on the
      device. It may define ``needs``, ``init`` and ``per_parameter`` too. Norms after such a clamp
      are not known, so a policy behind it in a chain has the gradients measured again.
    """

    _kind = "a clamping policy"
    _refused: ClassVar[Mapping[str, str]] = {
        "update": "ScalingPolicy",
        "unit_dims": "UnitPolicy",
        "unit_coefficients": "UnitPolicy",
    }
    moving: ClassVar[bool] = False
    """Whether ``update_bound`` decides on the bound at every step."""

    if TYPE_CHECKING:

        @property
        def bound(self) -> float:
            """The bound of every step, >= 0."""

    def update_bound(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Decide on the bound of one step. Must not change ``state`` or ``statistics`` in place.

        Returns:
            The bound, float64 of shape ``(len(parameters),)``, or 0-dim for one that serves all,
            and the new state. Where a bound is NaN or negative nothing is clamped.
        """
        raise NotImplementedError

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        cls.moving = _defines(cls, "update_bound")
        if cls.moving and _defines(cls, "bound"):
            raise ConfigurationError(
                f"{cls.__qualname__} defines both `bound`, the same at every step, and "
                f"`update_bound`, decided at every step; remove one of them"
            )
        if cls.moving:
            return
        for member in ("needs", "init", "per_parameter"):
            if _defines(cls, member):
                raise ConfigurationError(
                    f"{cls.__qualname__} is a clamping policy and defines `{member}`, which has no "
                    f"effect without `update_bound`: define update_bound(statistics, state) in "
                    f"place of `bound`, or remove `{member}`"
                )


class UnitPolicy(Policy):
    """A policy without memory that decides for each unit by that unit's norms alone.

    So every rank decides for the rows that it holds, before any communication.
    """

    _kind = "a per-unit policy"
    _refused: ClassVar[Mapping[str, str]] = {
        "update": "ScalingPolicy",
        "init": "ScalingPolicy",
        "per_parameter": "ScalingPolicy",
        "bound": "ClampingPolicy",
        "update_bound": "ClampingPolicy",
        "needs": "",
    }

    @property
    def norm_type(self) -> float:
        """Order p > 0, or ``math.inf``, of the norms that :meth:`unit_coefficients` is given."""
        return 2.0

    @property
    def needs(self) -> Needs:
        """The norms of gradients and weights, of the order :attr:`norm_type`."""
        return Needs.of(gradients=[self.norm_type], weights=[self.norm_type])

    @abc.abstractmethod
    def unit_dims(self, parameter: ParameterInfo) -> tuple[int, ...]:
        """The dims that index this parameter's units; all others are reduced. ``()``: one unit."""

    @abc.abstractmethod
    def unit_coefficients(self, gradient_norms: Tensor, weight_norms: Tensor) -> Tensor:
        """Coefficients of units from their norms; all float64 of one shape ``(units,)``."""

    @property
    def threshold(self) -> float | None:
        """What the report shows as threshold."""
        return None
