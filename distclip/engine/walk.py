"""One walk down the street: measure, reduce, decide, act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from torch import Tensor

from distclip.engine import nonfinite
from distclip.engine.acting import Acting
from distclip.engine.agreement import Agreed
from distclip.engine.ledger import Ledger
from distclip.engine.passes import Pass
from distclip.engine.program import Program, StageStates
from distclip.engine.replicas import ReplicaCheck
from distclip.engine.units import decide_locally
from distclip.engine.walked import Walked
from distclip.errors import DistclipError, UnsupportedGradientError
from distclip.kernels import changing
from distclip.layouts.fetching import Fetched
from distclip.options import Looks
from distclip.statistics.again import measured_again
from distclip.statistics.alignment import align_alone, align_together, cannot_move
from distclip.statistics.measurement import measure_locally
from distclip.statistics.packing import Measurement, reduce
from distclip.statistics.survey import Local, Survey

Fold: TypeAlias = Callable[[float | Tensor | None], bool]


class Terms(NamedTuple):
    """What one step is asked for, beside its policy.

    Attributes:
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
    """

    on_nonfinite: str = "pass"
    loss_scale: Tensor | None = None
    replicas: ReplicaCheck | None = None
    trouble: DistclipError | None = None
    agreed: Agreed | None = None
    loss: Tensor | None = None
    later: bool = False
    fold: Fold | None = None
    harmless: bool = False
    fetched: Fetched | None = None
    go_on: str = ""
    looks: Looks = Looks()


USUAL = Terms()


def walk(program: Program, states: StageStates, terms: Terms = USUAL) -> Walked:
    """Measure, decide and act once over all the gradients of a plan.

    Args:
        program: the compiled policy.
        states: state per stage path; left as it is, the new one is in the result.
        terms: what else is asked for.

    Raises:
        RankMismatchError: ranks differ in what is agreed; on every rank, before any changes.
        ReplicaDriftError: copies differ; on every rank, before any changes.
        DistclipError: a gradient that cannot be measured, on every rank, before any changes.
        NonFiniteGradientError: under ``"error"``, on every rank, before any changes.
    """
    walked = Walked(program, states)
    for one in program.passes:
        going = _Going(one, walked, terms)
        going.measure()
        going.check()
        going.decide(states)
        going.act()
    found = walked.nonfinite is not program.all_finite
    walked.undo(states, dropped=found and terms.on_nonfinite == "skip")
    if found and terms.harmless:
        gradients = [gradient for _, gradient in going.local.pairs()]
        changing.zero_(gradients, walked.nonfinite.any().expand(len(gradients)))
    return walked


class _Going:
    """One pass that is being made.

    Args:
        one: the pass.
        walked: what the passes before it found and did; this one adds to it.
        terms: of the step.

    Attributes:
        local: what was found on this rank.
        measurement: what was found on all ranks.
        ledger: what was decided.
    """

    local: Local
    measurement: Measurement
    ledger: Ledger

    def __init__(self, one: Pass, walked: Walked, terms: Terms) -> None:
        self.program = program = walked.program
        self.one, self.walked, self.terms = one, walked, terms
        self.first, self.last = one is program.passes[0], one is program.passes[-1]
        self.survey = self._survey()
        # Where a value is read on the host anyway, or has to be. Elsewhere the raising rank ends
        # the run.
        plan = program.plan
        self.on_host = plan.device.type == "cpu" or terms.on_nonfinite == "error"
        reads = self.on_host or plan.replicated
        self.together = reads and plan.group is not None and self.survey.request.reduced
        self.comparing = terms.replicas if self.first else None
        self.stamp = terms.agreed.stamp if self.first and terms.agreed is not None else None
        self.packed: Tensor | None = None

    def _survey(self) -> Survey:
        """What is measured in this step; some of it for the report alone."""
        request, looks, scale = self.one.survey.request, self.terms.looks, self.terms.loss_scale
        if self.first and looks.ratios:
            request = request.with_weights(self.program.shown, len(self.program.parameters))
        if self.first and looks.exponents:
            request = request.with_exponents()
        if scale is not None and request.bounds:
            request = request.scaled(float(scale))  # a host sync, for this case only
        return self.one.survey.asking(request)

    def measure(self) -> None:
        """Measure and reduce; a second time where gradients had to be brought into place first."""
        plan, scratch = self.program.plan, self.program.scratch
        fetched = self.terms.fetched if self.first else None
        if self.first and self.together and "misplaced" in scratch.habits:
            # As at the steps before: then once is enough.
            if not align_together(plan, self.terms.trouble):
                scratch.habits.discard("misplaced")
            fetched = None
        elif self._is_usual():
            fetched = fetched or scratch.fetch(plan)
        while True:
            self.local = local = self._measured_again(fetched) or self._measured_here(fetched)
            if self.comparing is not None:
                troubled = local.trouble is not None
                self.packed = self.comparing.pack(local.dense(plan), troubled)
            self.measurement = reduce(self.survey, local, self.packed, self.stamp)
            if not self.together or not 0.0 < self.measurement.read_flags[0] < 1.0:
                return
            align_together(plan)
            fetched = None
            scratch.habits.add("misplaced")

    def _is_usual(self) -> bool:
        """Whether a step of a simple program is asked for nothing but to clip."""
        terms, as_always = self.terms, self.survey is self.one.survey
        asked = self.comparing or terms.trouble or terms.loss_scale is not None
        return self.program.is_simple and as_always and not asked

    def _measured_again(self, fetched: Fetched | None) -> Local | None:
        """What is found on this rank in a usual step whose gradients are what they were before."""
        if fetched is None or not self._is_usual():
            return None
        return measured_again(self.survey, self.program.scratch, fetched)

    def _measured_here(self, fetched: Fetched | None) -> Local:
        """What is found, and decided, on this rank alone."""
        program, terms, survey = self.program, self.terms, self.survey
        plan, scratch = program.plan, program.scratch
        overlap = program.overlap if self.first else None
        early = None if overlap is None else overlap.take()
        local = measure_locally(survey, scratch, early, fetched)
        if local.misplaced and not self.together:
            if plan.group is None:
                align_alone(plan)
                local = measure_locally(survey, scratch)
            else:  # ranks that lack this gradient would not come along
                local.trouble = local.trouble or cannot_move(plan)
        local.trouble = local.trouble or terms.trouble
        if survey.request.loss:
            local.loss = program.no_loss if terms.loss is None else terms.loss
        if terms.loss_scale is not None:
            local.divide(terms.loss_scale.double().to(plan.device))
        decide_locally(survey, local, scratch.tables)
        return local

    def check(self) -> None:
        """Raise, on all ranks alike, what forbids to go on; nothing has been changed."""
        if self.comparing is not None and self.packed is not None:
            self._compare_replicas(self.comparing, self.packed)
        troubled = self.measurement.read_flags[0] if self.together else None
        raise_together(self.local.trouble, troubled)
        if self.stamp is not None and self.terms.agreed is not None:
            self.terms.agreed.judge(self.measurement)
        if self.first and self.measurement.raw:
            self._look_for_nonfinite()

    def _compare_replicas(self, comparing: ReplicaCheck, packed: Tensor) -> None:
        """Judge what was summed along, or sum it where nothing travelled; with the flags of all."""
        summed = self.measurement.passengers
        if summed is None:
            summed, flags = comparing.exchange(packed, self.stamp)
            self.measurement = replace(self.measurement, flags=flags)
        raise_together(self.local.trouble, summed[-1].item())
        comparing.judge(summed, self.local.dense(comparing.plan))

    def _look_for_nonfinite(self) -> None:
        """Note which gradients have a norm that is not finite, or raise."""
        program, walked, measurement = self.program, self.walked, self.measurement
        walked.raw = measurement.raw.get(program.shown, walked.raw)
        walked.in_range = measurement.in_range
        flags = nonfinite.flags_of(measurement, reads=self.on_host)
        if flags is None:
            return
        if self.terms.on_nonfinite == "error":
            read = flags.tolist()
            if any(read):  # otherwise they are so large that only their sum overflows
                orders, present = tuple(measurement.raw), self.local.present
                go_on = self.terms.go_on
                raise nonfinite.error_of(program.plan, read, present, orders, go_on)
            return
        walked.nonfinite = flags
        if self.terms.on_nonfinite == "zero":
            walked.raw = walked.raw.masked_fill(flags, 0.0)
        elif self.terms.on_nonfinite == "skip":
            walked.skipped = flags.any()

    @property
    def _dropped(self) -> Tensor | None:
        """Bool ``(parameters,)``: the gradients that become 0; None where none does."""
        zeroes = self.terms.on_nonfinite == "zero"
        found = self.walked.nonfinite is not self.program.all_finite
        return self.walked.nonfinite if zeroes and found else None

    def decide(self, states: StageStates) -> None:
        """Ask each stage of the pass."""
        walked, measurement = self.walked, self.measurement
        self.ledger = ledger = Ledger(self.program, self.one, measurement)
        if self.first:
            walked.exponents = measurement.exponents
            if self.terms.looks.ratios:
                walked.weights = measurement.weights.get(self.program.shown)
        dropped = self._dropped
        if dropped is not None:
            ledger.forget(dropped)
        for position, stage in enumerate(self.one.stages):
            state = states.get(stage.path, {})
            walked.states[stage.path] = ledger.run(position, stage, state)
        walked.absorb(ledger)

    def act(self) -> None:
        """Change the gradients, or leave that to who is to do it."""
        program, walked, terms = self.program, self.walked, self.terms
        dropped = self._dropped if self.first else None
        local = self.local
        acting = Acting(
            program, local.coefficients, local.kept, self.ledger, walked.skipped, dropped
        )
        if dropped is not None:
            acting.drop(local.pairs())
        fold = terms.fold if self.last else None
        if terms.later and self.last:
            walked.apply = acting
        elif not acting.is_idle() and not (fold and fold(acting.factor())):
            acting.on(local.present, local.seen, terms.loss_scale)


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
