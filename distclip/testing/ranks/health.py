"""Whether a pool can be used again: did every rank leave the process groups in the same state?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_GROUPS = 32  # each holds threads and sockets; beyond this a new pool is cheaper


class GroupState(NamedTuple):
    """The process groups of one rank after a call."""

    default_alive: bool
    created: int  # how many groups were ever numbered
    groups: dict[str, tuple[tuple[int, ...], int]]  # name -> (member ranks, collectives issued)


def group_state(default_group: Any) -> GroupState:
    """This rank's groups, given the default group that it began with."""
    from torch.distributed import distributed_c10d

    world = distributed_c10d._world
    if world.default_pg is not default_group:
        return GroupState(False, 0, {})
    groups = {
        str(world.pg_names[group]): (
            tuple(sorted(world.pg_group_ranks[group])),
            int(group._get_sequence_number_for_group()),  # type: ignore[attr-defined]
        )
        for group in world.pg_map
    }
    return GroupState(True, world.group_count, groups)


def reusable(states: Sequence[GroupState]) -> bool:
    """Whether nothing that one call left behind can disturb the next.

    Not so where a default group is gone; where ranks issued different numbers of collectives on
    a group (one was left half done); where a group is missing on some of its members; where a
    numbered group is gone from all of them (DTensor's caches may still hold a mesh made of it);
    or where too many groups have piled up. A `send` that nobody received is not seen.
    """
    if not all(state.default_alive for state in states):
        return False
    if len({state.created for state in states}) != 1:
        return False
    if max(len(state.groups) for state in states) > MOST_GROUPS:
        return False
    names = {name for state in states for name in state.groups}
    if any(str(number) not in names for number in range(states[0].created)):
        return False
    for name in names:
        present = {rank: s.groups[name] for rank, s in enumerate(states) if name in s.groups}
        members, _ = next(iter(present.values()))
        if tuple(present) != members or len(set(present.values())) != 1:
            return False
    return True
