"""Drop-ins with the signatures of ``torch.nn.utils``, right under any sharding.

They know no names and keep no state. A DTensor is reduced over its mesh; a plain tensor, and what
lies outside of a DTensor's mesh, is taken as a replica. ``process_group`` says that its members
hold different parameters instead (pipeline stages), which are then all counted.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from distclip.errors import ConfigurationError, NonFiniteGradientError
from distclip.layouts import dtensor, plain
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import detect
from distclip.layouts.names import Named
from distclip.layouts.piece import Box, Described, Entry, Piece
from distclip.passes import compile_passes, report_order
from distclip.policies import AGC, GlobalNorm, Measure, ParameterInfo, Policy, Value
from distclip.policies._protocol import combine_norms
from distclip.statistics import collectives
from distclip.walk import Program, Walked, walk

Parameters: TypeAlias = Tensor | Iterable[Tensor]
Tensors: TypeAlias = Tensor | Iterable[Tensor]


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
        UnsupportedGradientError: sparse, or a ``Partial`` that cannot be reduced.
    """
    named = _named(parameters)
    policy = GlobalNorm(max_norm, norm_type)
    walked = _walk(named, policy, process_group, "error" if error_if_nonfinite else "pass")
    return combine_norms(walked.raw, policy.norm_type).to(_norm_dtype(p for _, p in named))


def clip_grad_value_(
    parameters: Parameters, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every gradient element to ``[-clip_value, clip_value]``, in place.

    Elementwise, so the same under every sharding, without communication. NaN stays NaN.

    Args:
        parameters: a tensor or an iterable of tensors.
        clip_value: threshold >= 0.
        foreach: accepted for torch's sake.

    Raises:
        ConfigurationError: a negative or NaN threshold.
        UnsupportedGradientError: sparse, or a ``Partial`` that cannot be reduced.
    """
    _walk(_named(parameters), Value(clip_value), None, "pass", norms=False)


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
    named = _named(parameters)
    walked = _walk(named, AGC(clip_factor, eps, unit), process_group, "pass")
    return combine_norms(walked.raw, 2.0).to(_norm_dtype(p for _, p in named))


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
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    described = [_describe_tensor(str(number), tensor) for number, tensor in enumerate(listed)]
    policy = Measure(norm_type)
    program = _program(described, policy, process_group, _device(listed), norms=True)
    with torch.no_grad():
        walked = walk(program, {}, on_nonfinite="error" if error_if_nonfinite else "pass")
    return combine_norms(walked.raw, policy.norm_type).to(_norm_dtype(listed))


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
        Name -> 0-dim float32 (float64 for a float64 gradient); 0 where there is no gradient.
    """
    named = naming.named_parameters(module_or_named_parameters)
    if process_group is not None:
        # Other members have other parameters: sums of different things must not meet.
        raise ConfigurationError(
            "grad_norms with a process_group: members with different parameters need names to be "
            "told apart; use GradClipper([stage], policies.measure()).clip_().parameter_norms"
        )
    walked = _walk(named, Measure(norm_type), None, "pass")
    return {
        name: norm.to(_norm_dtype([parameter]))
        for (name, parameter), norm in zip(named, walked.raw.unbind(), strict=True)
    }


def _named(parameters: Parameters) -> Named:
    if isinstance(parameters, nn.Module):
        raise ConfigurationError(
            "expected parameters, got a module; pass module.parameters() (GradClipper takes modules)"
        )
    return naming.named_parameters(parameters)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _norm_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(t.dtype in double for t in tensors) else torch.float32


def _walk(
    named: Named,
    policy: Policy,
    process_group: ProcessGroup | None,
    on_nonfinite: str,
    *,
    norms: bool = True,
) -> Walked:
    program = _programs.get(named, policy, process_group, norms)
    if program.plan.group is not None:
        collectives.check_open(program.plan.group)
    with torch.no_grad():
        return walk(program, {}, on_nonfinite=on_nonfinite)


def _program(
    described: Sequence[Described],
    policy: Policy,
    process_group: ProcessGroup | None,
    device: torch.device,
    *,
    norms: bool,
) -> Program:
    plan = _plan(described, process_group, device)
    infos = [ParameterInfo(entry.name, entry.shape) for entry in plan.entries]
    passes = compile_passes(
        policy,
        infos,
        plan.entries,
        distributed=plan.group is not None,
        norms=norms,
        watch_nonfinite=False,
    )
    return Program.of(plan, infos, passes, report_order(policy, infos))


def _plan(
    described: Sequence[Described], process_group: ProcessGroup | None, device: torch.device
) -> plans.Plan:
    entries = [entry for entry, _ in described]
    group = _group(entries, process_group)
    if group is None or dist.get_world_size(group) == 1:
        return plans.local_plan(described, collectives.device_for(group, device))
    first = collectives.rank_in(group) == 0
    size = dist.get_world_size(group)
    members = set(collectives.ranks_of(group))
    shared: list[Described] = []
    for entry, pieces in described:
        if entry.ranks is not None and process_group is None:
            # Each sub-mesh of the group holds a replica: their mean is what one of them has.
            share = len(members & set(entry.ranks)) / size
        elif entry.ranks is not None or process_group is not None:
            share = 1.0
        else:
            share = 1.0 if first else 0.0
        shared.append((entry, [piece.numbered(0, share) for piece in pieces]))
    return plans.local_plan(shared, collectives.device_for(group, device), group)


def _group(entries: Sequence[Entry], process_group: ProcessGroup | None) -> ProcessGroup | None:
    """The group to sum over: the one given, the DTensors' common mesh, or else all ranks."""
    if process_group is not None:
        collectives.check_open(process_group)
        return process_group
    meshes = {frozenset(entry.ranks) for entry in entries if entry.ranks is not None}
    if not meshes:
        return None
    union = frozenset[int]().union(*meshes)
    if union in meshes:
        return collectives.group_of_ranks(tuple(union))
    return collectives.group_of_ranks(tuple(range(dist.get_world_size())))


def _describe_tensor(name: str, tensor: Tensor) -> Described:
    if isinstance(tensor, DTensor):
        return dtensor.describe_tensor(name, tensor)
    plain.check_dense(name, tensor)
    shape = tuple(tensor.shape)
    entry = Entry(name, shape, str(tensor.dtype).removeprefix("torch."))
    piece = Piece(0, Box((0,) * len(shape), shape), 1.0, tensor.detach, tensor.detach)
    return entry, (piece,)


class _Programs:
    """Recently compiled programs, so that a call a step does not describe the model anew."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._known: OrderedDict[object, tuple[list[weakref.ref[Tensor]], Program]] = OrderedDict()

    def get(
        self, named: Named, policy: Policy, process_group: ProcessGroup | None, norms: bool
    ) -> Program:
        parameters = [parameter for _, parameter in named]
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        key = (
            tuple(map(id, parameters)),
            tuple(parameter.requires_grad for parameter in parameters),
            policy,
            norms,
            id(process_group),
            id(world),
        )
        found = self._known.get(key)
        if found is not None and all(
            reference() is parameter
            for reference, parameter in zip(found[0], parameters, strict=True)
        ):
            self._known.move_to_end(key)
            return found[1]
        described = [detect(name, parameter) for name, parameter in named]
        program = _program(described, policy, process_group, _device(parameters), norms=norms)
        self._known[key] = ([weakref.ref(parameter) for parameter in parameters], program)
        if len(self._known) > self._size:
            self._known.popitem(last=False)
        return program


_programs = _Programs()

__all__ = ["clip_grad_agc_", "clip_grad_norm_", "clip_grad_value_", "get_total_norm", "grad_norms"]

