"""Drop-ins with the signatures of ``torch.nn.utils``, right under any sharding.

They know no names and keep no state. A DTensor is reduced over its mesh, a shard of FSDP1 over its
process group, and a parameter that was declared sharded over its group; a plain tensor, and what
lies outside of a mesh or group, is taken as a replica. ``process_group=`` says that its members
hold different parameters instead (pipeline stages), which are then all counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from distclip.application.eager import eagerly
from distclip.application.notices import forget_clips, note_clip, sample, warn
from distclip.engine.joint import joint_norm
from distclip.engine.program import Program
from distclip.engine.stateless import (
    GO_ON,
    Given,
    agree,
    clip,
    compiled,
    describe_tensor,
    device_of,
    programs,
)
from distclip.engine.walk import walk
from distclip.errors import ConfigurationError
from distclip.kernels import changing
from distclip.layouts import dtensor, soundness
from distclip.layouts import names as naming
from distclip.layouts.plan import Plan
from distclip.policies import AGC, ByName, GlobalNorm, Measure, Value
from distclip.policies.norm_threshold import norm_coefficient
from distclip.statistics import collectives

Parameters: TypeAlias = Tensor | Iterable[Tensor]
Tensors: TypeAlias = Tensor | Iterable[Tensor]

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
        walked, plan = clip(given, policy, "error" if error_if_nonfinite else "pass")
        if policy.max_norm < math.inf:
            _note(given, "distclip.clip_grad_norm_")
        return walked.total_norm.to(_norm_dtype(plan.dtypes))
    find = functools.partial(programs.get, given, Measure(policy.norm_type), norms=True)
    with torch.no_grad():
        total = joint_norm(find, policy.norm_type, process_group, error_if_nonfinite)
        plan = find().plan
        _scale_(plan, norm_coefficient(total, policy.max_norm))
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
    clip(given, Value(clip_value), "pass", norms=False)
    _note(given, "distclip.clip_grad_value_")


@eagerly
def clip_grad_agc_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    unit: Literal["row", "tensor"] = "row",
    norm_type: float = 2.0,
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
        norm_type: order p > 0 or inf of all norms here.
        process_group: its members hold different parameters (pipeline stages).

    Returns:
        The joint p-norm of all gradients before clipping, as :func:`clip_grad_norm_`.
    """
    given = _given(parameters)
    policy = AGC(clip_factor, eps, unit, norm_type=norm_type)
    if process_group is None:
        walked, plan = clip(given, policy, "pass")
        _note(given, "distclip.clip_grad_agc_")
        return walked.total_norm.to(_norm_dtype(plan.dtypes))
    # A unit lies on one member, or on its mesh: only the joint norm concerns the other members.
    with torch.no_grad():
        find = functools.partial(programs.get, given, Measure(policy.norm_type), norms=True)
        total = joint_norm(find, policy.norm_type, process_group, False)
    _, plan = clip(given, policy, "pass", norms=False)
    _note(given, "distclip.clip_grad_agc_")
    return total.to(_norm_dtype(plan.dtypes))


@eagerly
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scale gradients by a norm that is known already, as ``torch.nn.utils`` has it.

    ``g *= min(1, max_norm / (total_norm + 1e-6))``. Nothing is measured, and nothing is reduced but
    gradients that are ``Partial``: every rank gives the same norm, such as :func:`get_total_norm`
    returns.

    Args:
        parameters: a tensor or an iterable of tensors, whose ``.grad`` is scaled.
        max_norm: threshold >= 0.
        total_norm: a number, or a 0-dim tensor; of a DTensor the whole value is taken.
        foreach: accepted for torch's sake.

    Raises:
        ConfigurationError: a negative or NaN threshold, or a norm of more than one number.
        UnsupportedGradientError: a sparse shard, or a ``Partial`` that cannot be reduced.
    """
    limit = GlobalNorm(max_norm).max_norm
    if isinstance(total_norm, DTensor):
        total_norm = dtensor.replicated(total_norm)
    norm = torch.as_tensor(total_norm, dtype=torch.float64).detach()
    if norm.numel() != 1:
        raise ConfigurationError(
            f"clip_grads_with_norm_: total_norm must be one number, got a tensor of shape "
            f"{list(norm.shape)}; give the joint norm, as get_total_norm returns it"
        )
    given = _given(parameters)
    _, plan = clip(given, ByName({}), "pass", norms=False)  # looks at the gradients, and no more
    with torch.no_grad():
        _scale_(plan, norm_coefficient(norm.reshape(()), limit))
    _note(given, "distclip.clip_grads_with_norm_")


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

    def program_of() -> Program:
        described = [describe_tensor(str(number), tensor) for number, tensor in enumerate(listed)]
        program = compiled(described, policy, device_of(listed), norms=True)
        program.memory.only_measures = True
        agree(program, policy)
        return program

    with torch.no_grad():
        if process_group is not None:
            total = joint_norm(program_of, policy.norm_type, process_group, error_if_nonfinite)
        else:
            mode = "error" if error_if_nonfinite else "pass"
            total = walk(program_of(), {}, on_nonfinite=mode, go_on=GO_ON).total_norm
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
    walked, plan = clip(given, policy, "pass")
    return {
        entry.name: norm.to(torch.float64 if entry.dtype in DOUBLE else torch.float32)
        for entry, norm in zip(plan.entries, walked.raw.unbind(), strict=True)
    }


def clear_cache() -> None:
    """Forget what the functions of this module remember of parameters they were given.

    They remember it by weak references, which keep nothing alive; but torch refuses to convert
    DTensor parameters (``model.to(...)``, ``.cpu()``, ``.half()`` under FSDP2 or tensor
    parallelism) while there are any. Call this first; the next call of a function looks anew. What
    a :class:`distclip.GradClipper` refers to goes with the clipper.
    """
    programs.clear()
    forget_clips()


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


def _scale_(plan: Plan, coefficient: Tensor) -> None:
    """Multiply all gradients of a plan, found sound before, by one number."""
    gradients, *_ = soundness.inspect(plan, [p.gradient() for p in plan.pieces], first=False)
    present = [gradient for gradient in gradients if gradient is not None]
    changing.scale_(present, coefficient.to(plan.device).expand(len(present)))


def _note(given: Given, by: str) -> None:
    """See :func:`note_clip`."""
    note_clip(sample(given.parameters), by)


def _norm_dtype(dtypes: Iterable[str]) -> torch.dtype:
    return torch.float32 if set(dtypes).isdisjoint(DOUBLE) else torch.float64


__all__ = [
    "clear_cache",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "grad_norms",
]
