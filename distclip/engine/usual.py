"""The gradients of a call that decides nothing, in the usual case: without a walk."""

from __future__ import annotations

from torch import Tensor

from distclip.engine.session import Session
from distclip.kernels import measuring
from distclip.kernels.look import Look
from distclip.statistics.again import usual_look


def usual_gradients(session: Session) -> Look | None:
    """A look at all gradients that are there, where nothing about any of them is unusual.

    None where ranks may have to bring gradients into place together, where the gradient of a
    parameter has not been looked at closely before, or where one of them is unusual:
    :meth:`Session.clip` then does so, and says what is wrong.
    """
    plan, scratch = session.plan, session.program.scratch
    if plan.group is not None and session.program.passes[0].survey.request.reduced:
        return None
    fetched = session.fetched = session.fetched or scratch.fetch(plan)
    seen = None if fetched is None else usual_look(plan, scratch, fetched)
    if seen is not None:
        scratch.learn(seen, len(plan.pieces))
    return seen


def usual_norms(session: Session, norm_type: float) -> Tensor | None:
    """The p-norm of each parameter's gradient, float64 ``(parameters,)``; 0 where there is none.

    None as of :func:`usual_gradients`, and where a parameter is not one piece on this rank.
    """
    plan = session.plan
    seen = usual_gradients(session) if plan.one_to_one else None
    if seen is None or session.fetched is None:
        return None
    return measuring.norms(
        session.fetched.gradients,
        norm_type,
        device=plan.device,
        tables=session.program.scratch.tables,
        what="gradients",
        seen=seen,
    )
