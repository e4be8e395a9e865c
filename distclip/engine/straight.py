"""The straight way of a step that is like the one before it.

:func:`~distclip.engine.walk.walk` asks at every step what may be different in it. Most steps are
alike: one pass, norms of whole gradients on the host, all of them there and of the kinds that they
were. Of those this makes the same records, in the same bits, with a third of the questions.
Whatever is unusual it leaves to the walk, before anything has changed.
"""

from __future__ import annotations

import math

from distclip.engine.acting import Acting
from distclip.engine.ledger import Ledger
from distclip.engine.program import Program, StageStates
from distclip.engine.walk import Terms, walk
from distclip.engine.walked import Walked
from distclip.policies.protocol import combine_norms
from distclip.statistics.again import measured_again
from distclip.statistics.packing import norms_of_all


def straight(program: Program, states: StageStates, terms: Terms) -> Walked:
    """As :func:`~distclip.engine.walk.walk`, which makes the steps that are unusual.

    Whether a rank comes as far as the collective does not matter to the others: it is the one that
    they issue.
    """
    # Where gradients are misplaced at every step, all ranks begin by moving them.
    if not (program.is_simple and _are_usual(terms)) or "misplaced" in program.scratch.habits:
        return walk(program, states, terms)
    one = program.passes[0]
    survey = one.survey
    fetched = terms.fetched or program.scratch.fetch(program.plan)
    local = None if fetched is None else measured_again(survey, program.scratch, fetched)
    if fetched is None or local is None:
        return walk(program, states, terms._replace(fetched=fetched))
    stamp = None if terms.agreed is None else terms.agreed.stamp
    measurement = norms_of_all(survey, local, stamp)
    walked, finite = Walked(program, states), True
    for order, norms in measurement.raw.items():  # one, if any
        walked.raw, walked.in_range = norms, survey.in_range
        total = combine_norms(norms, order, in_range=survey.in_range)
        walked.total_norm, finite = total, math.isfinite(total.item())
        measurement.total = None if survey.request.bounds else total
    if measurement.read_flags[0] or not finite:
        return walk(program, states, terms, (local, measurement))
    if terms.agreed is not None:
        terms.agreed.judge(measurement)
    ledger = Ledger(program, one, measurement)
    for position, stage in enumerate(one.stages):
        walked.states[stage.path] = ledger.run(position, stage, states.get(stage.path, {}))
    walked.absorb(ledger)
    acting = Acting(program, None, local.kept, ledger, walked.skipped, None)
    if not acting.is_idle() and not (terms.fold and terms.fold(acting.factor())):
        acting.on(*fetched, None)
    walked.undo(states, dropped=False)
    return walked


def _are_usual(terms: Terms) -> bool:
    """Whether a step is asked for nothing but to clip by its policy."""
    return not (
        terms.later
        or terms.replicas is not None
        or terms.trouble is not None
        or terms.loss_scale is not None
        or any(terms.looks)
    )
