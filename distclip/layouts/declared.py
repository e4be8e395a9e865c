"""Plain tensors that are not replicas: experts and tensor parallelism without ``DTensor``.

A plain tensor does not say what other ranks hold under its name. :func:`declare_sharded` does, and
so do the marks that DeepSpeed MoE and Megatron put on their parameters:

=============================  ===================================================================
``allreduce = False``,         DeepSpeed MoE: another expert on every rank of that expert-parallel
``group_name = "ep_size_2"``   group
``allreduce = False``          Megatron: the same, of its expert model parallel group
``tensor_model_parallel``,     Megatron: a slice along ``partition_dim`` of one tensor, over the
``partition_dim``              tensor parallel group (for experts, by ``allreduce = False`` or
                               ``expert_tp``, over the expert tensor parallel group)
``sequence_parallel``,         Megatron: replicated over the tensor parallel group, whatever
true or false                  ``tensor_model_parallel`` says (TransformerEngine's ``Linear`` sets
                               that on replicated weights too)
``tensor_model_parallel``      DeepSpeed AutoTP: a slice, but not along which dim: refused until it
                               is declared. So is ``model_parallel``, their older name for it
``shared``                     Megatron: the last stage's copy of the first stage's embedding, under
                               another name there: counts for nothing where all stages are summed
=============================  ===================================================================

One process has no others to share with, and looks at no marks. The frameworks are asked for their
groups where they are loaded; nothing is imported for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from distclip.errors import ConfigurationError, ProcessGroupError, UnsupportedGradientError
from distclip.layouts import plain
from distclip.layouts.piece import Box, Described, Entry, Layout, Slice, shared_ranks


@dataclass(frozen=True, slots=True)
class DeclaredSpread:
    """Over which ranks a plain parameter is spread, and how.

    Attributes:
        others: global ranks that hold other tensors under the same name; empty if there are none.
        slices: global ranks that hold the slices of this tensor, in their order; empty if whole.
        dim: along which it is sliced.
        copy: whether another rank has the same tensor under another name, and counts it.
    """

    others: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    dim: int = 0
    copy: bool = False


RANK_ATTRIBUTES = (
    "allreduce",
    "group_name",
    "tensor_model_parallel",
    "model_parallel",
    "partition_dim",
    "expert_tp",
    "sequence_parallel",
    "shared",
)
"""Attributes of parameters that are looked at."""

_declared: Any = WeakIdKeyDictionary()
"""Parameter -> DeclaredSpread. No attribute: those travel with pickles and are lost with copies."""


def declare_sharded(
    parameter: Tensor, process_group: ProcessGroup, *, dim: int | None = None
) -> None:
    """Say that a plain parameter is not the same tensor on all ranks of a group.

    Without ``dim`` every member of the group holds a *different, whole* tensor under this name, as
    expert-parallel ranks do. In a GradClipper's tables and reports, that of the group's rank ``r``
    is called ``name@r`` (patterns of ``by_name`` and ``unit_dims`` see both spellings). With
    ``dim`` the members hold consecutive *slices* of one tensor along that dim, in the order of
    their ranks in the group, as in Megatron's tensor parallelism; they need not be of one size.

    Ranks outside of the group with the same name are replicas (expert data parallelism): whoever
    has the same place in another such group holds the same tensor. Both declarations may be made
    of one parameter. Declare on every rank, after the model has been wrapped and copied, and before
    a GradClipper is built. A second declaration of the same kind replaces the first.

    Args:
        parameter: a plain tensor (a ``DTensor`` says itself how it is sharded).
        process_group: the ranks that hold different tensors, or the slices; this one among them.
        dim: along which the tensor is sliced; None: not sliced.

    Raises:
        ConfigurationError: a DTensor, or a dim that the parameter does not have.
        ProcessGroupError: not a group, or one without this rank.
    """
    if not isinstance(parameter, Tensor) or isinstance(parameter, DTensor):
        raise ConfigurationError(
            f"declare_sharded is for plain tensors, got {type(parameter).__name__}; a DTensor's "
            f"sharding is read off its placements, so declare nothing there"
        )
    if not isinstance(process_group, ProcessGroup):
        raise ProcessGroupError(
            f"declare_sharded: process_group must be a torch.distributed.ProcessGroup with this "
            f"rank in it, got {process_group!r}; for a device mesh pass mesh.get_group()"
        )
    ranks = tuple(dist.get_process_group_ranks(process_group))
    known: DeclaredSpread = _declared.get(parameter, DeclaredSpread())
    if dim is None:
        _declared[parameter] = DeclaredSpread(ranks, known.slices, known.dim)
    else:
        if isinstance(dim, bool) or not -parameter.dim() <= dim < parameter.dim():
            raise ConfigurationError(
                f"declare_sharded: dim={dim!r} does not fit a parameter of shape "
                f"{list(parameter.shape)}"
            )
        _declared[parameter] = DeclaredSpread(known.others, ranks, dim % parameter.dim())


def spread_of(name: str, parameter: Tensor) -> DeclaredSpread | None:
    """What was declared of a plain parameter, or its framework's marks say; None: a replica.

    Raises:
        UnsupportedGradientError: marks of a group that cannot be found.
    """
    declared: DeclaredSpread | None = _declared.get(parameter)
    marks = parameter.__dict__
    if declared is None and not (marks and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    expert = marks.get("allreduce") is False
    sliced = bool(marks.get("tensor_model_parallel") or marks.get("model_parallel"))
    # TransformerEngine's Linear marks every weight as a slice, replicated ones (parallel_mode=None)
    # too. Megatron puts `sequence_parallel`, true or false, on what is replicated over the tensor
    # parallel group, and only there: it says whether such gradients are summed over that group.
    sliced = sliced and "sequence_parallel" not in marks
    copy = marks.get("shared") is True and (
        "tensor_model_parallel" in marks or "megatron.core.parallel_state" in sys.modules
    )
    others: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    if expert and not (declared and declared.others):
        others = _others(name, marks.get("group_name"))
    if sliced and not (declared and declared.slices):
        slices = _slices(name, expert or bool(marks.get("expert_tp")), marks)
    if declared is None and not others and not slices and not copy:
        return None
    declared = declared or DeclaredSpread()
    return DeclaredSpread(
        declared.others or others,
        declared.slices or slices,
        declared.dim if declared.slices else max(0, int(marks.get("partition_dim", 0))),
        copy,
    )


def _others(name: str, group_name: str | None) -> tuple[int, ...]:
    if group_name is not None:
        groups = getattr(sys.modules.get("deepspeed.utils.groups"), "_EXPERT_PARALLEL_GROUP", {})
        found = groups.get(group_name)
        what = f"DeepSpeed's expert-parallel group {group_name!r}"
    else:
        found = _megatron("get_expert_model_parallel_group")
        what = "an expert-parallel group (Megatron)"
    return _ranks(name, found, f"allreduce=False, an expert of {what}", "")


def _slices(name: str, expert: bool, marks: Mapping[str, Any]) -> tuple[int, ...]:
    if marks.get("partition_dim", -1) < 0:
        raise UnsupportedGradientError(
            f"parameter {name!r} is marked as a slice of one tensor (tensor_model_parallel, as "
            f"DeepSpeed AutoTP does), but not along which dim: taken for a replica it would be "
            f"counted wrongly. Say so with distclip.declare_sharded(parameter, process_group, "
            f"dim=...), where the group has the ranks of the slices"
        )
    kind = "expert tensor" if expert else "tensor"
    function = f"get_{kind.replace(' ', '_')}_{'' if expert else 'model_'}parallel_group"
    found = _megatron(function)
    mark = f"tensor_model_parallel=True, a slice of Megatron's {kind} parallel group"
    return _ranks(name, found, mark, ", dim=parameter.partition_dim")


def _megatron(function: str) -> ProcessGroup | None:
    state = sys.modules.get("megatron.core.parallel_state")
    ask = getattr(state, function, None)
    return None if ask is None else ask(check_initialized=False)


def _ranks(name: str, group: object, mark: str, dim: str) -> tuple[int, ...]:
    if not isinstance(group, ProcessGroup):
        raise UnsupportedGradientError(
            f"parameter {name!r} is marked {mark}, but that group is not known in this process: "
            f"taken for a replica it would be counted wrongly. Say which ranks hold the others "
            f"with distclip.declare_sharded(parameter, process_group{dim}), or take the mark off"
        )
    return tuple(dist.get_process_group_ranks(group))


def describe(name: str, parameter: Tensor, spread: DeclaredSpread) -> Described:
    """Entry and piece of a plain parameter that is spread over ranks."""
    _, (piece,) = plain.describe(name, parameter)
    me = dist.get_rank()
    shape, offsets = list(parameter.shape), [0] * parameter.dim()
    split: tuple[int, ...] = ()
    if len(spread.slices) > 1:
        place = spread.slices.index(me)
        offsets[spread.dim] = place * shape[spread.dim]
        shape[spread.dim] *= len(spread.slices)
        split = (spread.dim,)
    others = spread.others if len(spread.others) > 1 else ()
    entry = Entry(
        f"{name}@{others.index(me)}" if others else name,
        tuple(shape),
        str(parameter.dtype).removeprefix("torch."),
        split,
        shared_ranks(spread.slices) if split else None,
        f"plain, sliced along dim {spread.dim}" if split else "plain",
        shared_ranks(others),
        copy=spread.copy,
        slice=Slice(parameter.shape[spread.dim], whole=False) if split else None,
    )
    box = Box(tuple(offsets), tuple(parameter.shape))
    return entry, (replace(piece, box=box),)


def holders(entry: Entry, members: set[int]) -> int:
    """How many of ``members`` hold the entry and its namesakes together; 0 for a replica."""
    spread = [ranks for ranks in (entry.others, entry.ranks) if ranks]
    return math.prod(len(members & set(ranks)) for ranks in spread) if spread else 0


def any_declared() -> bool:
    """Whether any parameter of this process has been declared."""
    return bool(_declared)


def fingerprint(parameter: Tensor) -> object:
    """Changes when a declaration or a mark does; cheap where there is neither."""
    attributes, in_use = parameter.__dict__, bool(_declared.data)
    if not in_use and not attributes:
        return None
    return _declared.get(parameter) if in_use else None, *map(attributes.get, RANK_ATTRIBUTES)


def all_places(entry: Entry) -> list[Entry]:
    """The entry as each of its group's ranks has it, for who has no table of the others."""
    if not entry.others:
        return [entry]
    name = entry.name.rpartition("@")[0]
    return [replace(entry, name=f"{name}@{place}") for place in range(len(entry.others))]


def _found(name: str, parameter: Tensor) -> list[Described] | None:
    spread = spread_of(name, parameter)
    return None if spread is None else [describe(name, parameter, spread)]


LAYOUT = Layout(_found, fingerprint=fingerprint)
