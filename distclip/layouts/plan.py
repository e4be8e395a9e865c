"""The plan: which logical parameters there are, and which of their pieces this rank counts.

A plan is made from parameters, never from the gradients that happen to be present, so every rank
issues the same collectives at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import ProcessGroupError, RankMismatchError, UnsupportedGradientError
from distclip.layouts import dtensor
from distclip.layouts.differences import listed, ranked, sides
from distclip.layouts.piece import Described, Entry, Holder, Piece


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
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in table order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def holds(self) -> tuple[Holder, ...] | None:
        """The parameter of every piece, where all of them are DTensors and uncut."""
        holds = tuple(piece.hold for piece in self.pieces if piece.hold is not None)
        return holds if holds and len(holds) == len(self.pieces) else None

    @cached_property
    def specs(self) -> list[object]:
        """The sharding of each of :attr:`holds`."""
        return dtensor.specs_of(self.holds or ())

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
    def no_units(self) -> Tensor:
        """float64 ``(0,)``: the statistics of units where there are none."""
        return torch.zeros(0, dtype=torch.float64, device=self.device)

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
    """The plan where this rank's table is everybody's table."""
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
    for member, table in zip(ranks, tables, strict=True):
        for entry in table:
            if entry.name not in order:
                order[entry.name] = len(order)
                merged[entry.name] = entry
                owners[entry.name] = entry.ranks if entry.ranks is not None else (member,)
            else:
                # Replicas on other sub-meshes may be cut along other dims.
                known = merged[entry.name]
                split = tuple(sorted({*known.split_dims, *entry.split_dims}))
                merged[entry.name] = replace(known, split_dims=split)
    me = ranks[rank]
    pieces = []
    for entry, local in described:
        mine = entry.ranks if entry.ranks is not None else (me,)
        share = 1.0 if set(mine) == set(owners[entry.name]) else 0.0
        pieces += [piece.numbered(order[entry.name], share) for piece in local]
    pieces.sort(key=lambda piece: piece.index)
    return Plan(tuple(merged.values()), tuple(pieces), group, device)


def needs_reduction(tables: Sequence[Sequence[Entry]]) -> bool:
    """Whether any tensor is spread over ranks, or any parameter is not on every rank."""
    if any(entry.ranks is not None or entry.others for table in tables for entry in table):
        return True
    return differ(tables)


def differ(tables: Sequence[Sequence[Entry]]) -> bool:
    """Whether any parameter is not on every rank (pipeline stages, experts)."""
    names = [{entry.name for entry in table} for table in tables]
    return any(other != names[0] for other in names)


def check_tables(tables: Sequence[Sequence[Entry]], ranks: Sequence[int], *, stages: bool) -> None:
    """Refuse tables that cannot belong to one model.

    Args:
        tables: the table of each rank.
        ranks: global rank of each.
        stages: whether ranks may hold different parameters (a list of modules was given).

    Raises:
        RankMismatchError: names the ranks, the parameter and the difference.
        ProcessGroupError: a parameter that is spread over ranks outside of the group.
        UnsupportedGradientError: a copy of a parameter that no rank calls so.
    """
    holders: dict[str, dict[int, Entry]] = {}
    for rank, table in zip(ranks, tables, strict=True):
        for entry in table:
            holders.setdefault(entry.name, {})[rank] = entry
    everybody = set(ranks)
    for name, by_rank in holders.items():
        first = next(iter(by_rank.values()))
        if all(entry.copy for entry in by_rank.values()):
            raise UnsupportedGradientError(
                f"parameter {name!r} on {ranked(list(by_rank))} is marked shared=True (Megatron: a "
                f"copy of another stage's embedding), but no rank has it under this name unmarked: "
                f"it would be counted once more. Give modules in which both stages call it alike; "
                f"distclip.clip_grad_norm_(..., process_group=...) leaves it out of the norm"
            )
        if all(entry == first for entry in by_rank.values()):
            _check_group(first, everybody)
            continue
        for entry in by_rank.values():
            _check_group(entry, everybody)
        _refuse_apart(
            name,
            {rank: f"{entry.dtype} {list(entry.shape)}" for rank, entry in by_rank.items()},
            "the ranks were given different models; give every rank the same parameters",
        )
        kinds = {r: (e.ranks is None, not e.others) for r, e in by_rank.items()}
        shown = {rank: entry.layout for rank, entry in by_rank.items()}
        if len(set(kinds.values())) > 1:
            _refuse_apart(name, shown, "shard it alike on every rank")
        # The members of one mesh hold parts of one tensor; other meshes may cut it otherwise.
        meshes = dict.fromkeys(e.ranks for e in by_rank.values() if e.ranks is not None)
        for members in meshes:
            mesh = {rank: by_rank[rank] for rank in members if rank in by_rank}
            _refuse_apart(
                name,
                {r: f"{e.layout} over {ranked(e.ranks or ())}" for r, e in mesh.items()},
                "the ranks of one device mesh must shard it alike",
            )
    if not stages:
        _refuse_missing(holders, ranks)


def _check_group(entry: Entry, members: set[int]) -> None:
    spread = {*(entry.ranks or ()), *entry.others}
    if not members.issuperset(spread):
        raise ProcessGroupError(
            f"parameter {entry.name!r} is spread over ranks {sorted(spread)}, but the "
            f"process group has only ranks {sorted(members)}: give the group of all ranks "
            f"that hold the model, or none for all ranks"
        )


def _refuse_apart(name: str, by_rank: Mapping[int, str], mend: str) -> None:
    found = sides(list(by_rank), list(by_rank.values()))
    if len(found) > 1:
        shown = " but ".join(f"{value} on {ranked(members)}" for value, members in found)
        raise RankMismatchError(f"parameter {name!r} is {shown}: {mend}")


def _refuse_missing(holders: Mapping[str, Mapping[int, Entry]], ranks: Sequence[int]) -> None:
    """Every rank has every name, but for ranks outside of the mesh that a tensor lives on."""
    usual = len(ranks) / 2
    extra: dict[int, list[str]] = {}
    missing: dict[int, list[str]] = {}
    for name, by_rank in holders.items():
        lacking = [
            rank
            for rank in ranks
            if rank not in by_rank
            and any(entry.ranks is None or rank in entry.ranks for entry in by_rank.values())
            and not any(entry.others for entry in by_rank.values())  # every rank has its own
        ]
        few = lacking and (len(by_rank) < usual or (len(by_rank) == usual and ranks[0] in lacking))
        for rank in by_rank if few else lacking:
            (extra if few else missing).setdefault(rank, []).append(name)
    if not extra and not missing:
        return
    stories = [f"{ranked(who)} lacks {listed(names)}" for names, who in _together(missing)]
    stories += [f"only {ranked(who)} has {listed(names)}" for names, who in _together(extra)]
    raise RankMismatchError(
        f"the ranks were given different parameters: {'; '.join(stories)}. Give every rank the "
        f"same; for pipeline stages give a list of modules, GradClipper([stage], ...)"
    )


def _together(by_rank: Mapping[int, Sequence[str]]) -> list[tuple[tuple[str, ...], list[int]]]:
    return sides(list(by_rank), [tuple(names) for names in by_rank.values()])


def copied(tables: Sequence[Sequence[Entry]], held: Sequence[int]) -> frozenset[str]:
    """Names of the tensors of which there is more than one copy.

    Args:
        tables: the table of each rank.
        held: of each rank a bit per entry of its table: it has a copy that the layout counts
            elsewhere.
    """
    found: set[str] = set()
    owners: dict[str, object] = {}
    for member, (table, bits) in enumerate(zip(tables, held, strict=True)):
        for row, entry in enumerate(table):
            mine = entry.ranks if entry.ranks is not None else member
            if bits >> row & 1 or owners.setdefault(entry.name, mine) != mine:
                found.add(entry.name)
    return frozenset(found)
