"""Drop-ins with the signatures of ``torch.nn.utils``, right under any sharding.

They know no names and keep no state. A DTensor is reduced over its mesh, a shard of FSDP1 over its
process group, and a parameter that was declared sharded over its group; a plain tensor, and what
lies outside of a mesh or group, is taken as a replica. ``pipeline_group=`` says that its members
hold different parameters instead (pipeline stages), which are then all counted. (The
``process_group=`` of a GradClipper is another thing: the ranks that hold one model together.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from distclip.application.eager import eagerly
from distclip.application.notices import forget_clips, note_clip, sample, warn_of_former
from distclip.engine import calls
from distclip.engine.calls import on_parameters, on_tensors
from distclip.engine.given import Given, as_tensors
from distclip.engine.joint import joint_norm
from distclip.engine.usual import usual_gradients, usual_norms
from distclip.errors import ConfigurationError
from distclip.kernels import changing
from distclip.layouts import tensors as layouts
from distclip.layouts.plan import DOUBLE
from distclip.policies import AGC, ByName, GlobalNorm, Measure, Policy, Value
from distclip.policies.norm_threshold import norm_coefficient
from distclip.statistics import collectives

Parameters: TypeAlias = Tensor | Iterable[Tensor]
P = TypeVar("P", bound=Policy)
Tensors: TypeAlias = Tensor | Iterable[Tensor]


@eagerly
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pipeline_group: ProcessGroup | None = None,
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
        pipeline_group: its members hold different parameters (pipeline stages); all are counted.
        process_group: the former name of ``pipeline_group``.

    Returns:
        The norm before clipping: 0-dim float32, or float64 if a gradient is float64.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
        NonFiniteGradientError: (a RuntimeError) under ``error_if_nonfinite``.
        UnsupportedGradientError: a sparse shard, or a ``Partial`` that cannot be reduced.
    """
    given = Given.listed(parameters)
    policy = _policy(GlobalNorm, max_norm, norm_type)
    group = _pipeline(pipeline_group, process_group)
    if group is None:
        with on_parameters(given, policy) as session:
            norm = session.clip(_mode(error_if_nonfinite), None).total_norm
    else:
        measuring = on_parameters(given, Measure(policy.norm_type))
        with joint_norm(measuring, policy.norm_type, group, error_if_nonfinite) as found:
            norm, session = found
            session.scale(norm_coefficient(norm, policy.max_norm))
    if policy.max_norm < math.inf:
        _note(given, "distclip.clip_grad_norm_")
    return norm.to(session.plan.norm_dtype)


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
    given = Given.listed(parameters)
    policy = _policy(Value, clip_value)
    with on_parameters(given, policy, norms=False) as session:
        seen = usual_gradients(session)
        if seen is None:
            session.clip("pass", None)
        else:
            tables = session.program.scratch.tables
            with torch.no_grad():
                bounds = np.full(len(seen.tensors), policy.bound)
                changing.clamp_(seen.tensors, bounds, seen=seen, tables=tables)
    _note(given, "distclip.clip_grad_value_")


@eagerly
def clip_grad_agc_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    unit: Literal["row", "tensor"] = "row",
    norm_type: float = 2.0,
    *,
    pipeline_group: ProcessGroup | None = None,
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
        pipeline_group: its members hold different parameters (pipeline stages); all are counted.
        process_group: the former name of ``pipeline_group``.

    Returns:
        The joint p-norm of all gradients before clipping, as :func:`clip_grad_norm_`.
    """
    given = Given.listed(parameters)
    policy = AGC(clip_factor, eps, unit, norm_type=norm_type)
    group = _pipeline(pipeline_group, process_group)
    total = None
    if group is not None:
        # A unit lies on one member, or on its mesh: only the joint norm concerns other members.
        measuring = on_parameters(given, Measure(policy.norm_type))
        with joint_norm(measuring, policy.norm_type, group) as (total, _):
            pass
    with on_parameters(given, policy, norms=group is None) as session:
        walked = session.clip("pass", None)
    _note(given, "distclip.clip_grad_agc_")
    return (walked.total_norm if total is None else total).to(session.plan.norm_dtype)


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
    if isinstance(total_norm, Tensor):
        norm = layouts.whole_values(total_norm).detach().double()
    else:
        norm = torch.tensor(total_norm, dtype=torch.float64, device="cpu")
    if norm.numel() != 1:
        raise ConfigurationError(
            f"clip_grads_with_norm_: total_norm must be one number, got a tensor of shape "
            f"{list(norm.shape)}; give the joint norm, as get_total_norm returns it"
        )
    given = Given.listed(parameters)
    with on_parameters(given, ByName({}), norms=False) as session:
        seen, coefficient = usual_gradients(session), norm_coefficient(norm.reshape(()), limit)
        if seen is None:
            session.clip("pass", None)  # looks at the gradients, and no more
            session.scale(coefficient)
        else:
            coefficient = coefficient.to(session.plan.device)
            with torch.no_grad():
                changing.scale_all_(seen, coefficient, tables=session.program.scratch.tables)
    _note(given, "distclip.clip_grads_with_norm_")


@eagerly
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pipeline_group: ProcessGroup | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The joint p-norm of tensors (not of their ``.grad``), as ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: a tensor or an iterable of tensors, plain and DTensors, on any meshes.
        norm_type: order p > 0 or inf.
        error_if_nonfinite: raise on all ranks if the norm is NaN or inf.
        foreach: accepted for torch's sake.
        pipeline_group: its members hold different tensors (pipeline stages); all are counted.
        process_group: the former name of ``pipeline_group``.

    Returns:
        0-dim float32, or float64 if a tensor is float64.
    """
    policy = _policy(Measure, norm_type)
    measuring = on_tensors(as_tensors(tensors), policy)
    group = _pipeline(pipeline_group, process_group)
    if group is None:
        with measuring as session:
            norm = session.clip(_mode(error_if_nonfinite), None).total_norm
    else:
        with joint_norm(measuring, policy.norm_type, group, error_if_nonfinite) as found:
            norm, session = found
    return norm.to(session.plan.norm_dtype)


@eagerly
def grad_norms(
    module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    norm_type: float = 2.0,
    *,
    pipeline_group: ProcessGroup | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The p-norm of each parameter's whole gradient, under any sharding, nothing gathered.

    Args:
        module_or_named_parameters: a module, or (name, parameter) pairs.
        norm_type: order p > 0 or inf.
        pipeline_group: its members hold different parameters (pipeline stages); each rank gets the
            norms of its own.
        process_group: the former name of ``pipeline_group``.

    Returns:
        Name -> 0-dim float32 (float64 for a float64 gradient); 0 where there is no gradient. Of
        declared experts all of the group's, as ``name@rank``.
    """
    given = Given.named(module_or_named_parameters)
    group = _pipeline(pipeline_group, process_group)
    if group is not None:
        # Other members have other parameters, whose norms nothing here is added to: each DTensor
        # is reduced over its own mesh.
        collectives.check_open(group, "pipeline_group")
    policy = _policy(Measure, norm_type)
    with on_parameters(given, policy) as session, torch.no_grad():
        usual, plan = usual_norms(session, policy.norm_type), session.plan
        norms = session.clip("pass", None).raw if usual is None else usual
        singles = norms.float().unbind()
    if plan.norm_dtype is torch.float32:
        return dict(zip(plan.names, singles, strict=True))
    return {
        entry.name: norms[row] if entry.dtype in DOUBLE else singles[row]
        for row, entry in enumerate(plan.entries)
    }


def clear_cache() -> None:
    """Forget what the functions of this module remember of parameters they were given.

    Never needed for a right answer: parameters that have changed are looked at anew. They are
    remembered by shape, sharding and ``id``, at most 16 sets of them, and nothing is kept alive.
    """
    calls.forget()
    forget_clips()


def _pipeline(
    pipeline_group: ProcessGroup | None, process_group: ProcessGroup | None
) -> ProcessGroup | None:
    """The group whose members hold different parameters, under its name or the former one."""
    if process_group is None:
        return pipeline_group
    if pipeline_group is not None:
        raise ConfigurationError(
            "pipeline_group and process_group are two names for one thing; give pipeline_group only"
        )
    warn_of_former(
        "process_group= of this function is now called pipeline_group=: the ranks whose parameters "
        "differ (the process_group= of a GradClipper is the ranks that hold one model together)"
    )
    return process_group


def _policy(kind: Callable[..., P], *numbers: float) -> P:
    """A policy; the one of an earlier call where it was given the same, checked, numbers."""
    if any(type(each) is not float for each in numbers):
        return kind(*numbers)
    return cast(P, _checked(kind, *numbers))


@functools.lru_cache(maxsize=64)
def _checked(kind: Callable[..., Policy], *numbers: float) -> Policy:
    return kind(*numbers)


def _mode(error_if_nonfinite: bool) -> str:
    return "error" if error_if_nonfinite else "pass"


def _note(given: Given, by: str) -> None:
    """See :func:`note_clip`."""
    note_clip(sample(given.parameters), by)


__all__ = [
    "clear_cache",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "grad_norms",
]
