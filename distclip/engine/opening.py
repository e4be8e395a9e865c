"""Opening a session: every rank reads its parameters, and the ranks compare once what they have.

A GradClipper opens one for a whole run (:func:`open_together`), a function without memory one for a
call (:func:`open_call`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from distclip.engine import agreement, handshake
from distclip.engine.passes import check_needed_weights
from distclip.engine.replicas import ReplicaCheck
from distclip.errors import ProcessGroupError
from distclip.layouts import declared, slices
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import describe
from distclip.layouts.names import Named, Target
from distclip.layouts.piece import Described, Entry
from distclip.options import OPTION_NAMES, Options
from distclip.policies.compose import reads_loss
from distclip.statistics import collectives, waiting


@dataclass(frozen=True)
class Opened:
    """What all ranks agree on, and this rank's part of it.

    Attributes:
        options: checked.
        named: the tensors of this rank, by clean name.
        plan: the table of parameters, and where this rank's pieces of them lie.
        parts: whether ranks hold different parameters (stages, experts).
        limit: seconds that a clip waits for other ranks; inf for no limit.
        agreement: what is compared between the ranks from step to step; None for one process.
        replicas: the check of copies; None where there is none.
        lasting: whether it is for a run, and not for a call.
    """

    options: Options
    named: Named
    plan: plans.Plan
    parts: bool = False
    limit: float | None = None
    agreement: agreement.Agreement | None = None
    replicas: ReplicaCheck | None = None
    lasting: bool = True


def open_together(
    target: Target, given: Mapping[str, Any], process_group: ProcessGroup | None
) -> Opened:
    """Compare model, policy and options of all ranks, once, and open what they agree on.

    Args:
        target: as for :class:`distclip.GradClipper`.
        given: its options by name.
        process_group: the ranks; all by default.

    Raises:
        ConfigurationError: an option that cannot be meant.
        UnsupportedGradientError: a sharding that cannot be read.
        RankMismatchError: ranks that disagree, on every rank.
    """
    group = collectives.default_group(process_group)
    try:
        options = Options(**given)
        limit = options.stuck_after
        limit = waiting.limit_from_environment() if limit is None else float(limit)
        named, described = describe(naming.named_parameters(target))
        check_needed_weights(options.policy, described, all_of_them=options.ratios is not None)
    except Exception as error:
        if group is not None:  # the others are waiting to hear from this rank
            handshake.tell_trouble(error, group)
        raise
    device = named[0][1].device if named else torch.device("cpu")
    if group is None:
        return Opened(options, named, plans.local_plan(described, device), limit=limit)
    ranks = collectives.ranks_of(group)
    here = _notes(options, named, tuple(entry for entry, _ in described))
    notes = handshake.meet(here, group)
    common = handshake.common_device(each.device for each in notes)
    if device.type != common:
        device = torch.device(common)
    device = collectives.device_for(group, device)
    me = ranks[collectives.rank_in(group)]
    described, tables = slices.settle(described, [each.table for each in notes], ranks, me)
    plans.check_tables(tables, ranks, stages=naming.is_list_of_modules(target))
    plan = _plan(options, described, tables, ranks, device, group)
    on_host = device.type == "cpu" or options.on_nonfinite == "error"
    copies = None
    if options.verify_replicas != "never":
        copies = ReplicaCheck.of(plan, group, plans.copied(tables, ranks))
    return Opened(
        options,
        named,
        plan,
        plan.group is not None and plans.differ(tables),
        limit,
        agreement.Agreement(group, device, immediate=on_host),
        copies,
    )


def open_call(described: Sequence[Described], options: Options, device: torch.device) -> Opened:
    """For a call of a function without memory, which knows no names; compares nothing yet.

    Args:
        described: the parameters, as their layouts describe them.
        options: a policy without memory, and what else is asked for.
        device: where the statistics lie, if the ranks' backend allows.

    Raises:
        ProcessGroupError: this rank is in none of the meshes.
    """
    group = group_of([entry for entry, _ in described])
    where = collectives.device_for(group, device)
    if group is not None and group.size() > 1:
        described = _shared_out(described, group)
    else:
        group = None
    return Opened(options, [], plans.local_plan(described, where, group), lasting=False)


def _shared_out(described: Sequence[Described], group: ProcessGroup) -> list[Described]:
    """The pieces with the shares that they have in a sum over the group."""
    first, size = collectives.rank_in(group) == 0, group.size()
    members = set(collectives.ranks_of(group))
    shared: list[Described] = []
    for entry, pieces in described:
        if entry.ranks is not None or entry.others:
            # Each sub-mesh of the group holds a replica: their mean is what one of them has.
            share = min(1.0, declared.holders(entry, members) / size)
        else:
            share = 1.0 if first else 0.0
        for place in declared.all_places(entry):
            mine = pieces if place.name == entry.name else ()
            shared.append((place, [piece.numbered(0, share) for piece in mine]))
    return shared


def group_of(entries: Sequence[Entry]) -> ProcessGroup | None:
    """The group that a call sums over: the DTensors' common mesh, or else all ranks.

    None where nothing is spread over ranks.

    Raises:
        ProcessGroupError: this rank is in none of the meshes.
    """
    spread = {
        id(ranks): ranks for entry in entries for ranks in (entry.ranks, entry.others) if ranks
    }
    meshes = set(map(frozenset, spread.values()))
    if not meshes:
        return None
    union = frozenset[int]().union(*meshes)
    if union not in meshes:
        return collectives.everyone()
    collectives.everyone()
    if (rank := collectives.global_rank()) not in union:
        raise ProcessGroupError(
            f"rank {rank} is in no device mesh of these DTensors (ranks "
            f"{sorted(union)}) and cannot take part in their norm; call this on the mesh's "
            f"ranks only, or build a GradClipper on all ranks"
        )
    return collectives.group_of_ranks(tuple(union))


def _plan(
    options: Options,
    described: Sequence[Described],
    tables: Sequence[Sequence[Entry]],
    ranks: Sequence[int],
    device: torch.device,
    group: ProcessGroup,
) -> plans.Plan:
    """The plan of this rank; without a group where nothing has to be reduced."""
    if plans.needs_reduction(tables) or reads_loss(options.policy):
        rank = collectives.rank_in(group)
        return plans.merged_plan(described, tables, rank, ranks, device, group)
    return plans.local_plan(plans.in_order_of(tables[0], described), device)


def _notes(options: Options, named: Named, table: tuple[Entry, ...]) -> handshake.Notes:
    return handshake.Notes(
        versions=(("torch", torch.__version__),),
        options=tuple((name, repr(getattr(options, name))) for name in OPTION_NAMES),
        table=table,
        frozen=tuple(name for name, parameter in named if not parameter.requires_grad),
        device=named[0][1].device.type if named else "",
    )
