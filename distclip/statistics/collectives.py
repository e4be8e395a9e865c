"""The only file that issues collectives."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import ProcessGroupError
from distclip.statistics import waiting
from distclip.statistics.encoding import from_ordered_bits, to_ordered_bits

Object = TypeVar("Object")

FEW_RANKS = 8
"""Ranks up to which gloo gathers a short message in place of reducing it."""
SHORT = 1 << 18
"""The longest such message, in bytes, those of all ranks together."""


def default_group(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """The group to compare notes over: the one given, else all ranks; None if there is one rank.

    Raises:
        ProcessGroupError: a group that is closed or that this rank is not a member of.
    """
    if process_group is None:
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return dist.group.WORLD
    check_open(process_group)
    return process_group


def check_open(group: ProcessGroup, name: str = "process_group") -> None:
    """Raise a ProcessGroupError for a group that can no longer, or never could, be used here."""
    if group is cast(Any, dist.GroupMember.NON_GROUP_MEMBER):
        raise ProcessGroupError(
            f"{name}: this rank is not a member of the group; leave the call to its members, "
            "or give a group that contains every rank that makes it"
        )
    if not isinstance(group, ProcessGroup):
        raise ProcessGroupError(
            f"{name} must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            f"for a device mesh pass mesh.get_group()"
        )
    if not dist.is_initialized() or not is_registered(group):
        raise ProcessGroupError(
            "the process group has been destroyed since it was handed over; clip before "
            "destroy_process_group(), and give a group that is there, to a new GradClipper if one "
            "was built with the old"
        )


def is_registered(group: ProcessGroup) -> bool:
    """Whether the group has not been destroyed."""
    world: Any = dist.distributed_c10d._world
    return group in world.pg_map


def ranks_of(group: ProcessGroup) -> list[int]:
    """Global ranks of the members, in group order."""
    return dist.get_process_group_ranks(group)


def rank_in(group: ProcessGroup) -> int:
    """This process's rank within the group."""
    return dist.get_rank(group)


def global_rank() -> int:
    """The global rank of this process; 0 outside of a distributed run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first(group: ProcessGroup | None = None) -> bool:
    """Whether this is the first rank of the group; without one, of all ranks or of the launch."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group) == 0
    return os.environ.get("RANK", "0") == "0"


def device_for(group: ProcessGroup | None, preferred: torch.device) -> torch.device:
    """Where the statistics live: ``preferred`` unless the group's backend cannot carry it."""
    if group is None:
        return preferred
    backends = dist.get_backend_config(group)
    if f"{preferred.type}:" in backends:
        return preferred
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sends_anything(group: ProcessGroup) -> bool:
    """Whether the backend sends anything: torch's "fake" backend, for dry runs, does not."""
    return dist.get_backend(group) != "fake"


def is_mixed(group: ProcessGroup) -> bool:
    """Whether tensors of different devices go to different backends, which do not communicate."""
    pairs = dist.get_backend_config(group).split(",")
    return len({pair.partition(":")[2] for pair in pairs}) > 1


def all_reduce_sum(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum float64 ``values`` over the group, in place; bitwise the same on every rank."""
    with waiting.named(group):
        everyones = _everyones(values, group)
        if everyones is None:
            _all_reduce(values, dist.ReduceOp.SUM, group)
            return values
    # One after another: the order in which torch.sum adds depends on the processor.
    values.copy_(everyones[0])
    for other in everyones[1:]:
        values.add_(other)
    return values


def all_reduce_max(values: Tensor, group: ProcessGroup) -> Tensor:
    """Maximum of non-negative float64 ``values`` over the group; NaN wins over everything."""
    bits = to_ordered_bits(values)
    with waiting.named(group):
        everyones = _everyones(bits, group)
        if everyones is None:
            _all_reduce(bits, dist.ReduceOp.MAX, group)
        else:
            bits = torch.stack(everyones).amax(0)
    return from_ordered_bits(bits)


def _all_reduce(values: Tensor, op: Any, group: ProcessGroup) -> None:
    """In place. Without a limit by the shortest way, which has no handle."""
    if not waiting.has_limit():
        dist.all_reduce(values, op=op, group=group)
        return
    work = dist.all_reduce(values, op=op, group=group, async_op=True)
    waiting.finish(cast(dist.Work, work), group, on_host=values.device.type == "cpu")


def _everyones(values: Tensor, group: ProcessGroup) -> list[Tensor] | None:
    """Every rank's ``values``, in group order, for each to reduce by itself.

    None where an all-reduce is better: among many ranks, for long messages, without gloo. gloo's
    all-reduce goes round the ring twice and its all-gather once, and what counts there is how often
    a thread has to be woken: with 3 to 8 ranks on two cores it takes half the time. All members
    choose alike, whatever device the numbers of each lie on.
    """
    ranks = group.size()
    if ranks > FEW_RANKS or ranks * values.nbytes > SHORT:
        return None
    if f"{values.device.type}:gloo" not in dist.get_backend_config(group):
        return None
    everyones = [torch.empty_like(values) for _ in range(ranks)]
    work = group.allgather([everyones], [values])
    waiting.finish(work, group, on_host=True)
    return everyones


def gather(value: Object, group: ProcessGroup) -> list[Object]:
    """Every rank's picklable ``value``, in group order, on every rank. Not for the step."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with waiting.named(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gather_by_key(value: Object, keys: Sequence[Hashable], group: ProcessGroup) -> list[Object]:
    """As :func:`gather`, where ranks of equal keys have equal values: one of them sends it.

    What travels, and what is kept, grows with the number of different values, not of ranks.

    Args:
        value: this rank's; picklable.
        keys: of each rank, in group order; the same list on every rank.
        group: the ranks.

    Returns:
        Every rank's value, in group order; ranks of equal keys share one object.
    """
    here = rank_in(group)
    told: dict[Hashable, Object] = {}
    for speaker, key in enumerate(keys):
        if key not in told:
            box: list[Any] = [value if speaker == here else None]
            dist.broadcast_object_list(box, group=group, group_src=speaker)
            told[key] = box[0]
    return [told[key] for key in keys]


def _existing_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    """The oldest group of exactly these ranks, which is the same one on each of its members."""
    world: Any = dist.distributed_c10d._world
    for group, members in world.pg_group_ranks.items():
        if tuple(sorted(members)) == ranks and isinstance(group, ProcessGroup):
            return group
    return None


_mesh_groups: dict[tuple[int, ...], tuple[ProcessGroup | None, ProcessGroup]] = {}


def everyone() -> ProcessGroup:
    """The group of all ranks, for parameters that are spread over some of them.

    Raises:
        ProcessGroupError: there is none any more.
    """
    world = dist.group.WORLD
    if world is None:
        raise ProcessGroupError(
            "the parameters are DTensors but torch.distributed is not initialised any more; clip "
            "before destroy_process_group()"
        )
    return world


def group_of_ranks(ranks: tuple[int, ...]) -> ProcessGroup:
    """A group of exactly these global ranks: all ranks, a mesh's own, or one made and kept.

    Only the members take part in making it.
    """
    world = everyone()
    ranks = tuple(sorted(ranks))
    if ranks == tuple(range(dist.get_world_size())):
        return world
    known = _mesh_groups.get(ranks)
    if known is None or known[0] is not world or not is_registered(known[1]):
        made = _existing_group(ranks)
        if made is None:
            made = dist.new_group(list(ranks), use_local_synchronization=True)
        known = _mesh_groups[ranks] = (world, made)
    return known[1]


def average_later(buffer: Tensor, group: ProcessGroup) -> Any:
    """The future of ``buffer`` averaged over the ranks, in place.

    Multiplied by ``1 / ranks`` before it is reduced, as DDP does while it fills a bucket.
    """
    buffer.mul_(1.0 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    return cast(Any, work).get_future().then(lambda future: future.value()[0])
