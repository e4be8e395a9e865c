"""One walk down the street: measure, reduce, decide, act."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from distclip.engine.acting import Acting, pairs
from distclip.engine.agreement import Agreed
from distclip.engine.ledger import Ledger
from distclip.engine.program import Program, States
from distclip.engine.replicas import ReplicaCheck
from distclip.engine.units import decide_locally
from distclip.engine.walked import Walked
from distclip.errors import DistclipError, NonFiniteGradientError, UnsupportedGradientError
from distclip.kernels import changing
from distclip.layouts.fetching import Fetched
from distclip.layouts.plan import Plan
from distclip.options import Looks
from distclip.policies.decide import rehearse
from distclip.statistics import collectives
from distclip.statistics.alignment import align_alone, align_together, cannot_move
from distclip.statistics.measurement import LocalMeasurement, measure
from distclip.statistics.packing import LocalDecision, Measurement, Stamp, reduce
from distclip.statistics.request import Request

NOTHING_MORE = Looks()

Fold: TypeAlias = Callable[[float | Tensor | None], bool]


def walk(
    program: Program,
    states: States,
    *,
    on_nonfinite: str = "pass",
    loss_scale: Tensor | None = None,
    replicas: ReplicaCheck | None = None,
    trouble: DistclipError | None = None,
    agreed: Agreed | None = None,
    loss: Tensor | None = None,
    later: bool = False,
    fold: Fold | None = None,
    harmless: bool = False,
    fetched: Fetched | None = None,
    go_on: str = "",
    looks: Looks = NOTHING_MORE,
) -> Walked:
    """Measure, decide and act once over all the gradients of a plan.

    Args:
        program: the compiled policy.
        states: state per stage path; left as it is, the new one is in the result.
        on_nonfinite: ``"pass"``, ``"zero"``, ``"skip"`` or ``"error"``.
        loss_scale: 0-dim; the gradients are this many times too large, and stay so.
        replicas: what is to be compared between the ranks this time; reads on the host.
        trouble: what is wrong on this rank already; raised when all ranks have heard of it.
        agreed: what has to be the same on every rank in this step.
        loss: float64 ``(2,)``, the sum of this rank's losses and their number; for a policy that
            reads the loss.
        fold: asked to multiply everything by one number in place of the last pass; says whether it
            does. Given None where there is no such number.
        harmless: under ``"skip"``, set all gradients to 0 where one is not finite, for a caller who
            steps without having read whether to.
        later: leave what the last pass decides to ``Walked.apply``, for engines that step with
            other tensors than the measured ones. Dropping and earlier passes act here.
        fetched: the gradients, where they have been fetched already.
        go_on: how the caller's user may go on without an error where a gradient is not finite.
        looks: what is measured for the report alone; alike on all ranks.

    Raises:
        RankMismatchError: ranks differ in what is agreed; on every rank, before any changes.
        ReplicaDriftError: copies differ; on every rank, before any changes.
        DistclipError: a gradient that cannot be measured, on every rank, before any changes.
        NonFiniteGradientError: under ``"error"``, on every rank, before any changes.
    """
    # Long: the order of one step, in which every line depends on those before it.
    walked = Walked(program, states)
    _rehearse(program, states)
    for number, one in enumerate(program.passes):
        request = one.request
        if number == 0:
            request = _with(looks, request, program)
        if loss_scale is not None and request.bounds:
            factor = float(loss_scale)  # a host sync, for clamping under a loss scale only
            scaled = {member: bound * factor for member, bound in request.bounds.items()}
            request = replace(request, bounds=scaled)
        # Where a value is read on the host anyway, or has to be. Elsewhere the raising rank ends
        # the run.
        reads = (
            program.plan.device.type == "cpu" or on_nonfinite == "error" or program.plan.replicated
        )
        together = reads and request.reduced and program.plan.group is not None
        comparing = replicas if number == 0 else None
        stamp = None if agreed is None or number else agreed.stamp
        measured, decided, measurement, packed = _measured(
            program,
            number,
            request,
            loss_scale,
            comparing,
            stamp,
            together=together,
            trouble=trouble,
            loss=loss,
            fetched=None if number else fetched,
        )
        if comparing is not None and packed is not None:
            measurement = _compare_replicas(comparing, packed, stamp, measured, measurement)
        raise_together(measured.trouble, measurement.read_flags[0] if reads else None)
        if agreed is not None and stamp is not None:
            agreed.judge(measurement)
        ledger = Ledger(program, number, measurement)
        if number == 0 and measurement.raw:
            _look_for_nonfinite(program, walked, measurement, measured, on_nonfinite, go_on)
        if number == 0:
            walked.exponents = measurement.exponents
            walked.weights = measurement.weights.get(program.shown) if looks.ratios else None
        bad = walked.nonfinite is not program.all_finite
        if bad and on_nonfinite == "zero":
            ledger.forget(walked.nonfinite)
        for position, stage in enumerate(one.stages):
            state = states.get(stage.path, {})
            walked.states[stage.path] = ledger.run(position, stage, state)
        walked.absorb(ledger)
        flags = walked.nonfinite if bad and on_nonfinite == "zero" and number == 0 else None
        acting = Acting(program, decided, ledger, walked.skipped, flags)
        if flags is not None:
            acting.drop(pairs(measured))
        last = number == len(program.passes) - 1
        if later and last:
            walked.apply = acting
        elif not acting.is_idle() and not (fold and last and fold(acting.factor())):
            acting.on(measured, loss_scale)
    found = walked.nonfinite is not program.all_finite
    walked.undo(states, dropped=found and on_nonfinite == "skip")
    if found and harmless:
        gradients = [gradient for _, gradient in pairs(measured)]
        changing.zero_(gradients, walked.nonfinite.any().expand(len(gradients)))
    return walked


def _with(looks: Looks, request: Request, program: Program) -> Request:
    """The request of the first pass, with what is measured for the report alone."""
    if looks.ratios:
        request = request.with_weights(program.shown, len(program.parameters))
    return request.with_exponents() if looks.exponents else request


def _rehearse(program: Program, states: States) -> None:
    """Once: no pass may act before it is known that the policies of later passes are sound."""
    if len(program.passes) > 1 and "rehearsed" not in program.memory.habits:
        for stage in (stage for one in program.passes[1:] for stage in one.stages):
            infos = [program.parameters[member] for member in stage.members]
            rehearse(stage.policy, infos, states.get(stage.path, {}), program.plan.device)
        program.memory.habits.add("rehearsed")


def _measured(
    program: Program,
    number: int,
    request: Request,
    loss_scale: Tensor | None,
    comparing: ReplicaCheck | None,
    stamp: Stamp | None,
    *,
    together: bool,
    trouble: DistclipError | None,
    loss: Tensor | None,
    fetched: Fetched | None,
) -> tuple[LocalMeasurement, LocalDecision, Measurement, Tensor | None]:
    """Measure and reduce; a second time where gradients had to be brought into place first."""
    plan, table, habits = program.plan, program.tables[number], program.memory.habits
    if number == 0 and "misplaced" in habits and together:
        align_together(plan)  # as at the steps before: then once is enough
        fetched = None
    overlap = program.memory.overlap if number == 0 else None
    while True:
        early = None if overlap is None else overlap.take()
        measured = measure(plan, request, table, program.memory, early, fetched)
        if measured.misplaced and not together:
            if plan.group is None:
                align_alone(plan)
                measured = measure(plan, request, table, program.memory)
            else:  # ranks that lack this gradient would not come along
                measured.trouble = measured.trouble or cannot_move(plan)
        measured.trouble = measured.trouble or trouble
        if request.loss:
            measured.loss = program.no_loss if loss is None else loss
        if loss_scale is not None:
            measured.divide(loss_scale.double().to(plan.device))
        tables, nothing = program.memory.tables, program.nothing_decided
        decided = decide_locally(plan, request, table, measured, tables, nothing)
        packed = None
        if comparing is not None:
            packed = comparing.pack(measured.dense(plan), measured.trouble is not None)
        measurement = reduce(plan, request, table, measured, decided, packed, stamp)
        if not together or not 0.0 < measurement.read_flags[0] < 1.0:
            return measured, decided, measurement, packed
        align_together(plan)
        fetched = None
        habits.add("misplaced")


def _compare_replicas(
    comparing: ReplicaCheck,
    packed: Tensor,
    stamp: Stamp | None,
    measured: LocalMeasurement,
    measurement: Measurement,
) -> Measurement:
    """Judge what was summed along, or sum it where nothing travelled; with the flags of all."""
    summed = measurement.passengers
    if summed is None:
        summed, flags = comparing.exchange(packed, stamp)
        measurement = replace(measurement, flags=flags)
    raise_together(measured.trouble, summed[-1].item())
    comparing.judge(summed, measured.dense(comparing.plan))
    return measurement


def _look_for_nonfinite(
    program: Program,
    walked: Walked,
    measurement: Measurement,
    measured: LocalMeasurement,
    on_nonfinite: str,
    go_on: str,
) -> None:
    """Note which gradients have a norm that is not finite, and do what the mode says about it."""
    walked.raw, walked.in_range = (
        measurement.raw.get(program.shown, walked.raw),
        measurement.in_range,
    )
    if program.plan.device.type == "cpu" or on_nonfinite == "error":
        # One read of the host. Norms are not negative: their sum is finite if all of them are.
        sums = [norms.sum() for norms in measurement.raw.values()]
        if all(math.isfinite(total.item()) for total in sums):
            return
    for norms in measurement.raw.values():
        walked.nonfinite = walked.nonfinite | ~torch.isfinite(norms)
    if on_nonfinite == "zero":
        walked.raw = torch.where(walked.nonfinite, 0.0, walked.raw)
    elif on_nonfinite == "skip":
        walked.skipped = walked.nonfinite.any()
    elif on_nonfinite == "error":
        flags = walked.nonfinite.tolist()
        if not any(flags):  # norms so large that only their sum overflows
            return
        holds = _hold_nonfinite(program.plan, measured.present).tolist()
        raise _nonfinite_error(program.plan, flags, holds, tuple(measurement.raw), go_on)


def _hold_nonfinite(plan: Plan, present: Sequence[Tensor | None]) -> Tensor:
    """Bool ``(parameters,)``: whether any rank has a NaN or inf in it. One collective.

    Not for a good step: a finite gradient whose norm float64 cannot hold looks like the others.
    """
    found = torch.zeros(len(plan.entries), dtype=torch.float64, device=plan.device)
    for piece, gradient in zip(plan.pieces, present, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            found[piece.index] = 1.0
    if plan.group is not None:
        collectives.all_reduce_sum(found, plan.group)
    return found > 0


def _nonfinite_error(
    plan: Plan, flags: Sequence[bool], holds: Sequence[bool], orders: Sequence[float], go_on: str
) -> NonFiniteGradientError:
    """Names the parameters with a norm that is not finite: by a NaN or inf in them, or by size."""
    names = [entry.name for entry, bad in zip(plan.entries, flags, strict=True) if bad]
    bad = [entry.name for entry, has in zip(plan.entries, holds, strict=True) if has]
    large = [name for name in names if name not in bad]
    causes = [f"NaN or inf in the gradient of {_listed(bad)}"] if bad else []
    if large:
        norms = " or ".join(f"{order:g}-norm" for order in orders)
        causes.append(
            f"the {norms} of the gradient of {_listed(large)} is larger than float64 holds "
            f"(1.8e308), though every element is finite"
        )
    return NonFiniteGradientError(f"{'; '.join(causes)}; nothing was changed" + go_on, names)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(repr(name) for name in names[:8]) + more


def raise_together(mine: DistclipError | None, anybodys: float | None) -> None:
    """After the all-reduce every rank knows that one of them could not measure: all raise.

    Args:
        mine: what went wrong on this rank.
        anybodys: > 0 if something went wrong on any rank; None: not read on the host.
    """
    if mine is not None:
        raise mine
    if anybodys is not None and anybodys > 0:
        raise UnsupportedGradientError(
            "another rank cannot measure one of its gradients (its own error says which and why); "
            "no gradient was changed on any rank"
        )
