"""What a policy may want to know of parameters: the optimizers that step them, their modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.errors import ConfigurationError, RankMismatchError
from distclip.layouts.names import without_wrappers
from distclip.layouts.piece import Entry
from distclip.policies import ParameterInfo, Policy
from distclip.policies.compose import Reads, reads
from distclip.statistics import collectives


class Fact(NamedTuple):
    """What is known of one parameter: fields of :class:`distclip.policies.ParameterInfo`."""

    group: int | None = None
    optimizer: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    module: tuple[str, ...] = ()


BY_PARAMETER = "use_muon"
"""An option that Moonlight's Muon, which has one group, keeps in the state of each parameter."""

Facts = Mapping[str, Fact]
"""Name of a parameter -> its :class:`Fact`."""


def learn(
    policy: Policy,
    named: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    modules: Sequence[nn.Module],
    group: ProcessGroup | None,
) -> Facts:
    """What a policy wants to know of all parameters.

    Args:
        policy: plain or composed.
        named: the tensors of this rank, as an optimizer steps them.
        optimizers: those that step them; their groups are numbered through.
        modules: that the tensors came from; none where the target listed parameters alone.
        group: the ranks, where they hold different parameters; all of them call this.

    Raises:
        RankMismatchError: as :func:`merged`.
    """
    wanted = reads(policy)
    if not optimizers and wanted.nothing:
        return {}
    known = facts_of(named, optimizers, modules, wanted)
    if group is None or wanted.nothing:
        return known
    return merged(collectives.gather(known, group), collectives.ranks_of(group))


def agreed(
    policy: Policy, parameters: Sequence[ParameterInfo], parts: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, int | None]]:
    """What ranks have to agree on: the group, and the number of the part, of each parameter."""
    wanted = reads(policy)
    return {
        "parameter groups": {p.name: p.group for p in parameters if wanted.groups},
        "parts by optimizer": {
            parameters[member].name: number
            for number, members in enumerate(parts.values())
            for member in members
            if wanted.optimizers
        },
    }


def facts_of(
    named: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    modules: Sequence[nn.Module],
    wanted: Reads,
) -> dict[str, Fact]:
    """What is known on this rank; arguments as for :func:`learn`."""
    for each in optimizers:
        if not hasattr(each, "param_groups"):
            kind = type(each).__name__
            raise ConfigurationError(f"optimizer: expected an optimizer, got a {kind}")
    stepped: dict[int, Fact] = {}
    listed = [(each, group) for each in optimizers for group in each.param_groups]
    for number, (optimizer, group) in enumerate(listed):
        fact = Fact(
            number,
            _classes(optimizer) if wanted.optimizers else (),
            tuple((key, str(group[key])) for key in sorted(wanted.options) if key in group),
        )
        for parameter in group["params"]:
            stepped[id(parameter)] = _by_parameter(fact, optimizer, parameter, wanted)
    owners, places = _owners(modules) if wanted.modules else ({}, {})
    found = {}
    for name, tensor in named.items():
        fact = stepped.get(id(tensor), Fact())
        place = places.get(name.rpartition(".")[0], ())
        found[name] = fact._replace(module=owners.get(id(tensor), place))
    return found


def infos(entries: Iterable[Entry], facts: Facts) -> tuple[ParameterInfo, ...]:
    """The parameters of a plan, with what is known of them."""
    return tuple(
        ParameterInfo(each.name, each.shape, *facts.get(each.name, Fact())) for each in entries
    )


def merged(by_rank: Sequence[Facts], ranks: Sequence[int]) -> dict[str, Fact]:
    """What is known of each parameter on any rank, where ranks hold different ones.

    Raises:
        RankMismatchError: a parameter that two ranks have in groups of different index, or under
            other optimizers or modules.
    """
    first: dict[str, tuple[int, Fact]] = {}
    for rank, here in zip(ranks, by_rank, strict=True):
        for name, fact in here.items():
            other, known = first.setdefault(name, (rank, fact))
            if known.group is None:  # no optimizer of that rank steps it
                first[name] = (rank, fact)
            elif fact.group is not None and fact != known:
                raise _difference(name, (other, known), (rank, fact))
    return {name: fact for name, (_, fact) in first.items()}


def _difference(name: str, one: tuple[int, Fact], two: tuple[int, Fact]) -> RankMismatchError:
    (rank, fact), (other, another) = one, two
    if fact.group != another.group:
        return RankMismatchError(
            f"parameter {name!r} is in optimizer parameter group {fact.group} on rank {rank} but "
            f"in group {another.group} on rank {other}: build the groups in the same order on "
            f"every rank (groups of the same index are one group)"
        )
    return RankMismatchError(
        f"parameter {name!r} has optimizer, keys of its parameter group and module {fact[1:]} on "
        f"rank {rank} but {another[1:]} on rank {other}, and the policy tells parameters apart by "
        f"these; make them the same on every rank"
    )


def _by_parameter(fact: Fact, optimizer: Optimizer, parameter: Tensor, wanted: Reads) -> Fact:
    """The fact of a group, with what the optimizer's state says of one parameter of it."""
    state = getattr(optimizer, "state", {}).get(parameter)
    if BY_PARAMETER not in wanted.options or not state or BY_PARAMETER not in state:
        return fact
    options = {**dict(fact.options), BY_PARAMETER: str(state[BY_PARAMETER])}
    return fact._replace(options=tuple(sorted(options.items())))


def _classes(thing: object) -> tuple[str, ...]:
    """Names of its class and the bases of that, as far as they say anything."""
    return tuple(
        each.__name__ for each in type(thing).__mro__ if each not in (object, nn.Module, Optimizer)
    )


def _owners(
    modules: Sequence[nn.Module],
) -> tuple[dict[int, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The classes of each module: by the ids of its own parameters, and by its clean path.

    Paths are for parameters that a sharding or a parametrisation has replaced. Several model parts
    may have one path, so the number of the part in front counts too.
    """
    owners: dict[int, tuple[str, ...]] = {}
    places: dict[str, tuple[str, ...]] = {}
    for number, module in enumerate(modules):
        for path, each in module.named_modules():
            place = without_wrappers(f"{path}.x" if path else "x").rpartition(".")[0]
            for known in (place, f"{number}.{place}" if place else str(number)):
                # Of a wrapper and the module in it, which have one path, the inner one counts.
                places[known] = _classes(each)
            if "parametrizations" not in path.split("."):
                for parameter in each.parameters(recurse=False):
                    owners.setdefault(id(parameter), _classes(each))
    return owners, places
