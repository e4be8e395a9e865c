"""Deciding on units: on this rank, where they lie whole on it, and after the reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.measuring import Tables
from distclip.policies import UnitPolicy
from distclip.statistics.measurement import piece_norms
from distclip.statistics.survey import Local, Survey

CHUNK = 4096
"""Units decided on at a time on the host: what a policy computes of them fits in the cache."""


def decide(
    policies: Sequence[UnitPolicy],
    norms: Mapping[float, Tensor],
    weights: Mapping[float, Tensor],
    result: Tensor,
    span: slice = slice(None),
) -> Tensor:
    """Coefficients of units by several policies, one after another.

    Args:
        policies: each sees the gradients as scaled by those before it.
        norms: order -> float64 ``(units,)``, norms of the gradients; not changed.
        weights: the same of the weights.
        result: where the coefficients go, float64 ``(units,)``; may be one of ``weights``.
        span: the units to decide on, of all.
    """
    first, stop, _ = span.indices(len(result))
    step = CHUNK if result.device.type == "cpu" else max(stop - first, 1)
    for start in range(first, stop, step):
        part = slice(start, min(start + step, stop))
        total: Tensor | None = None
        for policy in policies:
            order = policy.norm_type
            # After a scaling by c a norm of any order is c times what it was.
            running = norms[order][part] if total is None else norms[order][part] * total
            factors = policy.unit_coefficients(running, weights[order][part])
            total = factors if total is None else total * factors
        if total is not None:
            result[part] = total
    return result


def decide_locally(survey: Survey, local: Local, tables: Tables) -> None:
    """Decide on the units that lie whole on this rank, so that their outcome travels along.

    Their norms in ``local`` become those after it, and their weight norms the coefficients: with
    many short rows each such vector is a good part of the gradients' size.

    Args:
        survey: what was measured.
        local: on this rank; what is decided is added to it.
        tables: remembered by the kernels.
    """
    plan, table = survey.plan, survey.table
    if not survey.request.decided_locally:
        return
    # All ranks send the norms after it, and those on which nothing changes too.
    local.after = dict(local.norms)
    ones = torch.ones(1 + len(plan.entries), dtype=torch.float64, device=plan.device)
    local.smallest, local.clipped = ones[0], torch.zeros_like(ones[1:])
    whole = table.whole
    if not whole.size:
        return
    total = local.unit_weights[survey.request.deciding_orders[0]][: whole.size]
    for key, span in table.runs:
        policies = cast("tuple[UnitPolicy, ...]", key)
        decide(policies, local.unit_norms, local.unit_weights, total, span)
    missing = [number for number in local.missing if number < table.decided]
    if missing:
        total.index_fill_(0, table.units_of(missing), 1.0)
    if plan.device.type == "cpu" and bool((total == 1.0).all()):
        return
    local.coefficients = total
    local.smallest = torch.fmin(local.smallest, _smallest(total))
    positions = table.index[: table.decided]
    changed = whole.count(total < 1.0)
    if plan.shares is not None:
        changed = changed * plan.shares[positions]
    local.clipped.index_add_(0, table.parameters[: table.decided], changed)
    for order, before in local.norms.items():
        norms = local.unit_norms[order][: whole.size].mul_(total)
        local.after[order] = before.index_copy(
            0, positions, piece_norms(plan, norms, whole, positions, tables, order)
        )


def _smallest(coefficients: Tensor) -> Tensor:
    """0-dim. A coefficient is NaN where a norm is: it counts for nothing among others."""
    if coefficients.device.type == "cpu":  # without another vector of them
        return torch.tensor(np.fmin.reduce(coefficients.numpy()), dtype=torch.float64)
    return torch.nan_to_num(coefficients, nan=1.0).amin()
