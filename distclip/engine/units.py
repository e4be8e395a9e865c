"""Deciding on units: on this rank, where they lie whole on it, and after the reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.measuring import Tables
from distclip.layouts.plan import Plan
from distclip.policies import UnitPolicy
from distclip.statistics.measurement import LocalMeasurement, piece_norms
from distclip.statistics.packing import LocalDecision
from distclip.statistics.request import Request
from distclip.statistics.units import UnitTable

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


def decide_locally(
    plan: Plan,
    request: Request,
    table: UnitTable,
    measured: LocalMeasurement,
    tables: Tables,
    nothing: LocalDecision,
) -> LocalDecision:
    """Decide on the units that lie whole on this rank, so that their outcome travels along.

    Their norms in ``measured`` become those after it, and their weight norms the coefficients: with
    many short rows each such vector is a good part of the gradients' size.

    Args:
        plan: the pieces.
        request: what was measured of them.
        table: where their units lie.
        measured: on this rank.
        tables: remembered by the kernels.
        nothing: what is decided where no unit is.
    """
    whole, units = table.whole, measured.units
    if not request.decided_locally:
        return nothing
    # All ranks send the norms after it, and those on which nothing changes too.
    nothing = replace(nothing, after=dict(measured.norms))
    if not whole.size:
        return nothing
    total = units.weights[request.deciding_orders[0]][: whole.size]
    for key, span in table.runs:
        policies = cast("tuple[UnitPolicy, ...]", key)
        decide(policies, units.norms, units.weights, total, span)
    missing = [number for number in units.missing if number < table.decided]
    if missing:
        total.index_fill_(0, table.units_of(missing), 1.0)
    if plan.device.type == "cpu" and bool((total == 1.0).all()):
        return nothing
    positions = table.index[: table.decided]
    changed = whole.count(total < 1.0)
    if plan.shares is not None:
        changed = changed * plan.shares[positions]
    after = {}
    for order, before in measured.norms.items():
        norms = units.norms[order][: whole.size].mul_(total)
        after[order] = before.index_copy(
            0, positions, piece_norms(plan, norms, whole, positions, tables, order)
        )
    smallest = torch.fmin(nothing.smallest, _smallest(total))
    return LocalDecision(
        total,
        after,
        nothing.clipped.index_add(0, table.parameters[: table.decided], changed),
        smallest,
    )


def _smallest(coefficients: Tensor) -> Tensor:
    """0-dim. A coefficient is NaN where a norm is: it counts for nothing among others."""
    if coefficients.device.type == "cpu":  # without another vector of them
        return torch.tensor(np.fmin.reduce(coefficients.numpy()), dtype=torch.float64)
    return torch.nan_to_num(coefficients, nan=1.0).amin()
