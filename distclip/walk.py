"""One walk down the street: measure, reduce, decide, act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from distclip.application import inplace
from distclip.errors import DistclipError, NonFiniteGradientError, UnsupportedGradientError
from distclip.layouts.plan import Plan
from distclip.ledger import Ledger, Program, Round, States, Walked
from distclip.passes import Pass
from distclip.policies import UnitPolicy
from distclip.statistics.measurement import (
    LocalMeasurement,
    combine_segments,
    measure,
)
from distclip.statistics.packing import LocalDecision, Measurement, reduce


def walk(
    program: Program,
    states: States,
    *,
    on_nonfinite: str = "pass",
    loss_scale: Tensor | None = None,
    later: bool = False,
) -> Walked:
    """Measure, decide and act once over all the gradients of a plan.

    Args:
        program: the compiled policy.
        states: state per stage path; left as it is, the new one is in the result.
        on_nonfinite: ``"pass"``, ``"zero"``, ``"skip"`` or ``"error"``.
        loss_scale: 0-dim; the gradients are this many times too large, and stay so.
        later: leave what the last pass decides to ``Walked.apply``, for engines that step with
            other tensors than the measured ones. Dropping and earlier passes happen here.

    Raises:
        DistclipError: a gradient that cannot be measured, on every rank, before any changes.
        NonFiniteGradientError: under ``"error"``, on every rank, before any changes.
    """
    walked = Walked.start(program, states)
    for number, one in enumerate(program.passes):
        request = one.request
        if loss_scale is not None and request.bounds:
            factor = float(loss_scale)  # a host sync, for clamping under a loss scale only
            scaled = {member: bound * factor for member, bound in request.bounds.items()}
            request = replace(request, bounds=scaled)
        measured = measure(program.plan, request, program.memory)
        if loss_scale is not None:
            measured.divide(loss_scale.double().to(program.plan.device))
        decided = decide_locally(program, one, measured)
        measurement = reduce(program.plan, request, program.tables[number], measured, decided)
        # Where a value is read on the host anyway. Elsewhere the raising rank ends the run.
        reads = program.plan.device.type == "cpu" or on_nonfinite == "error"
        raise_together(measured.trouble, measurement.troubled if reads else None)
        ledger = Ledger(program, number, measurement)
        if number == 0:
            _look_for_nonfinite(program, walked, measurement, on_nonfinite)
        if on_nonfinite == "zero":
            ledger.forget(walked.nonfinite)
        for position, stage in enumerate(one.stages):
            state = states.get(stage.path, {})
            new = ledger.run(position, stage, state)
            if on_nonfinite == "skip":  # a dropped step leaves no trace in any state
                stop = walked.nonfinite.any()
                new = {key: torch.where(stop, state[key], value) for key, value in new.items()}
            walked.states[stage.path] = new
        walked.absorb(ledger)
        present = [(p, g) for p, g in enumerate(measured.present) if g is not None]
        if on_nonfinite == "zero" and number == 0:
            drop(program.plan, present, walked.nonfinite)
        flags = walked.nonfinite if on_nonfinite == "zero" and number == 0 else None
        apply = partial(act, program, decided, ledger, walked.skipped, flags)
        if later and number == len(program.passes) - 1:
            walked.apply = apply
        else:
            apply(present, loss_scale)
    return walked


def _look_for_nonfinite(
    program: Program, walked: Walked, measurement: Measurement, on_nonfinite: str
) -> None:
    """Note which gradients are not finite, and do what the mode says about it."""
    walked.raw = measurement.raw.get(program.shown, walked.raw)
    for norms in measurement.raw.values():
        walked.nonfinite = walked.nonfinite | ~torch.isfinite(norms)
    if on_nonfinite == "zero":
        walked.raw = torch.where(walked.nonfinite, 0.0, walked.raw)
    elif on_nonfinite == "skip":
        walked.skipped = walked.nonfinite.any()
    elif on_nonfinite == "error" and bool(walked.nonfinite.any()):
        flags = walked.nonfinite.tolist()
        names = [e.name for e, bad in zip(program.plan.entries, flags, strict=True) if bad]
        shown = ", ".join(repr(name) for name in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise NonFiniteGradientError(
            f"NaN or inf in the gradient of {shown}{more}; nothing was changed. To go on without "
            f'such steps use on_nonfinite="skip" (or "zero" to drop only these gradients)',
            names,
        )


def raise_together(mine: DistclipError | None, anybodys: Tensor | None) -> None:
    """After the all-reduce every rank knows that one of them could not measure: all raise.

    Args:
        mine: what went wrong on this rank.
        anybodys: one element, > 0 if something went wrong on any rank; read on the host.
    """
    if mine is not None:
        raise mine
    if anybodys is not None and anybodys.item() > 0:
        raise UnsupportedGradientError(
            "another rank cannot measure one of its gradients (its own error says which and why); "
            "no gradient was changed on any rank"
        )


def decide_locally(program: Program, one: Pass, measured: LocalMeasurement) -> LocalDecision:
    """Decide on the units that lie whole on this rank, so that their outcome travels along."""
    plan, units = program.plan, measured.units
    clipped = torch.zeros(len(plan.entries), dtype=torch.float64, device=plan.device)
    smallest = torch.ones((), dtype=torch.float64, device=plan.device)
    if not one.local_units:
        return LocalDecision({}, {}, clipped, smallest)
    after = {order: norms.clone() for order, norms in measured.norms.items()}
    # The pieces that the same policies decide on are decided on together.
    together: dict[tuple[UnitPolicy, ...], list[int]] = {}
    spans = units.spans()
    for number, (position, _) in enumerate(spans):
        policies = one.local_units.get(plan.pieces[position].index)
        if policies is not None:
            together.setdefault(policies, []).append(number)
    coefficients: dict[int, Tensor] = {}
    for policies, numbers in together.items():
        chosen = [spans[number] for number in numbers]
        counts = [units.counts[number] for number in numbers]

        def of(values: Tensor, chosen: list[tuple[int, slice]] = chosen) -> Tensor:
            if len(chosen) == len(spans):
                return values
            return torch.cat([values[span] for _, span in chosen])

        weights = of(units.weights)
        norms = {order: of(values) for order, values in units.norms.items()}
        total = torch.ones_like(weights)
        for policy in policies:
            factors = policy.unit_coefficients(norms[2.0], weights)
            total = total * factors
            norms = {order: values * factors for order, values in norms.items()}
        if total.numel():
            smallest = torch.minimum(smallest, torch.nan_to_num(total, nan=1.0).min())
        positions = [position for position, _ in chosen]
        coefficients.update(zip(positions, torch.split(total, counts), strict=True))
        where = torch.tensor(positions, dtype=torch.long, device=plan.device)
        share = 1.0 if plan.shares is None else plan.shares[where]
        changed = combine_segments((total < 1.0).double(), counts, 1.0) * share
        clipped.index_add_(0, where if plan.rows is None else plan.rows[where], changed)
        for order, values in after.items():
            whole = combine_segments(norms[order], counts, order)
            if plan.shares is not None:
                whole = torch.where(plan.shares[where] > 0, whole, 0.0)
            values[where] = whole
    return LocalDecision(coefficients, after, clipped, smallest)


def drop(plan: Plan, present: Sequence[tuple[int, Tensor]], dropped: Tensor) -> None:
    """Set the gradients of the flagged parameters to 0."""
    if plan.device.type == "cpu" and not bool(dropped.any()):
        return
    rows = torch.tensor([plan.pieces[p].index for p, _ in present], device=plan.device).long()
    inplace.zero_([gradient for _, gradient in present], dropped[rows])


def act(
    program: Program,
    decided: LocalDecision,
    ledger: Ledger,
    skip: Tensor,
    dropped: Tensor | None,
    present: Sequence[tuple[int, Tensor]],
    loss_scale: Tensor | None,
) -> None:
    """Change local gradients as the ledger says.

    Args:
        program: the compiled policy.
        decided: what this rank decided on whole units.
        ledger: what was decided on all ranks.
        skip: 0-dim bool: change nothing.
        dropped: bool ``(parameters,)``, gradients that :func:`drop` has set to 0.
        present: ``(position of the piece in the plan, its gradient)``.
        loss_scale: 0-dim; these gradients are this many times too large.
    """
    plan = program.plan
    on_host = plan.device.type == "cpu"
    if on_host and (bool(skip) or (ledger.is_idle() and _all_one(decided))):
        return
    rows = torch.tensor([plan.pieces[p].index for p, _ in present], device=plan.device).long()
    for number, turn in enumerate(ledger.rounds):
        _clamp(plan, present, turn, loss_scale, None if on_host else skip)
        units = dict(decided.coefficients) if number == 0 else {}
        if turn.units is not None:
            for position, _ in present:
                if plan.pieces[position].index in ledger.table.rows:
                    units[position] = turn.units[ledger.table.place(position)]
        for position, gradient in present:
            if position in units:
                factors = units[position]
                row = plan.pieces[position].index
                if turn.coefficients is not None:
                    factors = factors * turn.coefficients[row]
                if dropped is not None:
                    factors = torch.where(dropped[row], 1.0, factors)
                factors = factors if on_host else torch.where(skip, 1.0, factors)
                inplace.scale_units_(gradient, factors, ledger.one.request.unit_dims[row])
        if turn.coefficients is not None:
            factors = turn.coefficients if on_host else torch.where(skip, 1.0, turn.coefficients)
            whole = [i for i, (position, _) in enumerate(present) if position not in units]
            chosen = rows if len(whole) == len(present) else rows[whole]
            inplace.scale_([present[i][1] for i in whole], factors[chosen])


def _all_one(decided: LocalDecision) -> bool:
    return all(bool((factors == 1.0).all()) for factors in decided.coefficients.values())


def _clamp(
    plan: Plan,
    present: Sequence[tuple[int, Tensor]],
    turn: Round,
    loss_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    clamped = [
        (gradient, turn.bounds[plan.pieces[position].index])
        for position, gradient in present
        if plan.pieces[position].index in turn.bounds
    ]
    if not clamped:
        return
    bounds: list[float | Tensor] = [bound for _, bound in clamped]
    if loss_scale is not None:
        bounds = [bound * loss_scale for bound in bounds]
    if skip is not None:
        bounds = [torch.where(skip, math.inf, bound) for bound in bounds]
    inplace.clamp_([gradient for gradient, _ in clamped], bounds)
