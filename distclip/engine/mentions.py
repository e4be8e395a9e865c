"""What a session logs and warns of when it is opened."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.distributed import ProcessGroup

from distclip.application.notices import warn
from distclip.policies import MuonAware, ParameterInfo, Policy
from distclip.policies.compose import nearest, parts_of, unmatched, unmatched_units
from distclip.statistics import collectives
from distclip.statistics.overlap import Overlap

_logger = logging.getLogger("distclip")


def mention_unmatched(
    policy: Policy, parameters: Sequence[ParameterInfo], group: ProcessGroup | None
) -> None:
    """Log the patterns of ``by_name``, ``by_part`` and ``unit_dims`` that match no parameter.

    Such a pattern is mostly a typing error, or meant for another model. It may also be for other
    parameters of a script that clips by parts: so it is no warning.
    """
    if not collectives.is_first(group):
        return
    _mention_nothing_clipped(policy, parameters)
    names = [each.name for each in parameters]
    none = "that part of the policy applies to none"
    found = {
        "by_name": (unmatched(policy, parameters, "by_name"), none),
        "by_part": (unmatched(policy, parameters, "by_part"), none),
        "unit_dims": (unmatched_units(policy, names), "these dims are used for none"),
    }
    for where, (patterns, result) in found.items():
        if patterns:
            near = next(filter(None, (nearest(each, names) for each in patterns)), None)
            _logger.warning(
                "%s: no parameter%s matches %s, so %s of the %d parameters here (%s)%s",
                where,
                "" if where == "by_part" else "'s name",
                ", ".join(map(repr, patterns)),
                result,
                len(names),
                ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
                "" if near is None or where == "by_part" else f"; nearest: {near!r}",
            )


def _mention_nothing_clipped(policy: Policy, parameters: Sequence[ParameterInfo]) -> None:
    """Log that ``muon_aware`` clips nothing, where Muon seems to step all parameters.

    So it is for a clipper of Muon alone, and where it is not seen which parameters of an optimizer
    AdamW steps.
    """
    parts = parts_of(policy, parameters)
    if parameters and isinstance(policy, MuonAware) and not parts.get("default", parameters):
        _logger.warning(
            "muon_aware: as far as the optimizer says, Muon steps all %d parameters here, so none "
            "of them is clipped; what AdamW steps is known by another optimizer, or by use_muon or "
            "algorithm in the parameter groups",
            len(parameters),
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
