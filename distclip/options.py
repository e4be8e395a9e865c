"""The options of a clipper: named here once, checked once, and then fixed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
)

from annotated_types import Ge

from distclip.errors import ConfigurationError
from distclip.policies import Policy
from distclip.policies.sound import check_sound

OnNonfinite: TypeAlias = Literal["error", "error_late", "skip", "zero", "pass"]
VerifyReplicas: TypeAlias = Literal["first", "never"] | Annotated[int, Ge(1)]
"""When replicas are compared: in the first step, never, or in the first and every n-th step."""

Every: TypeAlias = Annotated[int, Ge(1)] | None
"""Every n-th step, from step 0 on; None: never."""

Value = TypeVar("Value")


class Looks(NamedTuple):
    """What one step measures for its report beyond the norms; the same on every rank."""

    ratios: bool = False
    exponents: bool = False


@dataclass(frozen=True)
class Options:
    """What a :class:`distclip.GradClipper` does, the same on every rank.

    Each is described there. A new option is a field here; configurations, the comparison of the
    ranks and the integrations take it from this class.

    Raises:
        ConfigurationError: a value that cannot be meant.
    """

    policy: Policy
    on_nonfinite: OnNonfinite = "error"
    norms: bool = True
    verify_replicas: VerifyReplicas = "first"
    fold: bool = True
    overlap: bool = False
    stuck_after: float | None = None
    ratios: Every = None
    exponents: Every = None

    def __post_init__(self) -> None:
        check_sound("policy", self.policy)
        check_on_nonfinite(self.on_nonfinite)
        every = self.verify_replicas
        if every not in ("first", "never") and (type(every) is not int or every < 1):
            raise ConfigurationError(
                f"verify_replicas must be 'first', 'never' or a number of steps >= 1, got {every!r}"
            )
        limit = self.stuck_after
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (number and 0.0 < limit < math.inf):
            raise ConfigurationError(
                f"stuck_after must be a number of seconds > 0, or None for no limit, got {limit!r}"
            )
        for name in LOOKS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigurationError(
                    f"{name} must be a number of steps >= 1, or None for never, got {value!r}"
                )
        for name in ("norms", "fold", "overlap"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name} must be True or False, got {value!r}")

    def looks(self, step: int) -> Looks:
        """What is measured in this step for its report alone."""
        chosen = [getattr(self, name) for name in LOOKS]
        if not any(chosen):
            return NOTHING_SHOWN
        return Looks(*(every is not None and step % every == 0 for every in chosen))

    def arguments(self, **changes: object) -> dict[str, Any]:
        """Keyword arguments of :class:`distclip.GradClipper`, some of them changed."""
        return {name: getattr(self, name) for name in OPTION_NAMES} | changes


LOOKS = Looks._fields
"""Options that say in which steps something is measured for the report."""

NOTHING_SHOWN = Looks()

OPTION_NAMES = tuple(each.name for each in dataclasses.fields(Options))


def refuse_late(value: object, where: str) -> None:
    """Raise a ConfigurationError where the caller reads a flag on the host at every step."""
    if value == "error_late":
        raise ConfigurationError(
            f"on_nonfinite='error_late' has no use under {where}, which reads the host at every "
            f"step: use 'error', which raises in the step itself"
        )


def check_on_nonfinite(value: object) -> None:
    """Raise a ConfigurationError unless ``value`` is a mode for NaN and inf."""
    if value not in get_args(OnNonfinite):
        modes = ", ".join(map(repr, get_args(OnNonfinite)))
        raise ConfigurationError(f"on_nonfinite must be one of {modes}, got {value!r}")


class HasOptions(Protocol):
    """An object with options."""

    _options: Options


class Fixed(Generic[Value]):
    """A read-only attribute that shows the option of its name.

    Options are compiled into passes, compared between ranks and kept in what follows from them, so
    one that changed later would be half obeyed.
    """

    def __init__(self, read: Callable[[Options], Value]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: HasOptions | None, owner: type | None = None) -> Value:
        if instance is None:
            return cast(Value, self)  # of the class: for inspection
        return self._read(instance._options)

    def __set__(self, instance: HasOptions, value: object) -> NoReturn:
        raise ConfigurationError(
            f"{type(instance).__name__}.{self._name} cannot be changed after construction (passes "
            f"are compiled for it and ranks have agreed on it): build a new "
            f"{type(instance).__name__}(..., {self._name}={value!r})"
        )
