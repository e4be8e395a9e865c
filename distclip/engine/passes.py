"""Compiling a policy: which passes over the gradients it takes, known before the first step.

Norm algebra: after a scaling by c every norm is c times what it was, so any number of scaling
stages shares one measuring and one scaling pass. A clamp at the head of a pass is measured along
with it. Only a stage that reads the norm of something clamped *after* a scaling needs a new pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from distclip.errors import ConfigurationError
from distclip.layouts import soundness
from distclip.layouts.piece import Described, Entry
from distclip.layouts.plan import Plan
from distclip.policies import ClampingPolicy, ParameterInfo, Policy, UnitPolicy
from distclip.policies.compose import Stage, stages
from distclip.statistics.request import Request
from distclip.statistics.survey import Survey


def check_needed_weights(
    policy: Policy, described: Sequence[Described], *, all_of_them: bool = False
) -> None:
    """Refuse weights without values to measure, where a policy reads them, or ``all_of_them``.

    Raises:
        UnsupportedGradientError: names the first.
    """
    if all_of_them:
        soundness.check_weights((entry.name, piece) for entry, ps in described for piece in ps)
    infos = [ParameterInfo(entry.name, entry.shape) for entry, _ in described]
    for stage in stages(policy, infos):
        if isinstance(stage.policy, UnitPolicy) or stage.policy.needs.weight_norms:
            soundness.check_weights(
                (described[member][0].name, piece)
                for member in stage.members
                for piece in described[member][1]
            )


@dataclass(frozen=True)
class Pass:
    """One measuring and one acting pass.

    Attributes:
        stages: the stages that decide by it, in order.
        survey: what is measured.
        local_units: parameter -> the unit policies that decide on its units before the reduction.
        late_clamps: position of a clamping stage -> its parameters that are clamped after the
            measuring: those scaled before it, and all where it decides on the bound itself (the
            others are clamped at the head of the pass, and measured so).
        whole: position of a per-unit stage -> its parameters that are one unit to it.
        divided: position of a per-unit stage -> its parameters of several units that it decides
            on after the reduction (those in ``local_units`` are decided on by then).
    """

    stages: tuple[Stage, ...]
    survey: Survey
    local_units: dict[int, tuple[UnitPolicy, ...]]
    late_clamps: dict[int, tuple[int, ...]]
    whole: dict[int, tuple[int, ...]]
    divided: dict[int, tuple[int, ...]]


@dataclass
class _Draft:
    """A pass while its stages are collected. Keys and members are rows of the plan's table."""

    stages: list[Stage] = field(default_factory=list)
    bounds: dict[int, float] = field(default_factory=dict)
    unit_dims: dict[int, tuple[int, ...]] = field(default_factory=dict)
    unit_orders: dict[float, None] = field(default_factory=dict)
    acted: Counter[int] = field(default_factory=Counter)
    unknown: set[int] = field(default_factory=set)
    unit_prefix: dict[int, list[UnitPolicy]] = field(default_factory=dict)
    unit_later: set[int] = field(default_factory=set)
    late_clamps: dict[int, tuple[int, ...]] = field(default_factory=dict)


def report_order(policy: Policy, parameters: Sequence[ParameterInfo]) -> float:
    """Order of the norms in the report: that of the first policy that scales by one, else 2."""
    for stage in stages(policy, parameters):
        if isinstance(stage.policy, ClampingPolicy):
            continue  # it may read the largest element, which is nobody's idea of a norm
        for order in sorted(stage.policy.needs.gradient_norms):
            return order
    return 2.0


def compile_passes(
    policy: Policy,
    parameters: Sequence[ParameterInfo],
    plan: Plan,
    *,
    norms: bool,
    watch_nonfinite: bool,
) -> tuple[Pass, ...]:
    """The passes of ``policy`` over ``parameters``.

    Args:
        policy: plain or composed.
        parameters: one info per entry of the plan's table, in the same order.
        plan: the parameters, and the pieces of them on this rank.
        norms: whether the report's norms are wanted.
        watch_nonfinite: whether non-finite gradients have to be noticed on all ranks.
    """
    drafts = [_Draft()]
    for stage in stages(policy, parameters):
        if stage.members:
            if _needs_new_pass(stage, parameters, drafts[-1]):
                drafts.append(_Draft())
            _add(stage, parameters, plan.entries, drafts[-1])
    shown = report_order(policy, parameters)
    result = []
    for position, draft in enumerate(drafts):
        first, last = position == 0, position == len(drafts) - 1
        wanted = (first and (norms or watch_nonfinite)) or (last and norms)
        order = shown if wanted else None
        result.append(_finished(draft, parameters, plan, order, first, reported=norms))
    return tuple(result)


def _unit_dims(stage: Stage, parameters: Sequence[ParameterInfo], member: int) -> tuple[int, ...]:
    policy = stage.policy
    return policy.unit_dims(parameters[member]) if isinstance(policy, UnitPolicy) else ()


def _needs_new_pass(stage: Stage, parameters: Sequence[ParameterInfo], draft: _Draft) -> bool:
    if stage.policy.needs.gradient_norms and not draft.unknown.isdisjoint(stage.members):
        return True
    return any(
        dims and draft.unit_dims.get(member, dims) != dims
        for member in stage.members
        if (dims := _unit_dims(stage, parameters, member))
    )


def _add(
    stage: Stage,
    parameters: Sequence[ParameterInfo],
    entries: Sequence[Entry],
    draft: _Draft,
) -> None:
    draft.stages.append(stage)
    if isinstance(stage.policy, ClampingPolicy):
        _add_clamp(stage, stage.policy, entries, draft)
        return
    if not isinstance(stage.policy, UnitPolicy) and not hasattr(stage.policy, "update"):
        raise ConfigurationError(
            f"{stage.policy!r} decides nothing: its class defines no `update`; derive it from "
            f"policies.ScalingPolicy (update), ClampingPolicy (bound or update_bound) or "
            f"UnitPolicy (unit_dims and unit_coefficients)"
        )
    for member in stage.members:
        dims = _unit_dims(stage, parameters, member)
        if dims and isinstance(stage.policy, UnitPolicy):
            draft.unit_dims[member] = dims
            draft.unit_orders[stage.policy.norm_type] = None
            prefix = draft.unit_prefix.setdefault(member, [])
            if draft.acted[member] == len(prefix):
                prefix.append(stage.policy)
            else:
                draft.unit_later.add(member)
        draft.acted[member] += 1


def _add_clamp(
    stage: Stage, policy: ClampingPolicy, entries: Sequence[Entry], draft: _Draft
) -> None:
    for member in stage.members:
        if entries[member].dtype.startswith("complex"):
            raise ConfigurationError(
                f"{policy.name}: parameter {entries[member].name!r} is complex, and "
                f"complex numbers have no order to clamp by; leave it out (in a policy with "
                f"policies.by_name({{{entries[member].name!r}: None}}, ...))"
            )
    late = tuple(m for m in stage.members if policy.moving or draft.acted[m])
    draft.unknown.update(late)
    draft.late_clamps[len(draft.stages) - 1] = late
    draft.acted.update(late)  # whatever clamps them next has to come after this
    if policy.moving:
        return
    bound = _constant(policy)
    for member in set(stage.members) - set(late):
        draft.bounds[member] = min(bound, draft.bounds.get(member, bound))


def _constant(policy: ClampingPolicy) -> float:
    bound = getattr(policy, "bound", None)
    if bound is None:
        raise ConfigurationError(
            f"{policy!r} clamps to nothing: its class defines neither `bound`, a number, nor "
            f"update_bound(statistics, state); define one of them"
        )
    if isinstance(bound, (bool, str)) or not isinstance(bound, (int, float)) or not bound >= 0:
        raise ConfigurationError(
            f"{policy!r}: `bound` must be a number >= 0, known before the first step, got "
            f"{bound!r}; a bound that changes is what update_bound(statistics, state) returns"
        )
    return float(bound)


def _finished(
    draft: _Draft,
    parameters: Sequence[ParameterInfo],
    plan: Plan,
    shown: float | None,
    first: bool,
    *,
    reported: bool,
) -> Pass:
    local = {
        member: tuple(prefix)
        for member, prefix in draft.unit_prefix.items()
        if prefix
        and member not in draft.unit_later
        and set(plan.entries[member].split_dims) <= set(draft.unit_dims[member])
    }
    orders: dict[float, None] = {} if shown is None else {shown: None}
    weight_orders: dict[float, None] = {}
    weighted: set[int] = set()
    reads = False
    whole: dict[int, tuple[int, ...]] = {}
    divided: dict[int, tuple[int, ...]] = {}
    for position, stage in enumerate(draft.stages):
        plain = tuple(m for m in stage.members if not _unit_dims(stage, parameters, m))
        if isinstance(stage.policy, UnitPolicy):
            # Another stage may look at units of these parameters: whose dims count is the stage's.
            whole[position] = plain
            done = {*plain, *local}
            divided[position] = tuple(m for m in stage.members if m not in done)
        if not plain:
            reads = reads or any(m not in local for m in stage.members)
            continue
        orders.update(dict.fromkeys(sorted(stage.policy.needs.gradient_norms)))
        reads = reads or bool(stage.policy.needs.gradient_norms) or stage.policy.needs.loss
        if stage.policy.needs.weight_norms:
            weight_orders.update(dict.fromkeys(sorted(stage.policy.needs.weight_norms)))
            weighted.update(plain)
    # Autograd may leave the gradient of a replicated tensor Partial. To reduce it takes all ranks
    # of the mesh, and one that lacks it has to hear of it: a flag travels, whatever else does.
    moves = first and any(entry.replicated for entry in plan.entries)
    request = Request(
        orders=tuple(orders),
        weight_orders=tuple(weight_orders),
        weighted=frozenset(weighted),
        unit_dims=dict(draft.unit_dims),
        decided_locally=frozenset(local),
        deciding_orders=tuple(draft.unit_orders),
        bounds=dict(draft.bounds),
        raw_orders=(shown,) if shown is not None and first and draft.bounds else (),
        # What each rank decides on units of its own, all have to know for the report.
        reduced=reads or shown is not None or moves or (reported and bool(local)),
        loss=any(stage.policy.needs.loss for stage in draft.stages),
    )
    survey = Survey.of(plan, request, local)
    return Pass(tuple(draft.stages), survey, local, dict(draft.late_clamps), whole, divided)
