"""The plan: which logical parameters there are, and which of their pieces this rank counts.

A plan is made from parameters, never from the gradients that happen to be present, so every rank
issues the same collectives at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import ProcessGroupError, RankMismatchError
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
    """
    members = set(ranks)
    first: dict[str, tuple[int, Entry]] = {}
    for rank, table in zip(ranks, tables, strict=True):
        for entry in table:
            spread = {*(entry.ranks or ()), *entry.others}
            if not members.issuperset(spread):
                raise ProcessGroupError(
                    f"parameter {entry.name!r} is spread over ranks {sorted(spread)}, but the "
                    f"process group has only ranks {sorted(members)}: give the group of all ranks "
                    f"that hold the model, or none for all ranks"
                )
            other_rank, other = first.setdefault(entry.name, (rank, entry))
            if (other.shape, other.dtype) != (entry.shape, entry.dtype):
                raise RankMismatchError(
                    f"parameter {entry.name!r} is {other.dtype} {list(other.shape)} on rank "
                    f"{other_rank} but {entry.dtype} {list(entry.shape)} on rank {rank}: the "
                    f"ranks were given different models; give every rank the same parameters"
                )
            if (other.ranks is None, not other.others) != (entry.ranks is None, not entry.others):
                raise RankMismatchError(
                    f"parameter {entry.name!r} is {other.layout} on rank {other_rank} but "
                    f"{entry.layout} on rank {rank}: shard it alike on every rank"
                )
    if stages:
        return
    for rank, table in zip(ranks, tables, strict=True):
        mine = {entry.name for entry in table}
        for name, (other_rank, entry) in first.items():
            if entry.others:  # every rank of the group has its own
                continue
            if name not in mine and (entry.ranks is None or rank in entry.ranks):
                raise RankMismatchError(
                    f"parameter {name!r} exists on rank {other_rank} but not on rank {rank}: the "
                    f"ranks were given different parameters; for pipeline stages give a list of "
                    f"modules, GradClipper([stage], ...)"
                )
