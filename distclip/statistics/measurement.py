"""Measuring this rank's pieces: norms of gradients and weights, as wholes and by units."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import NoneType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.common.exponents import COLUMNS
from distclip.errors import DistclipError
from distclip.kernels import measuring
from distclip.kernels.exponents import Counting
from distclip.kernels.look import Look, positions_there
from distclip.layouts import soundness, sparse
from distclip.layouts.fetching import Fetched
from distclip.layouts.piece import MisplacedError
from distclip.layouts.plan import Plan
from distclip.statistics.early import Early
from distclip.statistics.scratch import Scratch
from distclip.statistics.survey import Local, Survey
from distclip.statistics.units import Segments

OptionalTensors: TypeAlias = Sequence[Tensor | None]

_shape = operator.attrgetter("shape")


def measure_locally(
    survey: Survey,
    scratch: Scratch,
    early: Early | None = None,
    fetched: Fetched | None = None,
) -> Local:
    """Measure this rank's pieces, but for what came ``early``. Issues no collective.

    Args:
        survey: what is measured.
        scratch: what is remembered of the gradients.
        early: what was measured during backward.
        fetched: the gradients, where they have been fetched already.
    """
    plan, request = survey.plan, survey.request
    local = Local()
    if fetched is None:
        fetched = scratch.fetch(plan) or Fetched(_fetched(plan, local), None)
    _inspect(survey, fetched, local, scratch)
    weights: OptionalTensors = ()
    if request.weight_orders or request.unit_dims:
        weights = _weights(survey, local)
        everything = local.seen is not None and len(local.seen.tensors) == len(plan.pieces)
        if everything and survey.weighs_all:
            local.seen_weights = scratch.known_weights(weights)
    counting = Counting(len(plan.pieces), plan.device) if request.exponents else None
    if request.unit_dims:
        _measure_units(survey, weights, local, scratch, early, counting)
    _measure_norms(survey, local, scratch, early, counting)
    if counting is not None:
        local.exponents = _exponents(plan, local, scratch, counting)
    if request.weight_orders:
        _measure_weights(survey, weights, local, scratch)
    return local


def kept_by_clamps(
    bounds: npt.NDArray[np.float64], raw: Tensor, counted: Sequence[int] | None
) -> npt.NDArray[np.bool_]:
    """Bool ``(pieces,)``: those that their clamp is known to leave as they are.

    Args:
        bounds: float64 ``(pieces,)``.
        raw: float64 ``(pieces,)``, norms on the host; 0 where there is no gradient.
        counted: the pieces that were measured, where there may be a gradient of another.
    """
    # No element is larger than a norm of the whole, but for what the norm was rounded by.
    kept: npt.NDArray[np.bool_] = raw.numpy() <= bounds * (1.0 - 2.0**-40)
    if counted is not None:
        others = np.ones(len(kept), bool)
        others[list(counted)] = False
        kept[others] = False
    return kept


def counted_in(
    survey: Survey, gradients: OptionalTensors, seen: Look
) -> tuple[Look, Sequence[int] | None]:
    """The gradients that are measured as a whole and counted by this rank, out of a look at all.

    Returns:
        The look at those that are there; and their places among all, None where they are all.
    """
    here = positions_there(gradients) if len(seen.tensors) < len(gradients) else None
    if survey.counted is None:
        return seen, here
    if here is None:
        return seen.at(survey.counted), survey.counted
    counted = set(survey.counted)
    numbers = tuple(number for number, place in enumerate(here) if place in counted)
    return seen.at(numbers), [here[number] for number in numbers]


def set_name(survey: Survey) -> str:
    """Which of the sets of tensors in the tables those are that are measured as a whole."""
    return "gradients" if survey.counted is None else "counted gradients"


def _fetched(plan: Plan, local: Local) -> list[Tensor | None]:
    """The gradient of every piece, asked one by one; what cannot be measured is noted."""
    present: list[Tensor | None] = []
    for piece in plan.pieces:
        try:
            present.append(piece.gradient())
        except DistclipError as trouble:
            present.append(None)
            local.trouble = local.trouble or trouble
        except MisplacedError:
            present.append(None)
            local.misplaced = True
    return present


def _inspect(survey: Survey, fetched: Fetched, local: Local, scratch: Scratch) -> None:
    """Note what of the fetched gradients is measured and acted on, and what is wrong."""
    gradients, seen = fetched
    first = not scratch.has_inspected(gradients) or _have_other_units(survey, gradients)
    local.present, trouble, local.seen = soundness.inspect(
        survey.plan, gradients, seen, first=first, changed=not scratch.only_measures
    )
    if local.seen is not None:
        scratch.learn(local.seen, len(gradients))
    if trouble is None and first:
        scratch.inspected.update(positions_there(gradients))
    local.trouble = local.trouble or trouble
    if local.present is not gradients:  # something unusual was found, or looked for
        local.sparse = any(each is not None and sparse.is_sparse(each) for each in gradients)


def _have_other_units(survey: Survey, gradients: OptionalTensors) -> bool:
    """Whether a gradient that is measured per unit has another shape than its piece."""
    table = survey.table
    if not table.positions:
        return False
    of_units = table.of(gradients)
    if NoneType not in set(map(type, of_units)):
        return list(map(_shape, of_units)) != table.shapes
    pairs = zip(of_units, table.shapes, strict=True)
    return any(each is not None and each.shape != shape for each, shape in pairs)


def _weights(survey: Survey, local: Local) -> OptionalTensors:
    """The local weights of every piece whose weights are measured; none where the step is lost."""
    plan, request = survey.plan, survey.request
    if local.trouble is not None:
        return [None] * len(plan.pieces)
    at_once = plan.fetching.weights()
    if at_once is not None:
        return at_once
    weights: list[Tensor | None] = []
    for piece, gradient in zip(plan.pieces, local.present, strict=True):
        wanted = piece.index in request.weighted or piece.index in request.unit_dims
        read = wanted and (piece.trainable or gradient is not None)
        try:
            weights.append(piece.weight() if read else None)
        except DistclipError as trouble:
            weights.append(None)
            local.trouble = local.trouble or trouble
    return weights


def _measure_norms(
    survey: Survey,
    local: Local,
    scratch: Scratch,
    early: Early | None,
    counting: Counting | None,
) -> None:
    """Norms of whole gradients; where units are measured, from the norms of the units."""
    plan, request, table = survey.plan, survey.request, survey.table
    counted, seen = _counted(survey, local.present, local.seen)
    bounds = survey.bounds
    if early is not None:
        counted, seen = early.rest(counted, range(len(counted))), None
    for order in request.orders:
        if bounds is not None:
            norms = _as_clamped(survey, counted, order, bounds, local, scratch, seen)
        elif len(table.positions) == len(plan.pieces):
            norms = torch.zeros(len(plan.pieces), dtype=torch.float64, device=plan.device)
        else:
            norms = measuring.norms(
                counted,
                order,
                device=plan.device,
                tables=scratch.tables,
                what=set_name(survey),
                seen=seen,
                counting=None if local.sparse else counting,
            )
            if early is not None:
                early.insert(norms, order)
        if table.positions:
            units = local.unit_norms[order]
            whole = piece_norms(plan, units, table.local, table.index, order)
            norms.index_copy_(0, table.index, whole)
            if order in local.raw:
                units = local.raw_units[order]
                whole = piece_norms(plan, units, table.local, table.index, order)
                local.raw[order].index_copy_(0, table.index, whole)
        local.norms[order] = norms


def _as_clamped(
    survey: Survey,
    counted: OptionalTensors,
    order: float,
    bounds: npt.NDArray[np.float64],
    local: Local,
    scratch: Scratch,
    seen: Look | None,
) -> Tensor:
    """Norms as if clamped; notes those as they are, and on the host which clamps do nothing."""
    plan, request = survey.plan, survey.request
    norms, raw = measuring.clamped_norms(
        counted,
        order,
        bounds,
        device=plan.device,
        raw=order in request.raw_orders,
        tables=scratch.tables,
        what=set_name(survey),
        seen=seen,
    )
    if raw is not None and order in request.raw_orders:
        local.raw[order] = raw
    if raw is not None and plan.device.type == "cpu":
        all_here = counted is local.present
        local.kept = kept_by_clamps(bounds, raw, None if all_here else positions_there(counted))
    return norms


def _counted(
    survey: Survey, present: OptionalTensors, seen: Look | None
) -> tuple[OptionalTensors, Look | None]:
    """The gradients that are measured as a whole and counted by this rank; None for all others.

    And the look at those that are there, out of the look at all.
    """
    if survey.counted is None:
        return present, seen
    places = set(survey.counted)
    counted = [each if place in places else None for place, each in enumerate(present)]
    return counted, None if seen is None else counted_in(survey, present, seen)[0]


def _exponents(plan: Plan, local: Local, scratch: Scratch, counting: Counting) -> Tensor:
    """The counted elements of each parameter here by binary exponent; of zeros with trouble."""
    table = torch.zeros((len(plan.entries), COLUMNS), dtype=torch.float64, device=plan.device)
    if local.trouble is not None:
        return table
    present, seen = local.dense(plan), None if local.sparse else local.seen
    if plan.shares is not None:
        pairs = zip(plan.pieces, present, strict=True)
        present, seen = [each if piece.share else None for piece, each in pairs], None
    rows = counting.rest(present, scratch.tables, seen)
    if plan.shares is not None:
        rows = rows * plan.shares.unsqueeze(1)
    return rows if plan.rows is None else table.index_add_(0, plan.rows, rows)


def _measure_weights(
    survey: Survey, weights: OptionalTensors, local: Local, scratch: Scratch
) -> None:
    """Norms of the weights as wholes."""
    plan, request = survey.plan, survey.request
    counted: list[Tensor | None] = [
        weight
        if piece.index in request.weighted
        and piece.share > 0.0
        and (piece.trainable or gradient is not None)
        else None
        for piece, weight, gradient in zip(plan.pieces, weights, local.present, strict=True)
    ]
    for order in request.weight_orders:
        local.weights[order] = measuring.norms(
            counted,
            order,
            device=plan.device,
            tables=scratch.tables,
            what="weights",
            seen=None if local.seen_weights is None else local.seen_weights.at(survey.weighted),
        )


def _measure_units(
    survey: Survey,
    weights: OptionalTensors,
    local: Local,
    scratch: Scratch,
    early: Early | None,
    counting: Counting | None,
) -> None:
    """Norms of all units on this rank, of each order a vector, and of the weights of some.

    Those of the units that are decided on here are measured when they are. Pieces of a replica that
    is counted elsewhere have the norm 0, unless they are decided here.
    """
    plan, request, table = survey.plan, survey.request, survey.table
    gradients, weighted = table.of(local.dense(plan)), table.of(weights)
    seen = None if local.sparse else table.seen(local.seen)
    if table.uncounted or (seen is None and NoneType in set(map(type, gradients))):
        seen = None
        gradients = [None if n in table.uncounted else each for n, each in enumerate(gradients)]
        local.missing = [number for number, each in enumerate(gradients) if each is None]
        # Of a unit cut across ranks the weight counts even where this rank's gradient is missing.
        unread = {n for n in local.missing if n < table.decided or not table.trainable[n]}
        unread |= table.uncounted
        weighted = [None if n in unread else each for n, each in enumerate(weighted)]
    bounds = None if survey.bounds is None else survey.bounds[list(table.positions)]

    def of_gradients(order: float, *, raw: bool = False) -> Tensor:
        return measuring.unit_norms(
            late,
            table.dims,
            table.local.counts,
            order,
            bounds,
            raw=raw,
            device=plan.device,
            tables=scratch.tables,
            what="gradients of units",
            seen=seen,
            counting=of_units,
        )

    of_units = None if counting is None else Counting(len(gradients), plan.device)
    late = gradients if early is None else early.rest(gradients, table.positions)
    seen = seen if early is None else None
    for order in request.unit_orders:
        local.unit_norms[order] = of_gradients(order)
        if early is not None:
            early.insert_units(local.unit_norms[order], order)
        if bounds is not None and order in request.raw_orders:
            local.raw_units[order] = of_gradients(order, raw=True)
    if counting is not None and of_units is not None:
        counting.absorb(of_units, table.positions)
    local.deciding = weighted[: table.decided]
    if table.summed.size:
        for order in request.deciding_orders:
            local.unit_weights[order] = measuring.unit_norms(
                weighted[table.decided :],
                table.dims[table.decided :],
                table.local.counts[table.decided :],
                order,
                device=plan.device,
                tables=scratch.tables,
                what="weights of cut units",
                seen=table.seen(local.seen_weights, slice(table.decided, None)),
            )


def piece_norms(
    plan: Plan,
    norms: Tensor,
    units: Segments,
    positions: Tensor,
    order: float,
) -> Tensor:
    """Norms of the pieces at ``positions`` from those of their units; 0 where not counted."""
    whole = measuring.segment_norms(norms, units.lengths, units.counts, order, units.tables)
    if plan.shares is None:
        return whole
    return torch.where(plan.shares[positions] > 0, whole, 0.0)
