"""Gradients with NaN or inf: who has them, and the error that names them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.errors import NonFiniteGradientError
from distclip.layouts.differences import quoted_names
from distclip.layouts.plan import Plan
from distclip.statistics import collectives
from distclip.statistics.packing import Measurement


def flags_of(measurement: Measurement, *, reads: bool) -> Tensor | None:
    """Bool ``(parameters,)``, which gradients have a norm that is not finite.

    Returns:
        None where none has, as far as that was read.
    """
    if reads and all(map(are_finite, measurement.raw.values())):
        return None
    flags: Tensor | None = None
    for norms in measurement.raw.values():
        bad = ~torch.isfinite(norms)
        flags = bad if flags is None else flags | bad
    return flags


def are_finite(norms: Tensor) -> bool:
    """Whether all of some norms are finite, and no larger than float64 holds of their squares."""
    return math.isfinite(torch.linalg.vector_norm(norms).item())


def error_of(
    plan: Plan,
    flags: Sequence[bool],
    present: Sequence[Tensor | None],
    orders: Sequence[float],
    go_on: str,
) -> NonFiniteGradientError:
    """The error for norms that are not finite: by a NaN or inf in a gradient, or by its size.

    One collective, so every rank calls it.

    Args:
        plan: the parameters.
        flags: which of them have such a norm.
        present: the gradient of each piece here.
        orders: of the norms.
        go_on: how the caller's user may go on without an error.
    """
    holds = _hold_nonfinite(plan, present).tolist()
    names = [entry.name for entry, bad in zip(plan.entries, flags, strict=True) if bad]
    bad = [entry.name for entry, has in zip(plan.entries, holds, strict=True) if has]
    large = [name for name in names if name not in bad]
    causes = [f"NaN or inf in the gradient of {quoted_names(bad, 8)}"] if bad else []
    if large:
        norms = " or ".join(f"{order:g}-norm" for order in orders)
        causes.append(
            f"the {norms} of the gradient of {quoted_names(large, 8)} is larger than float64 holds "
            f"(1.8e308), though every element is finite"
        )
    return NonFiniteGradientError(f"{'; '.join(causes)}; nothing was changed{go_on}", names)


def _hold_nonfinite(plan: Plan, present: Sequence[Tensor | None]) -> Tensor:
    """Bool ``(parameters,)``: whether any rank has a NaN or inf in it. One collective.

    Not for a good step: a finite gradient whose norm float64 cannot hold looks like the others.
    """
    found = torch.zeros(len(plan.entries), dtype=torch.float64, device=plan.device)
    for piece, gradient in zip(plan.pieces, present, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            found[piece.index] = 1.0
    if plan.group is not None:
        collectives.all_reduce_sum(found, plan.group)
    return found > 0
