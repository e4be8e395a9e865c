"""Deciding on units: on this rank, where they lie whole on it, and after the reduction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels import measuring
from distclip.kernels.measuring import PlanTables
from distclip.policies import UnitPolicy
from distclip.statistics.measurement import piece_norms
from distclip.statistics.survey import Local, Survey

UNITS_CHUNK = 8192
"""Units decided on at a time on the host: what a policy computes of them fits in the cache."""


def decide(
    policies: Sequence[UnitPolicy],
    norms: Mapping[float, Tensor],
    weights: Mapping[float, Tensor],
    result: Tensor,
) -> Tensor:
    """Coefficients of units by several policies, one after another.

    Args:
        policies: each sees the gradients as scaled by those before it.
        norms: order -> float64 ``(units,)``, norms of the gradients; not changed.
        weights: the same of the weights.
        result: where the coefficients go, float64 ``(units,)``; may be one of ``weights``.
    """
    step = UNITS_CHUNK if result.device.type == "cpu" else max(len(result), 1)
    for start in range(0, len(result), step):
        part = slice(start, start + step)
        result[part] = _decided(policies, norms, weights, part)
    return result


def _decided(
    policies: Sequence[UnitPolicy],
    norms: Mapping[float, Tensor],
    weights: Mapping[float, Tensor],
    part: slice,
) -> Tensor | float:
    """:func:`decide`, on some of the units."""
    total: Tensor | None = None
    for policy in policies:
        order = policy.norm_type
        # After a scaling by c a norm of any order is c times what it was.
        running = norms[order][part] if total is None else norms[order][part] * total
        factors = policy.unit_coefficients(running, weights[order][part])
        total = factors if total is None else total * factors
    return 1.0 if total is None else total


def decide_locally(survey: Survey, local: Local, tables: PlanTables) -> None:
    """Decide on the units that lie whole on this rank, so that their outcome travels along.

    Weights are measured part by part, and the coefficients take the place of the gradients' norms:
    with many short rows a vector of a number for each is a good part of the gradients' size.

    Args:
        survey: what was measured.
        local: on this rank; what is decided is added to it.
        tables: remembered by the kernels.
    """
    plan, table, orders = survey.plan, survey.table, survey.request.deciding_orders
    if not survey.request.decided_locally:
        return
    # All ranks send the norms after it, and those on which nothing changes too.
    local.after = dict(local.norms)
    ones = torch.ones(1 + len(plan.entries), dtype=torch.float64, device=plan.device)
    local.smallest, local.clipped = ones[0], torch.zeros_like(ones[1:])
    if not table.parts:
        return
    whole = table.whole.size
    norms = {order: units[:whole] for order, units in local.unit_norms.items()}
    changed = local.clipped.new_zeros(table.decided)
    weighing = _weighing(survey, local, tables)
    missing = [number for number in local.missing if number < table.decided]
    on_host = plan.device.type == "cpu"
    for part in table.parts:
        weights = {order: next(theirs) for order, theirs in weighing.items()}
        units = {order: each[part.units] for order, each in norms.items()}
        policies = cast("tuple[UnitPolicy, ...]", part.key)
        total = decide(policies, units, weights, weights[orders[0]])
        absent = [each for each in missing if part.numbers.start <= each < part.numbers.stop]
        if absent:
            total.index_fill_(0, table.units_of(absent) - part.units.start, 1.0)
        if not (on_host and _are_ones(total)):
            if local.coefficients is None:
                local.coefficients = norms[orders[0]]
                local.after = {order: each.clone() for order, each in local.norms.items()}
            local.smallest = torch.fmin(local.smallest, _smallest(total))
            changed[part.numbers] = part.segments.count(total < 1.0)
            positions = table.index[part.numbers]
            for order, each in local.after.items():
                after = piece_norms(plan, units[order].mul_(total), part.segments, positions, order)
                each.index_copy_(0, positions, after)
        units[orders[0]].copy_(total)
        del weights, total  # before the next part is measured
    if local.coefficients is None:
        return
    if plan.shares is not None:
        changed = changed * plan.shares[table.index[: table.decided]]
    local.clipped.index_add_(0, table.parameters[: table.decided], changed)


def _weighing(survey: Survey, local: Local, tables: PlanTables) -> dict[float, Iterator[Tensor]]:
    """Order -> norms of the weights of the units of one part of the table after another."""
    plan, table = survey.plan, survey.table
    return {
        order: measuring.unit_norms_by_parts(
            local.deciding,
            table.dims[: table.decided],
            table.whole.counts,
            order,
            [part.numbers for part in table.parts],
            device=plan.device,
            tables=tables,
            what="weights of units",
            seen=table.seen(local.seen_weights, slice(table.decided)),
        )
        for order in survey.request.deciding_orders
    }


def _are_ones(coefficients: Tensor) -> bool:
    """Whether all are 1, of one or more; on the host."""
    least, most = coefficients.aminmax()  # NaN where one is
    return least.item() == 1.0 == most.item()


def _smallest(coefficients: Tensor) -> Tensor:
    """0-dim. A coefficient is NaN where a norm is: it counts for nothing among others."""
    if coefficients.device.type == "cpu":  # without another vector of them
        return torch.tensor(np.fmin.reduce(coefficients.numpy()), dtype=torch.float64, device="cpu")
    return torch.nan_to_num(coefficients, nan=1.0).amin()
