"""Gradients that lie otherwise than their parameters, brought there by all ranks together.

Under tensor parallelism autograd may leave a gradient ``Partial``: unreduced terms. Reducing it is
a collective, and a rank on which that gradient is missing cannot know that the others wait for it.
So the ranks first exchange what they have.
"""

from __future__ import annotations

from typing import Any

from distclip.errors import DistclipError, UnsupportedGradientError
from distclip.layouts.piece import Spread
from distclip.layouts.plan import Plan
from distclip.statistics import collectives

MISPLACED = 2.0**-20
"""How much a misplaced gradient adds to the flag that travels; trouble adds 1."""


def align_alone(plan: Plan) -> None:
    """Redistribute what lies otherwise here, where there is no other rank to ask.

    Raises:
        UnsupportedGradientError: a gradient that cannot be reduced.
    """
    for spread in _spread(plan).values():
        found = spread.found()
        if found is not None and found != spread.wanted:
            spread.check()
            spread.align(found)


def cannot_move(plan: Plan) -> UnsupportedGradientError:
    """Why a gradient that lies otherwise is not redistributed in a pass that tells others nothing.

    Of replicated tensors such a gradient is to be expected, and then a flag travels.
    """
    name, found, wanted = next(
        (plan.names[row], found, spread.wanted)
        for row, spread in _spread(plan).items()
        if (found := spread.found()) is not None and found != spread.wanted
    )
    return UnsupportedGradientError(
        f"the gradient of {name!r} is {found} but its parameter {wanted}. Redistributing it takes "
        f"all ranks of its mesh, and this pass, which needs nothing from other ranks, cannot tell "
        f"them: set p.grad = p.grad.redistribute(placements=p.placements) on all of them before "
        f"clipping, or clip in a way that measures norms"
    )


def align_together(plan: Plan, trouble: DistclipError | None = None) -> bool:
    """Redistribute what lies otherwise on any rank, on all ranks of its mesh. Collective.

    A gradient that is missing on a rank counts as zeros there. One that no rank has stays missing.

    Returns:
        Whether any was redistributed; the same on every rank.

    Raises:
        UnsupportedGradientError: one that cannot be reduced, or that lies differently on the ranks
            of one mesh; on every rank, before any is touched.
    """
    assert plan.group is not None
    parameters = _spread(plan)
    mine: dict[int, Any] = {} if trouble is None else {-1: str(trouble)}
    for row, spread in parameters.items():
        found = spread.found()
        try:
            spread.check()
        except DistclipError as error:  # told to all: the others would wait for this rank
            mine[row] = str(error)
            continue
        if found is not None:
            mine[row] = (spread.ranks, found, found != spread.wanted)
    everybody = collectives.gather(mine, plan.group)
    moves: dict[tuple[int, object], object] = {}
    for there in everybody:
        for row, entry in there.items():
            if isinstance(entry, str):
                raise UnsupportedGradientError(entry)
            mesh, found, moved = entry
            if moved:
                moves[row, mesh] = found
    for rank, there in zip(collectives.ranks_of(plan.group), everybody, strict=True):
        for row, entry in there.items():
            wanted = moves.get((row, entry[0]))
            if wanted is not None and entry[1] != wanted:
                raise UnsupportedGradientError(
                    f"the gradient of {plan.names[row]!r} is {entry[1]} on rank {rank} but "
                    f"{wanted} on other ranks of its mesh; redistribute it alike on all of them"
                )
    for row, spread in parameters.items():
        wanted = moves.get((row, spread.ranks))
        if wanted is not None:
            spread.align(wanted)
    return bool(moves)


def _spread(plan: Plan) -> dict[int, Spread]:
    """Table row -> what moves its gradient, of those with a piece here, in table order."""
    return {piece.index: piece.spread for piece in plan.pieces if piece.spread is not None}
