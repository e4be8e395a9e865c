"""What a session logs and warns of when it is opened."""

from __future__ import annotations

import logging

from distclip.application.notices import warn
from distclip.layouts.plan import Plan
from distclip.policies import Policy
from distclip.policies.compose import nearest, unmatched, unmatched_units
from distclip.statistics import collectives
from distclip.statistics.overlap import Overlap

_logger = logging.getLogger("distclip")


def mention_unmatched(policy: Policy, plan: Plan) -> None:
    """Log the patterns of ``by_name`` and ``unit_dims`` that match no parameter.

    Such a pattern is mostly a typing error, or meant for another model. It may also be for other
    parameters of a script that clips by parts: so it is no warning.
    """
    if not collectives.is_first(plan.group):
        return
    found = {
        "by_name": (unmatched(policy, plan.names), "that part of the policy applies to none"),
        "unit_dims": (unmatched_units(policy, plan.names), "these dims are used for none"),
    }
    for where, (patterns, result) in found.items():
        if patterns:
            near = next(filter(None, (nearest(each, plan.names) for each in patterns)), None)
            _logger.warning(
                "%s: no parameter's name matches %s, so %s of the %d parameters here (%s)%s",
                where,
                ", ".join(map(repr, patterns)),
                result,
                len(plan.names),
                ", ".join(plan.names[:3]) + (", ..." if len(plan.names) > 3 else ""),
                "" if near is None else f"; nearest: {near!r}",
            )


def warn_of_no_overlap(early: Overlap) -> None:
    """Warn that ``overlap=True`` has no effect, with the reason where one is known."""
    reasons = early.refused
    warn(
        reasons[0] + ". Until then overlap=True has no effect, and all gradients are measured "
        "at the clip"
        if reasons
        else "overlap=True has no effect here: no gradient comes from FSDP2 (fully_shard), nor "
        "from a DistributedDataParallel module given as target, to the device of the "
        "statistics, so all are measured at the clip, as without it",
    )
