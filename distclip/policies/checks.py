"""Limits of policy arguments, in their type hints; one wording for all policies.

A field says what it takes, ``clip_factor: Positive``. By that the value is checked when the policy
is built, and the JSON schema of a configuration has the limit.
"""

from __future__ import annotations

import math
import operator
import types
import typing
from typing import Annotated, Any, TypeAlias, Union

from distclip.errors import ConfigurationError

_FITS = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}


class Limit:
    """What numbers an argument takes, in its type hint: ``Annotated[float, Limit(...)]``.

    Several limits in one hint are checked in their order.

    Args:
        words: what the number must be, for the message: ``"at most 1"``.
        why: what the message ends with.
        finite: inf is refused.
        whole: only integers are taken; 3.0 counts as one, 3.5 and True do not.
        bounds: as in JSON Schema: ``minimum``, ``exclusiveMinimum``, ``maximum``,
            ``exclusiveMaximum``.
    """

    def __init__(
        self,
        words: str,
        why: str = "",
        *,
        finite: bool = False,
        whole: bool = False,
        **bounds: float,
    ) -> None:
        self.words, self.why = words, f"; {why}" if why else ""
        self.finite, self.whole, self.bounds = finite, whole, bounds

    def fits(self, value: float) -> bool:
        """Whether the argument takes a number."""
        return (
            not (self.finite and math.isinf(value))
            and not (self.whole and not value.is_integer())
            and all(_FITS[key](value, bound) for key, bound in self.bounds.items())
        )


def at_least(least: int) -> Limit:
    """Integers from ``least`` on."""
    return Limit(f"a whole number of at least {least}", whole=True, minimum=least)


LONGEST = Limit(
    "at most 1,000,000",
    "every number of it is kept in memory and in checkpoints",  # 8 MB of float64
    maximum=1_000_000,
)
"""Samples that a window may hold."""

Positive: TypeAlias = Annotated[float, Limit("finite and > 0", finite=True, exclusiveMinimum=0)]
Factor: TypeAlias = Annotated[Positive, Limit(">= 1", minimum=1)]
Share: TypeAlias = Annotated[float, Limit(">= 0", minimum=0), Limit("at most 1", maximum=1)]
Fraction: TypeAlias = Annotated[float, Limit(">= 0 and < 1", minimum=0, exclusiveMaximum=1)]
"""A share of the past."""

Threshold: TypeAlias = Annotated[
    float,
    Limit(
        ">= 0",
        "a negative threshold would flip the sign of every gradient (math.inf measures without "
        "clipping)",
        minimum=0,
    ),
]
"""On a norm or an element; inf measures and never clips."""

NormOrder: TypeAlias = Annotated[
    float,
    Limit(
        "> 0 or inf",
        "2.0 is the Euclidean norm, inf the largest absolute element",
        exclusiveMinimum=0,
    ),
]


def limits_of(hint: Any) -> tuple[Limit, ...]:
    """The limits in a type hint, also in that of an argument that may be None."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(limit for part in typing.get_args(hint) for limit in limits_of(part))
    return tuple(m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Limit))


def checked(where: str, key: str, value: Any, hint: Any) -> Any:
    """``value`` as the number that a type hint with limits asks for.

    None is handed on where the hint has it, and "inf" is taken for inf, as torch does.

    Raises:
        ConfigurationError: no number, or one outside of the limits.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    limits = limits_of(hint)
    if isinstance(value, str) and value in ("inf", "Inf") and all(x.fits(math.inf) for x in limits):
        value = math.inf
    found = number(where, key, value)
    for limit in limits:
        if not limit.fits(found):
            raise ConfigurationError(
                f"{where}: {key} must be {limit.words}, got {value!r}{limit.why}"
            )
    return int(found) if any(limit.whole for limit in limits) else found


def name_of(policy: Any) -> str:
    """The name of a policy, or of a class of policies.

    Raises:
        ConfigurationError: it has none, or one that is no text.
    """
    name = getattr(policy, "name", None)
    if isinstance(name, str) and name:
        return name
    kind = policy if isinstance(policy, type) else type(policy)
    raise ConfigurationError(
        f"{kind.__qualname__}: `name` {'is missing' if name is None else f'is {name!r}'}; give the "
        f"class one: name: ClassVar[str] = 'my_policy' (without ClassVar it is an argument)"
    )


def check_fields(where: str, policy: object, known: dict[str, Any] | None) -> None:
    """Check the fields of a dataclass that have limits, and store them as numbers.

    Args:
        where: the policy's name, for messages.
        policy: the dataclass.
        known: what :func:`limited` says of its class; None: it is to be asked again.

    Raises:
        ConfigurationError: as :func:`checked`.
    """
    for key, hint in (limited(type(policy)) or {} if known is None else known).items():
        value = checked(where, key, getattr(policy, key), hint)
        object.__setattr__(policy, key, value)


def limited(kind: type) -> dict[str, Any] | None:
    """The type hints of a class that have limits, by field.

    Asked when the class is made: with a cache here, dynamo warns of each policy that is made in a
    compiled region.

    Returns:
        None: a hint names what is not there (a configuration refuses that), or not yet.
    """
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except NameError:
        return None
    return {key: hint for key, hint in hints.items() if limits_of(hint)}


def number(where: str, key: str, value: Any) -> float:
    """``value`` as a float; bools, strings and NaN are refused by name."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        value = float(value)  # numpy scalars, 0-dim tensors
    except OverflowError:
        raise ConfigurationError(
            f"{where}: {key} is an integer that no float64 holds; give a smaller one, or inf"
        ) from None
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{where}: {key} must be a number, got {value!r} ({type(value).__name__})"
        ) from None
    if math.isnan(value):
        raise ConfigurationError(f"{where}: {key} is NaN; give a number")
    return float(value)
