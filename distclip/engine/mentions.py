"""What a session logs and warns of when it is opened."""

from __future__ import annotations

import logging

from distclip.application.notices import warn
from distclip.layouts.plan import Plan
from distclip.policies import Policy
from distclip.policies.compose import unmatched
from distclip.statistics import collectives
from distclip.statistics.overlap import Overlap

_logger = logging.getLogger("distclip")


def mention_unmatched(policy: Policy, plan: Plan) -> None:
    """Log the patterns of ``by_name`` that match no parameter.

    Such a pattern is mostly a typing error, or meant for another model. It may also be for other
    parameters of a script that clips by parts: so it is no warning.
    """
    patterns = unmatched(policy, plan.names)
    if patterns and collectives.is_first(plan.group):
        _logger.warning(
            "by_name: no parameter's name matches %s, so that part of the policy applies to "
            "none of the %d parameters here (%s)",
            ", ".join(map(repr, patterns)),
            len(plan.names),
            ", ".join(plan.names[:3]) + (", ..." if len(plan.names) > 3 else ""),
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
