"""Policies made of policies: one after another (``chain``), side by side (``by_name``)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies.protocol import ParameterInfo, Policy, matches


class Composite(Policy):
    """Base of the two: it decides nothing itself, it is taken apart into stages."""


@dataclass(frozen=True)
class Chain(Composite):
    """Policies one after another; each sees the gradients as the one before left them.

    After a scaling by c every norm is c times what it was, so a chain of scaling policies costs
    one measuring pass and one scaling pass, whatever its length. Only what follows a ``value``
    that itself follows a scaling has to be measured again.

    Args:
        policies: at least one policy.
    """

    policies: tuple[Policy, ...]
    name: ClassVar[str] = "chain"

    def __init__(self, *policies: Policy) -> None:
        if not policies:
            raise ConfigurationError("chain: give at least one policy")
        for policy in policies:
            _check_policy("chain", policy)
        object.__setattr__(self, "policies", policies)


@dataclass(frozen=True)
class ByName(Composite):
    """Different policies for different parameters.

    Args:
        mapping: name pattern (``fnmatch``: ``*``, ``?``, ``[...]``, case-sensitive) -> policy, or
            None to leave the parameters that match alone. The first match wins.
        default: for parameters that no pattern matches; None leaves them alone.

    A norm policy in here takes the norm over the parameters that it is responsible for. Every
    parameter, also one left alone, is measured for the report.
    """

    mapping: tuple[tuple[str, Policy | None], ...]
    default: Policy | None
    name: ClassVar[str] = "by_name"

    def __init__(self, mapping: Mapping[str, Policy | None], default: Policy | None = None) -> None:
        for pattern, policy in mapping.items():
            if policy is not None:
                _check_policy(f"by_name[{pattern!r}]", policy)
        if default is not None:
            _check_policy("by_name default", default)
        object.__setattr__(self, "mapping", tuple(mapping.items()))
        object.__setattr__(self, "default", default)

    def pattern_of(self, name: str) -> str | None:
        """The first pattern that matches, or None (the default's turn)."""
        for pattern, _ in self.mapping:
            if matches(name, pattern):
                return pattern
        return None


def _check_policy(where: str, policy: object) -> None:
    if not isinstance(policy, Policy):
        raise ConfigurationError(
            f"{where}: expected a policy such as policies.global_norm(1.0), got {policy!r}"
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """One plain policy of a composition, and the parameters that it is responsible for.

    ``path`` names it within the composition (``""``, ``"1"``, ``"*.bias/0"``) and keys its state;
    ``members`` are indices into the table of parameters.
    """

    path: str
    policy: Policy
    members: tuple[int, ...]


def stages(policy: Policy, parameters: Sequence[ParameterInfo]) -> tuple[Stage, ...]:
    """Take a composition apart into plain policies in the order in which they act.

    Exact, because the parts of a ``by_name`` are responsible for disjoint sets of parameters.
    """
    return tuple(_stages(policy, parameters, tuple(range(len(parameters))), ""))


def unmatched(policy: Policy, names: Sequence[str]) -> list[str]:
    """Patterns of every ``by_name`` of a composition that no name matches, in order."""
    if isinstance(policy, Chain):
        return [each for part in policy.policies for each in unmatched(part, names)]
    if not isinstance(policy, ByName):
        return []
    found = [
        pattern
        for pattern, _ in policy.mapping
        if not any(matches(name, pattern) for name in names)
    ]
    for part in (*(choice for _, choice in policy.mapping), policy.default):
        found += [] if part is None else unmatched(part, names)
    return found


def unmatched_units(policy: Policy, names: Sequence[str]) -> list[str]:
    """Patterns of the ``unit_dims`` of a composition that no name matches, in order."""
    patterns = {
        pattern: None
        for stage in stages(policy, ())
        for pattern, _ in getattr(stage.policy, "unit_dims_by_name", ())
    }
    return [each for each in patterns if not any(matches(name, each) for name in names)]


def nearest(pattern: str, names: Sequence[str]) -> str | None:
    """The name that a pattern with a typing error may have meant; None if none is near."""
    core = pattern.strip("*?.")
    parts: dict[str, str] = {}
    for name in names:
        pieces = name.split(".")
        for part in (name, *pieces, ".".join(pieces[-2:])):
            parts.setdefault(part, name)
    close = difflib.get_close_matches(core, parts, n=1)
    return parts[close[0]] if close else None


def summary(policy: Policy | None) -> str:
    """A policy as it is written, without what is left at its default: ``agc(0.01)``."""
    if policy is None:
        return "None"
    if isinstance(policy, Chain):
        return f"chain({', '.join(map(summary, policy.policies))})"
    if isinstance(policy, ByName):
        parts = [f"{pattern!r}: {summary(part)}" for pattern, part in policy.mapping]
        return f"by_name({{{', '.join(parts)}}}, default={summary(policy.default)})"
    shown = []
    fields: dict[str, dataclasses.Field[Any]] = getattr(policy, "__dataclass_fields__", {})
    for number, each in enumerate(f for f in fields.values() if f.name in vars(policy)):
        value = getattr(policy, each.name)
        if number == 0 and isinstance(value, (int, float)):
            shown.append(f"{value:g}")
        elif value != each.default:
            shown.append(f"{each.name}={value!r}")
    return f"{policy.name}({', '.join(shown)})"


def reads_loss(policy: Policy) -> bool:
    """Whether any policy of a composition reads the loss."""
    return any(stage.policy.needs.loss for stage in stages(policy, ()))


def _stages(
    policy: Policy, parameters: Sequence[ParameterInfo], members: tuple[int, ...], path: str
) -> Iterator[Stage]:
    if isinstance(policy, Chain):
        for position, part in enumerate(policy.policies):
            yield from _stages(part, parameters, members, _join(path, str(position)))
    elif isinstance(policy, ByName):
        shares: dict[str | None, list[int]] = {pattern: [] for pattern, _ in policy.mapping}
        shares[None] = []
        for member in members:
            shares[policy.pattern_of(parameters[member].name)].append(member)
        for pattern, choice in (*policy.mapping, (None, policy.default)):
            if choice is not None:
                label = "default" if pattern is None else f"[{pattern}]"
                yield from _stages(choice, parameters, tuple(shares[pattern]), _join(path, label))
    else:
        yield Stage(path, policy, members)


def _join(path: str, part: str) -> str:
    return f"{path}/{part}" if path else part


chain = Chain
by_name = ByName
