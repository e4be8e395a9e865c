"""Measuring gradients that are what they were at the step before: without most of the questions."""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.kernels import measuring
from distclip.kernels.look import Look
from distclip.layouts import soundness
from distclip.layouts.fetching import Fetched
from distclip.layouts.plan import Plan
from distclip.statistics.measurement import counted_in, kept_by_clamps, set_name
from distclip.statistics.scratch import Scratch
from distclip.statistics.survey import Local, Survey


def usual_look(plan: Plan, scratch: Scratch, fetched: Fetched) -> Look | None:
    """The look at gradients; None where one may be unusual, or was not looked at closely before."""
    gradients, seen = fetched
    if seen is None or not scratch.has_inspected(gradients):
        return None
    usual = soundness.are_usual(plan, seen, changed=not scratch.only_measures)
    return seen if usual else None


def measured_again(survey: Survey, scratch: Scratch, fetched: Fetched) -> Local | None:
    """:func:`~.measurement.measure_locally`, where gradients are what they were at the step before.

    Of a survey that :attr:`~.Survey.is_plain`; None where something may be unusual.
    """
    (gradients, _), plan, seen = fetched, survey.plan, usual_look(survey.plan, scratch, fetched)
    if seen is None:
        return None
    local, bounds = Local(gradients, seen), survey.bounds
    counted, places = counted_in(survey, gradients, seen)
    index = None if places is None else torch.tensor(places, dtype=torch.long, device=plan.device)

    def of_all(found: Tensor) -> Tensor:
        """A number for each piece, from those of the gradients that were measured."""
        if index is None:
            return found
        return found.new_zeros(len(gradients)).index_copy_(0, index, found)

    tables, what = scratch.tables, set_name(survey)
    for order in survey.request.orders:
        if bounds is None:
            found = measuring.norms_again(counted, order, tables=tables, what=what)
            if found is None:
                return None
            local.norms[order] = of_all(found)
        else:
            some = bounds if places is None else bounds[list(places)]
            both = measuring.clamped_norms_again(counted, order, some, tables=tables, what=what)
            if both is None:
                return None
            local.norms[order], local.raw[order] = map(of_all, both)
            uncounted = survey.counted is not None
            local.kept = kept_by_clamps(bounds, local.raw[order], places if uncounted else None)
    return local
