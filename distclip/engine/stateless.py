"""Clipping without a clipper: parameters as a caller gives them, and programs kept for them.

The drop-ins know no names and keep no state. A program is compiled once for the same parameters,
and found again as long as neither they nor their sharding have changed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from distclip.engine import handshake
from distclip.engine.passes import check_weights, compile_passes, report_order
from distclip.engine.program import Program
from distclip.engine.walk import walk
from distclip.engine.walked import Walked
from distclip.errors import DistclipError, ProcessGroupError
from distclip.layouts import declared, dtensor, fsdp2, plain, sparse
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import LAYOUTS, describe, detect
from distclip.layouts.fetching import Fetched
from distclip.layouts.names import Named
from distclip.layouts.piece import Box, Described, Entry, Piece
from distclip.policies import AGC, ParameterInfo, Policy
from distclip.statistics import collectives

GO_ON = "; error_if_nonfinite=False raises nothing and returns the norm that is not finite"


class Given(NamedTuple):
    """Parameters that a caller gave, each once, and their names; None: their positions."""

    parameters: Sequence[Tensor]
    names: Sequence[str] | None = None

    @classmethod
    def of(cls, named: Named) -> Given:
        """Build from (name, parameter) pairs."""
        return cls([parameter for _, parameter in named], [name for name, _ in named])

    def named(self) -> Named:
        """The (name, parameter) pairs."""
        names = map(str, range(len(self.parameters))) if self.names is None else self.names
        return list(zip(names, self.parameters, strict=True))


def clip(
    given: Given, policy: Policy, on_nonfinite: str, *, norms: bool = True
) -> tuple[Walked, plans.Plan]:
    """One step without memory; with the plan that it went by."""
    program, fetched = programs.find(given, policy, norms=norms)
    if program.plan.group is not None:
        collectives.check_open(program.plan.group)
    with torch.no_grad():
        walked = walk(program, {}, on_nonfinite=on_nonfinite, fetched=fetched, go_on=GO_ON)
    return walked, program.plan


def compiled(
    described: Sequence[Described], policy: Policy, device: torch.device, *, norms: bool
) -> Program:
    """The program of a policy without memory, for parameters that are described.

    Args:
        described: what the layouts say of them.
        policy: without memory.
        device: where the statistics live, if the ranks' backend allows.
        norms: whether the norms of the report are measured, too.
    """
    plan = _plan(described, device)
    infos = [ParameterInfo(entry.name, entry.shape) for entry in plan.entries]
    passes = compile_passes(
        policy,
        infos,
        plan.entries,
        norms=norms,
        watch_nonfinite=False,
    )
    return Program.of(plan, infos, passes, report_order(policy, infos))


def _plan(described: Sequence[Described], device: torch.device) -> plans.Plan:
    group = group_of([entry for entry, _ in described])
    if group is None or dist.get_world_size(group) == 1:
        return plans.local_plan(described, collectives.device_for(group, device))
    first = collectives.rank_in(group) == 0
    size = dist.get_world_size(group)
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
    return plans.local_plan(shared, collectives.device_for(group, device), group)


def group_of(entries: Sequence[Entry]) -> ProcessGroup | None:
    """The group to sum over: the DTensors' common mesh, or else all ranks."""
    spread = {
        id(ranks): ranks for entry in entries for ranks in (entry.ranks, entry.others) if ranks
    }
    meshes = set(map(frozenset, spread.values()))
    if not meshes:
        return None
    union = frozenset[int]().union(*meshes)
    if union in meshes:
        if dist.is_initialized() and dist.get_rank() not in union:
            raise ProcessGroupError(
                f"rank {dist.get_rank()} is in no device mesh of these DTensors (ranks "
                f"{sorted(union)}) and cannot take part in their norm; call this on the mesh's "
                f"ranks only, or build a GradClipper on all ranks"
            )
        return collectives.group_of_ranks(tuple(union))
    return collectives.group_of_ranks(tuple(range(dist.get_world_size())))


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where the statistics go; what lies nowhere (meta) is refused when it is measured."""
    return tensors[0].device if tensors and not tensors[0].is_meta else torch.device("cpu")


def describe_tensor(name: str, tensor: Tensor) -> Described:
    """The entry and piece of a tensor that is measured itself (not its gradient)."""
    if isinstance(tensor, DTensor):
        return dtensor.describe_tensor(name, tensor)
    shape = tuple(tensor.shape)
    entry = Entry(name, shape, str(tensor.dtype).removeprefix("torch."))
    # What cannot be measured is an error when it is, so that all ranks get to hear of it.
    fetch = functools.partial(_measurable, name, tensor.detach())
    return entry, (Piece(0, Box((0,) * len(shape), shape), 1.0, fetch, tensor.detach),)


def _measurable(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a refusal by name."""
    return tensor if sparse.is_sparse(tensor) else plain.check_dense(name, tensor)


agreements = handshake.Agreements()


def agree(program: Program, policy: Policy) -> None:
    """See to it that all ranks of the group are about to reduce the same things."""
    if program.plan.group is not None:
        agreements.agree(program.plan.group, _kind(program, policy), program.plan.entries)


def _kind(program: Program, policy: Policy) -> str:
    unit = f" unit={policy.unit!r}" if isinstance(policy, AGC) else ""
    return f"{policy.name} p={program.shown:g}{unit}"


def _tell(error: DistclipError, named: Named, policy: Policy, *, norms: bool) -> None:
    """Tell the ranks that wait for this one what is wrong with its parameters.

    They are about to compare if they have not agreed on such a call before, else to reduce: so does
    this rank, with nothing in the place of what it cannot read.
    """
    described: list[Described] = []
    for name, parameter in named:
        try:
            described += detect(name, parameter)
        except DistclipError:
            dtype = str(parameter.dtype).removeprefix("torch.")
            shaped = not (isinstance(parameter, UninitializedParameter) or parameter.is_nested)
            shape = tuple(parameter.shape) if shaped else ()
            described.append((Entry(name, shape, dtype), ()))
    with torch.no_grad(), contextlib.suppress(DistclipError):
        if group_of([entry for entry, _ in described]) is None:
            return
        program = compiled(described, policy, device_of([p for _, p in named]), norms=norms)
        plan = program.plan
        if plan.group is None or not (norms or plan.replicated):
            return
        if agreements.knows(plan.group, _kind(program, policy), plan.entries):
            walk(program, {}, trouble=error)
        else:
            agreements.tell(plan.group, error)


class Found(NamedTuple):
    """A program, and the gradients where looking for it has fetched them."""

    program: Program
    fetched: Fetched | None


class Programs:
    """Recently compiled programs, so that a call a step does not describe the model anew."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._known: OrderedDict[object, tuple[Fingerprint, Program]] = OrderedDict()

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()

    def get(self, given: Given, policy: Policy, *, norms: bool) -> Program:
        """The compiled program for these parameters."""
        return self.find(given, policy, norms=norms).program

    def find(self, given: Given, policy: Policy, *, norms: bool) -> Found:
        """The program for these parameters; with their gradients where it had to look at them."""
        parameters = given.parameters
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        names = None if given.names is None else tuple(given.names)
        key = (tuple(map(id, parameters)), names, policy, norms, id(world))
        found = self._known.get(key)
        if found is not None and found[0].is_of(parameters):
            fetched = found[0].gradients(found[1])
            if fetched is not None or found[0].fits(parameters):
                with contextlib.suppress(KeyError):  # another thread has let go of it
                    self._known.move_to_end(key)
                return Found(found[1], fetched)
        named = naming.meant(given.named())
        meant = [parameter for _, parameter in named]
        try:
            _, described = describe(named)
            check_weights(policy, described)
            program = compiled(described, policy, device_of(meant), norms=norms)
        except DistclipError as error:
            _tell(error, named, policy, norms=norms)
            raise
        if norms or program.plan.replicated:  # else the call talks to nobody
            agree(program, policy)
        self._known[key] = (Fingerprint(parameters, meant), program)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return Found(program, None)


class Fingerprint:
    """What a program knows of its parameters: ``model.half()`` keeps the objects and changes them.

    Compared at every call, so without a Python loop.
    """

    def __init__(self, parameters: Sequence[Tensor], meant: Sequence[Tensor]) -> None:
        self._references = list(map(weakref.ref, parameters))
        self._meant = None if _are_same(parameters, meant) else list(map(weakref.ref, meant))
        self._stepped = _stepped_in_backward(meant)
        self._facts = [(fact, list(map(fact, meant))) for fact in _FACTS]
        self._sharding = self._shardings(meant)

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the fingerprint is of exactly these tensors, in this order."""
        return _are_same([alive() for alive in self._references], parameters)

    def gradients(self, program: Program) -> Fetched | None:
        """The gradients, where they tell that nothing has changed: as one is, its parameter is.

        Where there are other ranks, all have to see alike whether to compile anew: not so here.
        """
        alone = program.plan.group is None and not declared.is_in_use()
        if self._meant is not None or program.has_units or not alone:
            return None
        if any(map(_attributes, [alive() for alive in self._references])):
            return None
        return program.memory.find(program.plan)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are unchanged, and so are those that they stand for.

        FSDP2 never makes a gathered parameter of one that was none.
        """
        if self._meant is not None:
            unique = {id(each): each for each in fsdp2.sharded(parameters)}
            parameters = list(unique.values())
            if not _are_same([alive() for alive in self._meant], parameters):
                return False
        same = self._stepped == _stepped_in_backward(parameters)
        same = same and all(list(map(fact, parameters)) == known for fact, known in self._facts)
        return same and self._sharding == self._shardings(parameters)

    @staticmethod
    def _shardings(parameters: Sequence[Tensor]) -> list[object]:
        """What changes with how the parameters are spread over ranks."""
        if all(issubclass(kind, DTensor) for kind in set(map(type, parameters))):
            return list(map(_spec, parameters))
        if not declared.is_in_use() and not any(map(_attributes, parameters)):
            return list(map(_shape, parameters))  # nobody has said anything of any of them
        asks = [each.fingerprint for each in LAYOUTS if each.fingerprint is not None]
        return [list(map(ask, parameters)) for ask in (_sharding, *asks)]


def _are_same(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


_FACTS = tuple(map(operator.attrgetter, ("requires_grad", "dtype", "device")))
_spec, _shape, _attributes = map(operator.attrgetter, ("_spec", "shape", "__dict__"))


def _sharding(parameter: Tensor) -> object:
    return parameter._spec if isinstance(parameter, DTensor) else parameter.shape


def _stepped_in_backward(parameters: Sequence[Tensor]) -> list[bool]:
    if not any(map(_attributes, parameters)):
        return [False] * len(parameters)
    return list(map(hasattr, parameters, itertools.repeat("_in_backward_optimizers")))


programs = Programs()
