"""Drop-ins with the signatures of ``torch.nn.utils``, right under any sharding.

They know no names and keep no state. A DTensor is reduced over its mesh, a shard of FSDP1 over its
process group, and a parameter that was declared sharded over its group; a plain tensor, and what
lies outside of a mesh or group, is taken as a replica. ``process_group=`` says that its members
hold different parameters instead (pipeline stages), which are then all counted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from distclip.application.eager import eagerly
from distclip.application.notices import note_clip, sample, warn
from distclip.engine import handshake
from distclip.engine.ledger import Program, Walked
from distclip.engine.passes import check_weights, compile_passes, report_order
from distclip.engine.walk import raise_together, walk
from distclip.errors import (
    ConfigurationError,
    DistclipError,
    NonFiniteGradientError,
    ProcessGroupError,
)
from distclip.kernels import changing
from distclip.kernels.plain import is_wide
from distclip.layouts import declared, dtensor, fsdp1, fsdp2, plain, soundness, sparse
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import describe, detect
from distclip.layouts.fetching import Fetched
from distclip.layouts.names import Named
from distclip.layouts.piece import Box, Described, Entry, Piece
from distclip.policies import AGC, GlobalNorm, Measure, ParameterInfo, Policy, Value
from distclip.policies._norm_threshold import norm_coefficient
from distclip.statistics import collectives
from distclip.statistics.packing import Packet

Parameters: TypeAlias = Tensor | Iterable[Tensor]
Tensors: TypeAlias = Tensor | Iterable[Tensor]

_GO_ON = "; error_if_nonfinite=False raises nothing and returns the norm that is not finite"

DOUBLE = ("float64", "complex128")
"""Names of the dtypes whose norms are float64."""


@eagerly
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Clip the joint norm of the parameters' gradients, in place.

    ``g *= min(1, max_norm / (||g||_p + 1e-6))``. As ``torch.nn.utils.clip_grad_norm_``, but: exact
    to 1e-6 in any dtype; DTensors on any meshes and plain tensors together; a parameter listed
    twice counts once; the result is a plain, fully reduced tensor.

    Args:
        parameters: a tensor or an iterable of tensors, whose ``.grad`` is clipped. Every rank
            gives its part of the same parameters, gradients there or not.
        max_norm: threshold >= 0; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.
        error_if_nonfinite: raise on all ranks, gradients untouched, if the norm is NaN or inf.
        foreach: accepted for torch's sake; there is one, fast, implementation.
        process_group: its members hold different parameters (pipeline stages).

    Returns:
        The norm before clipping: 0-dim float32, or float64 if a gradient is float64.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
        NonFiniteGradientError: (a RuntimeError) under ``error_if_nonfinite``.
        UnsupportedGradientError: a sparse shard, or a ``Partial`` that cannot be reduced.
    """
    given = _given(parameters)
    policy = GlobalNorm(max_norm, norm_type)
    if process_group is None:
        walked, plan = _walk(given, policy, "error" if error_if_nonfinite else "pass")
        if policy.max_norm < math.inf:
            _note(given, "distclip.clip_grad_norm_")
        return walked.total_norm.to(_norm_dtype(plan.dtypes))
    find = functools.partial(_programs.get, given, Measure(policy.norm_type), norms=True)
    with torch.no_grad():
        total = _joint_norm(find, policy.norm_type, process_group, error_if_nonfinite)
        plan = find().plan
        gradients, *_ = soundness.inspect(plan, [p.gradient() for p in plan.pieces], first=False)
        present = [gradient for gradient in gradients if gradient is not None]
        coefficient = norm_coefficient(total, policy.max_norm)
        changing.scale_(present, coefficient.expand(len(present)))
    _note(given, "distclip.clip_grad_norm_")
    return total.to(_norm_dtype(plan.dtypes))


@eagerly
def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, in place.

    Elementwise, so the same under every sharding, without communication. (Where a mesh replicates
    a DTensor, one number travels: its gradients may be ``Partial``, and are then reduced first.)
    NaN stays NaN.

    Args:
        parameters: a tensor or an iterable of tensors.
        clip_value: threshold >= 0.
        foreach: accepted for torch's sake.

    Raises:
        ConfigurationError: a negative or NaN threshold.
        UnsupportedGradientError: a sparse shard, or a ``Partial`` that cannot be reduced.
    """
    given = _given(parameters)
    _walk(given, Value(clip_value), "pass", norms=False)
    _note(given, "distclip.clip_grad_value_")


@eagerly
def clip_grad_agc_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    unit: Literal["row", "tensor"] = "row",
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Adaptive gradient clipping, in place: each output row against its weights.

    ``m = clip_factor * max(||w_u||, eps)``; where ``||g_u|| > m``: ``g_u *= m / ||g_u||``. Brock et
    al. 2021 (arXiv 2102.06171, equation 3); see ``policies.agc``.

    Args:
        parameters: a tensor or an iterable of tensors.
        clip_factor: finite, > 0.
        eps: floor of the weight norm; finite, > 0.
        unit: ``"row"`` or ``"tensor"``.
        process_group: its members hold different parameters (pipeline stages).

    Returns:
        The joint 2-norm of all gradients before clipping, as :func:`clip_grad_norm_`.
    """
    given = _given(parameters)
    policy = AGC(clip_factor, eps, unit)
    if process_group is None:
        walked, plan = _walk(given, policy, "pass")
        _note(given, "distclip.clip_grad_agc_")
        return walked.total_norm.to(_norm_dtype(plan.dtypes))
    # A unit lies on one member, or on its mesh: only the joint norm concerns the other members.
    with torch.no_grad():
        find = functools.partial(_programs.get, given, Measure(), norms=True)
        total = _joint_norm(find, 2.0, process_group, False)
    _, plan = _walk(given, policy, "pass", norms=False)
    _note(given, "distclip.clip_grad_agc_")
    return total.to(_norm_dtype(plan.dtypes))


@eagerly
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The joint p-norm of tensors (not of their ``.grad``), as ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: a tensor or an iterable of tensors, plain and DTensors, on any meshes.
        norm_type: order p > 0 or inf.
        error_if_nonfinite: raise on all ranks if the norm is NaN or inf.
        foreach: accepted for torch's sake.
        process_group: its members hold different tensors (pipeline stages).

    Returns:
        0-dim float32, or float64 if a tensor is float64.
    """
    listed = _listed(tensors)
    policy = Measure(norm_type)

    def compiled() -> Program:
        described = [_describe_tensor(str(number), tensor) for number, tensor in enumerate(listed)]
        program = _program(described, policy, _device(listed), norms=True)
        program.memory.inspected.add("unchanged")
        _agree(program, policy)
        return program

    with torch.no_grad():
        if process_group is not None:
            total = _joint_norm(compiled, policy.norm_type, process_group, error_if_nonfinite)
        else:
            mode = "error" if error_if_nonfinite else "pass"
            total = walk(compiled(), {}, on_nonfinite=mode, go_on=_GO_ON).total_norm
    return total.to(_norm_dtype(str(tensor.dtype).removeprefix("torch.") for tensor in listed))


@eagerly
def grad_norms(
    module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    norm_type: float = 2.0,
    *,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The p-norm of each parameter's whole gradient, under any sharding, nothing gathered.

    Args:
        module_or_named_parameters: a module, or (name, parameter) pairs.
        norm_type: order p > 0 or inf.
        process_group: its members hold different parameters (pipeline stages); each rank gets the
            norms of its own.

    Returns:
        Name -> 0-dim float32 (float64 for a float64 gradient); 0 where there is no gradient. Of
        declared experts all of the group's, as ``name@rank``.
    """
    target = module_or_named_parameters
    if isinstance(target, Iterable) and not isinstance(target, (nn.Module, Mapping)):
        target = _listed(target)  # type: ignore[arg-type, assignment]
    given = Given.of(naming.named_parameters(target))
    if process_group is not None:
        # Other members have other parameters, whose norms nothing here is added to: each DTensor
        # is reduced over its own mesh.
        collectives.check_open(process_group)
    policy = Measure(norm_type)
    walked, plan = _walk(given, policy, "pass")
    return {
        entry.name: norm.to(torch.float64 if entry.dtype in DOUBLE else torch.float32)
        for entry, norm in zip(plan.entries, walked.raw.unbind(), strict=True)
    }


class Given(NamedTuple):
    """Parameters that a caller gave, each once, and their names; None: their positions."""

    parameters: Sequence[Tensor]
    names: Sequence[str] | None = None

    @classmethod
    def of(cls, named: Named) -> Given:
        """From (name, parameter) pairs."""
        return cls([parameter for _, parameter in named], [name for name, _ in named])

    def named(self) -> Named:
        """The pairs."""
        names = map(str, range(len(self.parameters))) if self.names is None else self.names
        return list(zip(names, self.parameters, strict=True))


def _given(parameters: Parameters) -> Given:
    if isinstance(parameters, (nn.ParameterList, nn.ParameterDict)):
        parameters = parameters.parameters()
    if isinstance(parameters, nn.Module):
        raise ConfigurationError(
            "expected parameters, got a module; pass module.parameters(), or use a GradClipper"
        )
    alone = not (dist.is_initialized() and dist.get_world_size() > 1)
    named = isinstance(parameters, Mapping) or not isinstance(parameters, Iterable)
    if named or (isinstance(parameters, (set, frozenset)) and not alone):
        return Given.of(naming.named_parameters(parameters))
    listed = _listed(parameters)
    kinds = set(map(type, listed))
    if not all(issubclass(kind, Tensor) for kind in kinds):
        if any(issubclass(kind, dict) for kind in kinds):
            raise ConfigurationError(
                "expected parameters, got optimizer parameter groups; pass "
                '[p for group in optimizer.param_groups for p in group["params"]]'
            )
        return Given.of(naming.named_parameters(listed))
    if len(set(map(id, listed))) == len(listed):
        return Given(listed)
    positions: dict[int, tuple[str, Tensor]] = {}
    for position, parameter in enumerate(listed):
        positions.setdefault(id(parameter), (str(position), parameter))
    return Given.of(list(positions.values()))


def _listed(tensors: Tensors) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    used = naming.used_up(tensors)
    listed = list(tensors)
    if used or naming.is_empty_iterator(tensors, listed):
        warn(
            f"the given {type(tensors).__name__} {used or 'gives nothing'}: an optimizer, or an "
            f"earlier call, may have used it up. What it no longer gives is neither measured nor "
            f"clipped; call with model.parameters() anew, or with a list"
        )
    return listed


def _note(given: Given, by: str) -> None:
    """See :func:`note_clip`."""
    note_clip(sample(given.parameters), by)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    """Where the statistics go; what lies nowhere (meta) is refused when it is measured."""
    return tensors[0].device if tensors and not tensors[0].is_meta else torch.device("cpu")


def _norm_dtype(dtypes: Iterable[str]) -> torch.dtype:
    return torch.float32 if set(dtypes).isdisjoint(DOUBLE) else torch.float64


def _joint_norm(
    find: Callable[[], Program], norm_type: float, group: ProcessGroup, error_if_nonfinite: bool
) -> Tensor:
    """The p-norm over the members of ``group``, who hold different parameters; 0-dim float64.

    First over each parameter's own mesh, which may reach beyond the group, then over the group: a
    parameter whose mesh has several members in the group counts once among them. The members need
    not have equally many parameters, or any.
    """
    collectives.check_open(group)
    trouble: DistclipError | None = None
    entries: tuple[Entry, ...] = ()
    norms = torch.zeros(0, dtype=torch.float64)
    try:
        program = find()
        norms, entries = walk(program, {}).raw, program.plan.entries
    except DistclipError as error:  # the other members have to learn of it before it is raised
        trouble = error
    here = norms.device.type if entries else ""
    common = _agreements.device(group, here)
    device = collectives.device_for(group, norms.device if here == common else torch.device(common))
    members = set(collectives.ranks_of(group))
    spread = [e.ranks is not None or bool(e.others) for e in entries]
    holders = [
        0 if entry.copy else declared.holders(entry, members) if has else 1
        for entry, has in zip(entries, spread, strict=True)
    ]
    shares = [1.0 / count if count else 0.0 for count in holders]
    packet = Packet(group, wide={norm_type: is_wide(torch.float64, norm_type)})
    packet.add_norms(
        "norm",
        norms.to(device),
        norm_type,
        torch.zeros(len(shares), dtype=torch.long, device=device),
        torch.tensor(shares, dtype=torch.float64, device=device),
        1,
    )
    flag = torch.full((1,), float(trouble is not None), dtype=torch.float64, device=device)
    packet.add_flag("trouble", flag)
    got = packet.exchange()
    raise_together(trouble, got["trouble"].item())
    total = got["norm"].squeeze(0)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise NonFiniteGradientError(
            f"the {norm_type}-norm over the process group is {total.item()}; nothing was changed"
            + _GO_ON,
            [
                entry.name
                for entry, norm in zip(entries, norms.tolist(), strict=True)
                if not math.isfinite(norm)
            ],
        )
    return total


def _walk(
    given: Given, policy: Policy, on_nonfinite: str, *, norms: bool = True
) -> tuple[Walked, plans.Plan]:
    program, fetched = _programs.find(given, policy, norms=norms)
    if program.plan.group is not None:
        collectives.check_open(program.plan.group)
    with torch.no_grad():
        walked = walk(program, {}, on_nonfinite=on_nonfinite, fetched=fetched, go_on=_GO_ON)
    return walked, program.plan


def _program(
    described: Sequence[Described], policy: Policy, device: torch.device, *, norms: bool
) -> Program:
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
    group = _group([entry for entry, _ in described])
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


def _group(entries: Sequence[Entry]) -> ProcessGroup | None:
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


def _describe_tensor(name: str, tensor: Tensor) -> Described:
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


_agreements = handshake.Agreements()


def _agree(program: Program, policy: Policy) -> None:
    """See to it that all ranks of the group are about to reduce the same things."""
    if program.plan.group is not None:
        _agreements.agree(program.plan.group, _kind(program, policy), program.plan.entries)


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
        if _group([entry for entry, _ in described]) is None:
            return
        program = _program(described, policy, _device([p for _, p in named]), norms=norms)
        plan = program.plan
        if plan.group is None or not (norms or plan.replicated):
            return
        if _agreements.knows(plan.group, _kind(program, policy), plan.entries):
            walk(program, {}, trouble=error)
        else:
            _agreements.tell(plan.group, error)


class Found(NamedTuple):
    """A program, and the gradients where looking for it has fetched them."""

    program: Program
    fetched: Fetched | None


class _Programs:
    """Recently compiled programs, so that a call a step does not describe the model anew."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._known: OrderedDict[object, tuple[_Fingerprint, Program]] = OrderedDict()

    def get(self, given: Given, policy: Policy, *, norms: bool) -> Program:
        """The program for these parameters."""
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
                self._known.move_to_end(key)
                return Found(found[1], fetched)
        named = naming.meant(given.named())
        meant = [parameter for _, parameter in named]
        try:
            _, described = describe(named)
            check_weights(policy, described)
            program = _program(described, policy, _device(meant), norms=norms)
        except DistclipError as error:
            _tell(error, named, policy, norms=norms)
            raise
        if norms or program.plan.replicated:  # else the call talks to nobody
            _agree(program, policy)
        self._known[key] = (_Fingerprint(parameters, meant), program)
        if len(self._known) > self._size:
            self._known.popitem(last=False)
        return Found(program, None)


class _Fingerprint:
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
        """Whether these are the parameters."""
        return _are_same([alive() for alive in self._references], parameters)

    def gradients(self, program: Program) -> Fetched | None:
        """The gradients, where they tell that nothing has changed: as one is, its parameter is."""
        if self._meant is not None or program.has_units or declared.is_in_use():
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
        """Per parameter, what changes with how it is spread over ranks."""
        if all(issubclass(kind, DTensor) for kind in set(map(type, parameters))):
            return list(map(_spec, parameters))
        if not declared.is_in_use() and not any(map(_attributes, parameters)):
            return list(map(_shape, parameters))  # nobody has said anything of any of them
        return list(map(_sharding, parameters))


def _are_same(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


_FACTS = tuple(map(operator.attrgetter, ("requires_grad", "dtype", "device")))
_spec, _shape, _attributes = map(operator.attrgetter, ("_spec", "shape", "__dict__"))


def _sharding(parameter: Tensor) -> object:
    if isinstance(parameter, DTensor):
        return parameter._spec
    return parameter.shape, fsdp1.is_flattened(parameter), declared.fingerprint(parameter)


def _stepped_in_backward(parameters: Sequence[Tensor]) -> list[bool]:
    if not any(map(_attributes, parameters)):
        return [False] * len(parameters)
    return list(map(hasattr, parameters, itertools.repeat("_in_backward_optimizers")))


_programs = _Programs()

__all__ = ["clip_grad_agc_", "clip_grad_norm_", "clip_grad_value_", "get_total_norm", "grad_norms"]
