"""Whether a policy has what its kind asks for, found out before the first step.

A policy may be anybody's. Its members are looked at where it is given to a clipper or to another
policy; its methods are tried once, with norms of 1, when its parameters are known. Policies are
pure, so that this has no effect.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from distclip.errors import ConfigurationError
from distclip.policies import checks, protocol
from distclip.policies.protocol import ParameterInfo, Policy, State
from distclip.policies.registry import registered

if TYPE_CHECKING:
    import torch

_FORMS = {
    "norm_type": "a number > 0 (math.inf: the largest element), as a field or a property",
    "threshold": "a number or None, as a field or a property",
    "needs": "a property that returns policies.Needs with orders > 0, such as "
    "policies.Needs.of(gradients=[2.0])",
    "per_parameter": "a set of keys of the state, such as frozenset({'mean'})",
    "memory_fields": "None, or a set of fields of the class, such as frozenset({'decay'})",
    "counts_nonfinite": "True or False",
    "init": "a method (parameters) that returns a dict of tensors, with one entry per parameter "
    "along the first dim of those that per_parameter names",
    "update": "a method (statistics, state) that returns (actions, state): a list of "
    "policies.Scale (coefficients: 0-dim or one per parameter; threshold: a number, 0-dim or None) "
    "and policies.Skip (a 0-dim bool tensor), and the keys, shapes and dtypes that `init` returns",
    "update_bound": "a method (statistics, state) that returns (bound, state): a tensor, 0-dim or "
    "with a bound per parameter, and the keys, shapes and dtypes that `init` returns",
    "unit_dims": "a method (parameter) that returns a tuple of different dims, all >= 0; () for "
    "one unit",
    "unit_coefficients": "a method (gradient_norms, weight_norms) that returns a tensor of their "
    "shape, or 0-dim for all units",
}
"""Member -> what it has to be."""


def check_sound(where: str, policy: object) -> None:
    """Refuse what is no policy, and a policy with a member that is of no use.

    Raises:
        ConfigurationError: names ``where``, or the class and the member, and what it has to be.
    """
    if not isinstance(policy, Policy):
        model = hasattr(policy, "named_parameters")  # whose repr would be pages long
        raise ConfigurationError(
            f"{where} must be a policy such as policies.global_norm(1.0), got "
            f"{type(policy).__name__ if model else repr(policy)}{likely_meant(policy)}"
        )
    checks.name_of(policy)
    fields = {*getattr(policy, "__dataclass_fields__", ())}
    fits: dict[str, Callable[[Any], bool]] = {
        "per_parameter": lambda x: not x - {*x},
        "memory_fields": lambda x: x is None or not x - fields,
        "counts_nonfinite": lambda x: isinstance(x, bool),
    }
    if isinstance(policy, protocol.UnitPolicy):
        fits["norm_type"] = _is_order
        fits["threshold"] = lambda x: x is None or isinstance(x, Real)
    fits["needs"] = lambda x: all(map(_is_order, (*x.gradient_norms, *x.weight_norms)))
    for member, fit in fits.items():
        value = _tried(policy, member, getattr, policy, member)
        try:
            fine = fit(value)
        except (TypeError, AttributeError):  # another type
            fine = False
        if not fine:
            raise _wrong(policy, member, f"is {value!r}")


def check_units(policy: Policy, parameters: Iterable[ParameterInfo]) -> None:
    """Refuse a per-unit policy that names dims which a parameter does not have.

    Raises:
        ConfigurationError: as :func:`check_sound`.
    """
    if not isinstance(policy, protocol.UnitPolicy) or _is_ours(policy):
        return
    for each in parameters:
        dims: Any = _tried(policy, "unit_dims", policy.unit_dims, each)
        there = set(map(str, range(len(each.shape))))
        if not isinstance(dims, tuple) or len(there.intersection(map(str, dims))) < len(dims):
            found = f"returned {dims!r} for {each.name!r} of shape {list(each.shape)}"
            raise _wrong(policy, "unit_dims", found)


def first_state(policy: Policy, parameters: Sequence[ParameterInfo], device: torch.device) -> State:
    """The state of a policy before the first step, on the device.

    The methods of a policy that is not built in are tried with it.

    Raises:
        ConfigurationError: as :func:`check_sound`.
    """
    found: Any = _tried(policy, "init", policy.init, parameters)
    forms, count = _forms(found), (len(parameters),)
    rows = [(forms or {}).get(key, ((),))[0][:1] for key in policy.per_parameter]
    if forms is None or any(row != count for row in rows):
        raise _wrong(policy, "init", f"returned {found!r} for {len(parameters)} parameters")
    state: State = {key: value.to(device) for key, value in found.items()}
    if not _is_ours(policy):
        _try_methods(policy, parameters, state, device)
    return state


def _try_methods(
    policy: Policy, parameters: Sequence[ParameterInfo], state: State, device: torch.device
) -> None:
    import torch

    from distclip.policies.decide import rehearse  # which imports torch

    if isinstance(policy, protocol.UnitPolicy):
        member, ones = "unit_coefficients", torch.ones(2, dtype=torch.float64, device=device)
        found: Any = _tried(policy, member, policy.unit_coefficients, ones, ones)
        if getattr(found, "shape", None) not in ((), ones.shape):
            raise _wrong(policy, member, f"returned {found!r} for norms {ones!r}")
        return
    member = "update_bound" if isinstance(policy, protocol.ClampingPolicy) else "update"
    actions, new = _tried(policy, member, rehearse, policy, parameters, dict(state), device)
    if _forms(new) != _forms(state):
        raise _wrong(policy, member, f"returned the state {new!r}, and was given {state!r}")
    for action in actions:
        if isinstance(action, protocol.Skip):
            fine = _forms({"": action.flag}) == {"": ((), torch.bool)}
        else:
            limit = action.threshold
            fine = action.coefficients.shape in ((), (len(parameters),)) and (
                limit is None or isinstance(limit, Real) or getattr(limit, "shape", None) == ()
            )
        if not fine:
            raise _wrong(policy, member, f"returned {action!r}")


def _tried(policy: Policy, member: str, call: Callable[..., Any], *given: Any) -> Any:
    try:
        return call(*given)
    except ConfigurationError:
        raise
    except Exception as error:
        found = f"raised {type(error).__name__}: {error}, before the first step"
        raise _wrong(policy, member, found) from error


def _wrong(policy: Policy, member: str, found: str) -> ConfigurationError:
    short = " ".join(found.split())[:300]
    return ConfigurationError(
        f"{type(policy).__qualname__}: `{member}` {short}; it has to be {_FORMS[member]}"
    )


def _is_ours(policy: Policy) -> bool:
    return type(policy).__module__.startswith("distclip.")


def _is_order(value: Any) -> bool:
    return isinstance(value, Real) and float(value) > 0


def _forms(state: Any) -> dict[str, tuple[Any, Any]] | None:
    """Key -> shape and dtype; None where it is no dict of tensors."""
    try:
        return {key: (value.shape, value.dtype) for key, value in state.items()}
    except AttributeError:
        return None


def likely_meant(given: object) -> str:
    """What was probably meant by something that is no policy, or no configuration."""
    if isinstance(given, Policy):
        return "; a policy itself goes to GradClipper(model, policy)"
    if isinstance(given, type) and issubclass(given, Policy):
        ours = registered().get(getattr(given, "name", "")) is given
        form = (
            f"write policies.{given.name}(...)"
            if ours
            else f"make one of the class: {given.__name__}(...)"
        )
        return f"; {form}"
    if hasattr(given, "named_parameters"):
        return (
            "; the model comes first in GradClipper(model, policy), and second in "
            "from_config(configuration, model)"
        )
    if isinstance(given, (Mapping, os.PathLike)) or str(given).endswith((".yaml", ".yml", ".json")):
        return "; a configuration goes to distclip.from_config(configuration, model)"
    near = difflib.get_close_matches(str(given), registered(), n=1)
    return f"; write policies.{near[0]}(...)" if near else ""
