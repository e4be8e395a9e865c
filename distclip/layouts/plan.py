"""The plan: which logical parameters there are, and which of their pieces this rank counts.

A plan is made from parameters, never from the gradients that happen to be present, so every rank
issues the same collectives at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import ProcessGroupError, RankMismatchError, UnsupportedGradientError
from distclip.kernels.look import Places
from distclip.layouts.differences import quoted_names, ranked, sides
from distclip.layouts.fetching import Fetching
from distclip.layouts.piece import Described, Entry, Hold, Piece

DOUBLE = ("float64", "complex128")
"""Names of the dtypes whose norms are float64."""


@dataclass(frozen=True)
class Plan:
    """Everything about the parameters that does not change from step to step.

    Attributes:
        entries: the table of logical parameters, the same on every rank of ``group``.
        pieces: the local pieces, in table order.
        group: the one group that statistics are summed over; None where nothing is sharded.
        device: where the statistics live.
    """

    entries: tuple[Entry, ...]
    pieces: tuple[Piece, ...]
    group: ProcessGroup | None
    device: torch.device

    @cached_property
    def one_to_one(self) -> bool:
        """Whether every parameter is exactly one local piece."""
        return len(self.pieces) == len(self.entries) and all(
            piece.index == row for row, piece in enumerate(self.pieces)
        )

    @cached_property
    def dtypes(self) -> frozenset[str]:
        """Names of the parameters' dtypes."""
        return frozenset(entry.dtype for entry in self.entries)

    @cached_property
    def norm_dtype(self) -> torch.dtype:
        """float32, or float64 where a parameter is float64 or complex128."""
        return torch.float32 if self.dtypes.isdisjoint(DOUBLE) else torch.float64

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in table order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def all_spread(self) -> bool:
        """Whether all pieces here are of DTensors: then a backward gives all ranks gradients."""
        return bool(self.pieces) and all(piece.spread is not None for piece in self.pieces)

    def release(self) -> None:
        """Drop the parameters: reports can still be read, but nothing can be measured."""
        for piece in self.pieces:
            if isinstance(piece.hold, Hold):
                piece.hold.release()

    @cached_property
    def fetching(self) -> Fetching:
        """Fetches the gradients of all pieces at once, in the usual case."""
        return Fetching(self.pieces)

    @cached_property
    def weights_at(self) -> npt.NDArray[np.int64]:
        """Where each piece's weights lay when gradient and weights were compared last; else -1."""
        return np.full(len(self.pieces), -1, np.int64)

    @cached_property
    def apart_from_weights(self) -> list[Places]:
        """Where gradients lay that were not where ``weights_at`` says; none or one."""
        return []

    @cached_property
    def rows(self) -> Tensor | None:
        """Table row of each piece, int64 ``(pieces,)``; None where the two are one to one."""
        if self.one_to_one:
            return None
        return torch.tensor(
            [piece.index for piece in self.pieces], dtype=torch.long, device=self.device
        )

    @cached_property
    def replicated(self) -> bool:
        """Whether a mesh holds replicas of anything."""
        return any(entry.replicated for entry in self.entries)

    @cached_property
    def shares(self) -> Tensor | None:
        """Share of each piece, float64 ``(pieces,)``; None where all of them count fully."""
        if all(piece.share == 1.0 for piece in self.pieces):
            return None
        return torch.tensor(
            [piece.share for piece in self.pieces], dtype=torch.float64, device=self.device
        )

    @cached_property
    def _flags(self) -> tuple[Tensor, Tensor]:
        both = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.device)
        return both[:1], both[1:]

    def flag(self, raised: bool) -> Tensor:
        """float64 ``(1,)``, 0 or 1; shared by all steps, so never changed in place."""
        return self._flags[raised]


def local_plan(
    described: Sequence[Described], device: torch.device, group: ProcessGroup | None = None
) -> Plan:
    """The plan where all ranks have the same table as this one."""
    return Plan(
        tuple(entry for entry, _ in described),
        tuple(
            piece.numbered(row, 1.0)
            for row, (_, pieces) in enumerate(described)
            for piece in pieces
        ),
        group,
        device,
    )


def in_order_of(table: Sequence[Entry], described: Sequence[Described]) -> list[Described]:
    """Parameters of this rank, which are those of ``table``, in the order that they have there.

    A sum of floats depends on its order: so the norms of all ranks are bitwise the same, whatever
    order each was given its parameters in.
    """
    by_name = {each[0].name: each for each in described}
    return [by_name[entry.name] for entry in table]


class DistinctTables:
    """The different tables there are, and which ranks have each.

    Ranks that have the same table share one object: with thousands of ranks nothing may be done
    for each parameter of each rank, or construction takes hours.

    Attributes:
        views: each table, with the global ranks that have it; in the order of their first ranks.
    """

    def __init__(self, tables: Sequence[Sequence[Entry]], ranks: Sequence[int]) -> None:
        found: dict[int, tuple[Sequence[Entry], list[int]]] = {}
        for rank, table in zip(ranks, tables, strict=True):
            found.setdefault(id(table), (table, []))[1].append(rank)
        self.views = list(found.values())
        self._view_of = {
            rank: view for view, (_, members) in enumerate(self.views) for rank in members
        }
        self._within: dict[int, tuple[int, ...]] = {}

    def within(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """The views of these ranks. ``members`` is an attribute of an entry, so it lives on."""
        known = self._within.get(id(members))
        if known is None:
            views = dict.fromkeys(self._view_of[r] for r in members if r in self._view_of)
            known = self._within[id(members)] = tuple(views)
        return known

    def by_rank(
        self, by_view: Mapping[int, str], members: Sequence[int] | None = None
    ) -> dict[int, str]:
        """Rank -> text, from one text for each view; all ranks, or those among ``members``."""
        if members is None:
            return {rank: said for view, said in by_view.items() for rank in self.views[view][1]}
        here = [rank for rank in members if self._view_of.get(rank) in by_view]
        return {rank: by_view[self._view_of[rank]] for rank in here}

    def holders(self) -> dict[str, dict[int, Entry]]:
        """Name -> the entry of each view that has it."""
        holders: dict[str, dict[int, Entry]] = {}
        for view, (table, _) in enumerate(self.views):
            for entry in table:
                holders.setdefault(entry.name, {})[view] = entry
        return holders


def merged_plan(
    described: Sequence[Described],
    tables: Sequence[Sequence[Entry]],
    rank: int,
    ranks: Sequence[int],
    device: torch.device,
    group: ProcessGroup,
) -> Plan:
    """The plan of rank ``rank`` of ``group``, given the table of every rank.

    Parameters of the same name and shape are the same tensor: of identical replicas (plain tensors
    on several ranks, DTensors on several sub-meshes) those of the lowest rank count. A name that
    only some ranks have is a parameter of theirs (pipeline stages, experts).
    """
    order: dict[str, int] = {}
    owners: dict[str, tuple[int, ...]] = {}
    merged: dict[str, Entry] = {}
    for table, members in DistinctTables(tables, ranks).views:
        for entry in table:
            known = merged.get(entry.name)
            if known is None:
                order[entry.name] = len(order)
                merged[entry.name] = entry
                owners[entry.name] = entry.ranks if entry.ranks is not None else (members[0],)
            elif known.split_dims != entry.split_dims:
                # Replicas on other sub-meshes may be cut along other dims.
                split = tuple(sorted({*known.split_dims, *entry.split_dims}))
                merged[entry.name] = replace(known, split_dims=split)
    me = (ranks[rank],)
    counted: dict[tuple[int, int], bool] = {}
    pieces = []
    for entry, local in described:
        mine, owner = me if entry.ranks is None else entry.ranks, owners[entry.name]
        pair = id(mine), id(owner)
        if pair not in counted:
            counted[pair] = mine is owner or set(mine) == set(owner)
        share = 1.0 if counted[pair] else 0.0
        pieces += [piece.numbered(order[entry.name], share) for piece in local]
    pieces.sort(key=lambda piece: piece.index)
    return Plan(tuple(merged.values()), tuple(pieces), group, device)


def needs_reduction(tables: Sequence[Sequence[Entry]]) -> bool:
    """Whether any tensor is spread over ranks, or any parameter is not on every rank."""
    different = {id(table): table for table in tables}.values()
    if any(entry.ranks is not None or entry.others for table in different for entry in table):
        return True
    return differ(tables)


def differ(tables: Sequence[Sequence[Entry]]) -> bool:
    """Whether any parameter is not on every rank (pipeline stages, experts)."""
    different = {id(table): table for table in tables}.values()
    names = [{entry.name for entry in table} for table in different]
    return any(other != names[0] for other in names)


def check_tables(tables: Sequence[Sequence[Entry]], ranks: Sequence[int], *, stages: bool) -> None:
    """Refuse tables that cannot belong to one model.

    Args:
        tables: the table of each rank; ranks that have the same share one object.
        ranks: global rank of each.
        stages: whether ranks may hold different parameters (a list of modules was given).

    Raises:
        RankMismatchError: names the ranks, the parameter and the difference.
        ProcessGroupError: a parameter that is spread over ranks outside of the group.
        UnsupportedGradientError: a copy of a parameter that no rank calls so.
    """
    said = DistinctTables(tables, ranks)
    holders = said.holders()
    _check_group(holders, set(ranks))
    for name, by_view in holders.items():
        first = next(iter(by_view.values()))
        if all(entry.copy for entry in by_view.values()):
            who = ranked(list(said.by_rank(dict.fromkeys(by_view, ""))))
            raise UnsupportedGradientError(
                f"parameter {name!r} on {who} is marked shared=True (Megatron: a copy of another "
                f"stage's embedding), but no rank has it under this name unmarked: it would be "
                f"counted once more. Give modules in which both stages call it alike; "
                f"distclip.clip_grad_norm_(..., pipeline_group=...) leaves it out of the norm"
            )
        if all(entry is first or entry == first for entry in by_view.values()):
            continue
        _refuse_apart(
            name,
            said,
            {view: f"{entry.dtype} {list(entry.shape)}" for view, entry in by_view.items()},
            "the ranks were given different models; give every rank the same parameters",
        )
        kinds = {(e.ranks is None, not e.others) for e in by_view.values()}
        if len(kinds) > 1:
            shown = {view: entry.layout for view, entry in by_view.items()}
            _refuse_apart(name, said, shown, "shard it alike on every rank")
        # The members of one mesh hold parts of one tensor; other meshes may cut it otherwise.
        meshes = dict.fromkeys(e.ranks for e in by_view.values() if e.ranks is not None)
        for members in meshes:
            layouts = {
                view: f"{by_view[view].layout} over {ranked(by_view[view].ranks or ())}"
                for view in said.within(members)
                if view in by_view
            }
            mend = "the ranks of one device mesh must shard it alike"
            _refuse_apart(name, said, layouts, mend, members)
    if not stages:
        _refuse_missing(said, holders, ranks)


def _check_group(holders: Mapping[str, Mapping[int, Entry]], members: set[int]) -> None:
    inside: set[int] = set()
    for name, by_view in holders.items():
        for entry in by_view.values():
            for spread in (entry.ranks, entry.others):
                if spread is None or id(spread) in inside:
                    continue
                if not members.issuperset(spread):
                    everywhere = sorted({*(entry.ranks or ()), *entry.others})
                    raise ProcessGroupError(
                        f"parameter {name!r} is spread over {ranked(everywhere)}, but the "
                        f"process group has only {ranked(sorted(members))}: give the group of all "
                        f"ranks that hold the model, or none for all ranks"
                    )
                inside.add(id(spread))


def _refuse_apart(
    name: str,
    said: DistinctTables,
    by_view: Mapping[int, str],
    mend: str,
    members: Sequence[int] | None = None,
) -> None:
    if len(set(by_view.values())) > 1:
        by_rank = said.by_rank(by_view, members)
        found = sides(list(by_rank), list(by_rank.values()))
        shown = " but ".join(f"{value} on {ranked(those)}" for value, those in found)
        raise RankMismatchError(f"parameter {name!r} is {shown}: {mend}")


def _refuse_missing(
    said: DistinctTables, holders: Mapping[str, Mapping[int, Entry]], ranks: Sequence[int]
) -> None:
    """Refuse a name that a rank lacks, unless it is outside of the mesh that the tensor is on."""
    usual = len(ranks) / 2
    extra: dict[int, list[str]] = {}
    missing: dict[int, list[str]] = {}
    for name, by_view in holders.items():
        if len(by_view) == len(said.views):
            continue
        having = {rank for view in by_view for rank in said.views[view][1]}
        if any(entry.others for entry in by_view.values()):  # every rank has its own
            continue
        everywhere = any(entry.ranks is None for entry in by_view.values())
        meshes = {id(e.ranks): e.ranks for e in by_view.values() if e.ranks is not None}
        wanted = set(ranks) if everywhere else set[int]().union(*meshes.values())
        lacking = [rank for rank in ranks if rank in wanted and rank not in having]
        few = lacking and (len(having) < usual or (len(having) == usual and ranks[0] in lacking))
        for rank in sorted(having) if few else lacking:
            (extra if few else missing).setdefault(rank, []).append(name)
    if not extra and not missing:
        return
    stories = [f"{ranked(who)} lacks {quoted_names(names)}" for names, who in _together(missing)]
    stories += [f"only {ranked(who)} has {quoted_names(names)}" for names, who in _together(extra)]
    raise RankMismatchError(
        f"the ranks were given different parameters: {'; '.join(stories)}. Give every rank the "
        f"same; for pipeline stages give a list of modules, GradClipper([stage], ...)"
    )


def _together(by_rank: Mapping[int, Sequence[str]]) -> list[tuple[tuple[str, ...], list[int]]]:
    return sides(list(by_rank), [tuple(names) for names in by_rank.values()])


def copied(tables: Sequence[Sequence[Entry]], ranks: Sequence[int]) -> frozenset[str]:
    """Names of the tensors of which there is more than one copy."""
    found: set[str] = set()
    owners: dict[str, tuple[int, ...]] = {}
    for table, members in DistinctTables(tables, ranks).views:
        first = (members[0],)
        for entry in table:
            mine = first if entry.ranks is None else entry.ranks
            owner = owners.setdefault(entry.name, mine)
            several = entry.copies or (entry.ranks is None and len(members) > 1)
            if several or (owner is not mine and owner != mine):
                found.add(entry.name)
    return frozenset(found)
