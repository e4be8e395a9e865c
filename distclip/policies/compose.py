"""Policies made of policies: one after another, or side by side (``by_name``, ``by_part``)."""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies.parts import part
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Policy,
    ScalingPolicy,
    State,
    Statistics,
    matches,
)
from distclip.policies.sound import check_sound, check_units


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
            check_sound("chain: each argument", policy)
        object.__setattr__(self, "policies", policies)


@dataclass(frozen=True)
class SideBySide(Composite):
    """Different policies for different parameters: the base of ``by_name`` and ``by_part``."""

    mapping: tuple[tuple[str, Policy | None], ...]
    default: Policy | None
    example: ClassVar[str] = "*.bias"
    labels: ClassVar[Mapping[str, str]] = {}
    """Key -> what a report and a checkpoint call it, where that is not the key itself."""

    def __init__(self, mapping: Mapping[str, Policy | None], default: Policy | None = None) -> None:
        odd: list[object] = [mapping]
        if isinstance(mapping, Mapping):
            odd = [key for key in mapping if not isinstance(key, str)]
        if odd:
            raise ConfigurationError(
                f"{self.name}: expected a mapping of texts to policies, such as "
                f"{{{self.example!r}: None}}, got {type(odd[0]).__name__}"
            )
        for key, policy in mapping.items():
            if policy is not None:
                check_sound(f"{self.name}[{key!r}]", policy)
        if default is not None:
            check_sound(f"{self.name} default", default)
        object.__setattr__(self, "mapping", tuple(mapping.items()))
        object.__setattr__(self, "default", default)

    @abc.abstractmethod
    def holds(self, key: str, parameter: ParameterInfo) -> bool:
        """Whether a key of the mapping is for this parameter."""

    def key_of(self, parameter: ParameterInfo) -> str | None:
        """The first key that is for this parameter, or None (the default's turn)."""
        return next((key for key, _ in self.mapping if self.holds(key, parameter)), None)

    def label(self, key: str | None) -> str:
        """What a key, or None for the default, is called in reports."""
        return "default" if key is None else self.labels.get(key, key)

    @property
    def choices(self) -> tuple[tuple[str | None, Policy | None], ...]:
        """Keys and their policies in order, the default last under None."""
        return (*self.mapping, (None, self.default))

    def shares(
        self, parameters: Sequence[ParameterInfo], members: Sequence[int]
    ) -> dict[str | None, tuple[int, ...]]:
        """The members of each choice."""
        found: dict[str | None, list[int]] = {key: [] for key, _ in self.choices}
        for member in members:
            found[self.key_of(parameters[member])].append(member)
        return {key: tuple(share) for key, share in found.items()}


class ByName(SideBySide):
    """Different policies for different parameters, by their names.

    Args:
        mapping: name pattern (``fnmatch``: ``*``, ``?``, ``[...]``, case-sensitive) -> policy, or
            None to leave the parameters that match alone. The first match wins.
        default: for parameters that no pattern matches; None leaves them alone.

    A norm policy in here takes the norm over the parameters that it is responsible for. Every
    parameter, also one left alone, is measured for the report.
    """

    name: ClassVar[str] = "by_name"

    def holds(self, key: str, parameter: ParameterInfo) -> bool:
        return matches(parameter.name, key)


class ByPart(SideBySide):
    """Different policies for parts of the model, by kind, optimizer, parameter group or name.

    ::

        by_part({"optimizer=Muon": None, "kind=embedding": value(0.1)}, default=global_norm(1.0))
        by_part({"group.clip=False": None, "group.clip_policy=agc": agc()}, global_norm(1.0))

    Args:
        mapping: part of the model (:func:`distclip.policies.parts.part` says how to write one) ->
            policy, or None to leave the part alone. The first match wins.
        default: for parameters of no part; None leaves them alone.

    A norm policy in here takes the norm over its part. Every parameter, also one left alone, is
    measured for the report: ``report.total_norm`` is the norm of the whole model, and
    ``report.part_norms`` those of the parts.

    Parts by optimizer or parameter group need the optimizers: ``GradClipper(..., optimizer=[...])``
    or ``attach``. Groups are read there and then; what is changed in them later has no effect.

    Raises:
        ConfigurationError: a part that cannot be read; at the first clip, optimizers that are
            needed and not known.
    """

    name: ClassVar[str] = "by_part"
    example: ClassVar[str] = "kind=bias"

    def __init__(self, mapping: Mapping[str, Policy | None], default: Policy | None = None) -> None:
        for key in mapping if isinstance(mapping, Mapping) else ():
            part(key)
        super().__init__(mapping, default)

    def holds(self, key: str, parameter: ParameterInfo) -> bool:
        return part(key).holds(parameter)

    @property
    def needs_optimizers(self) -> bool:
        """Whether a part depends on which optimizer steps a parameter."""
        return any(part(key).reads_optimizer for key, _ in self.mapping)


@dataclass(frozen=True)
class _Undecided(ScalingPolicy):
    """What parts by optimizer are until an optimizer is known: an error at the first clip."""

    policy: ByPart
    name: ClassVar[str] = "undecided"

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        raise ConfigurationError(
            f"{self.policy.name} tells parameters apart by the optimizers that step them, and none "
            f"is known; use clipper.attach(muon, adamw), or give GradClipper(..., optimizer=[muon, "
            f"adamw]) the optimizers of this model"
        )


@dataclass(frozen=True)
class Stage:
    """One plain policy of a composition, and the parameters that it is responsible for.

    ``path`` names it within the composition (``""``, ``"1"``, ``"*.bias/0"``) and keys its state;
    ``members`` are indices into the table of parameters.
    """

    path: str
    policy: Policy
    members: tuple[int, ...]

    @cached_property
    def needs(self) -> Needs:
        """What the policy needs; asked once."""
        return self.policy.needs


def stages(policy: Policy, parameters: Sequence[ParameterInfo]) -> tuple[Stage, ...]:
    """Take a composition apart into plain policies in the order in which they act.

    Exact, because the parts of a ``by_name`` are responsible for disjoint sets of parameters.
    """
    return tuple(_stages(policy, parameters, tuple(range(len(parameters))), ""))


def unmatched(policy: Policy, parameters: Sequence[ParameterInfo], kind: str) -> list[str]:
    """Keys of every ``by_name``, or ``by_part``, of a composition that are for no parameter."""
    found = []
    base = ByName if kind == "by_name" else ByPart
    for each in composites(policy):
        if isinstance(each, base) and not _is_undecided(each, parameters):
            found += [
                key
                for key, _ in each.mapping
                if not any(each.holds(key, parameter) for parameter in parameters)
            ]
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
        for piece in (name, *pieces, ".".join(pieces[-2:])):
            parts.setdefault(piece, name)
    close = difflib.get_close_matches(core, parts, n=1)
    return parts[close[0]] if close else None


def summary(policy: Policy | None) -> str:
    """A policy as it is written, without what is left at its default: ``agc(0.01)``."""
    if policy is None:
        return "None"
    if isinstance(policy, Chain):
        return f"chain({', '.join(map(summary, policy.policies))})"
    if isinstance(policy, SideBySide):
        parts = [f"{policy.label(key)!r}: {summary(choice)}" for key, choice in policy.mapping]
        return f"{policy.name}({{{', '.join(parts)}}}, default={summary(policy.default)})"
    shown = []
    fields: dict[str, dataclasses.Field[Any]] = getattr(policy, "__dataclass_fields__", {})
    for number, each in enumerate(f for f in fields.values() if f.name in vars(policy)):
        value = getattr(policy, each.name)
        if number == 0 and isinstance(value, (int, float)):
            shown.append(f"{value:g}")
        elif value != each.default:
            shown.append(f"{each.name}={value!r}")
    return f"{policy.name}({', '.join(shown)})"


def composites(policy: Policy | None) -> Iterator[Composite]:
    """A composition and those that it is made of, in order."""
    if isinstance(policy, Chain):
        yield policy
        for each in policy.policies:
            yield from composites(each)
    elif isinstance(policy, SideBySide):
        yield policy
        for _, choice in policy.choices:
            yield from composites(choice)


@dataclass(frozen=True, slots=True)
class Reads:
    """What a composition wants to know of parameters, beside name and shape.

    ``groups``: the index of the parameter group. ``optimizers``: the optimizer's class, and
    ``options``: these keys of the group. ``modules``: the class of the module.
    """

    groups: bool
    optimizers: bool
    options: frozenset[str]
    modules: bool

    @property
    def nothing(self) -> bool:
        """Whether it is content with name and shape."""
        return not (self.groups or self.optimizers or self.modules)


def reads(policy: Policy) -> Reads:
    """What a composition wants to know of parameters."""
    parts = [part(key) for each in composites(policy) if isinstance(each, ByPart)
             for key, _ in each.mapping]  # fmt: skip
    return Reads(
        groups=any(stage.policy.needs.groups for stage in stages(policy, ())),
        optimizers=any(each.reads_optimizer for each in parts),
        options=frozenset().union(*(each.options for each in parts)),
        modules=any(each.reads_modules for each in parts),
    )


def parts_of(policy: Policy, parameters: Sequence[ParameterInfo]) -> dict[str, tuple[int, ...]]:
    """The parts that a composition tells apart first: key, or ``"default"`` -> its parameters."""
    for each in composites(policy):
        if isinstance(each, SideBySide) and not _is_undecided(each, parameters):
            shares = each.shares(parameters, range(len(parameters)))
            return {each.label(key): share for key, share in shares.items()}
    return {}


def reads_loss(policy: Policy) -> bool:
    """Whether any policy of a composition reads the loss."""
    return any(stage.policy.needs.loss for stage in stages(policy, ()))


def _is_undecided(policy: SideBySide, parameters: Sequence[ParameterInfo]) -> bool:
    """Whether it tells parameters apart by their optimizers, and none is known."""
    needs = isinstance(policy, ByPart) and policy.needs_optimizers
    return needs and not any(each.optimizer for each in parameters)


def _stages(
    policy: Policy, parameters: Sequence[ParameterInfo], members: tuple[int, ...], path: str
) -> Iterator[Stage]:
    if isinstance(policy, Chain):
        for position, each in enumerate(policy.policies):
            yield from _stages(each, parameters, members, _join(path, str(position)))
    elif isinstance(policy, SideBySide):
        if isinstance(policy, ByPart) and members and _is_undecided(policy, parameters):
            yield Stage(_join(path, "undecided"), _Undecided(policy), members)
            members = ()
        shares = policy.shares(parameters, members)
        for key, choice in policy.choices:
            if choice is not None:
                label = policy.label(key) if key is None else f"[{policy.label(key)}]"
                yield from _stages(choice, parameters, shares[key], _join(path, label))
    else:
        check_units(policy, (parameters[member] for member in members))
        yield Stage(path, policy, members)


def _join(path: str, part: str) -> str:
    return f"{path}/{part}" if path else part


chain = Chain
by_name = ByName
by_part = ByPart
