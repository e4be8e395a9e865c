"""The gradients of a call that measures nothing, in the usual case: without a walk."""

from __future__ import annotations

from distclip.engine.session import Session
from distclip.kernels.look import Look
from distclip.layouts import soundness


def usual_gradients(session: Session) -> Look | None:
    """A look at all gradients that are there, where nothing about any of them is unusual.

    None where ranks may have to bring gradients into place together, where the gradient of a
    parameter has not been looked at closely before, or where one of them is unusual:
    :meth:`Session.clip` then does so, and says what is wrong.
    """
    plan, scratch = session.plan, session.program.scratch
    if session.program.passes[0].survey.request.reduced:
        return None
    fetched = session.fetched or plan.fetching()
    if fetched is None:
        return None
    fetched = session.fetched = scratch.known(fetched)
    if len(scratch.inspected) < len(plan.pieces):
        here = (place for place, each in enumerate(fetched.gradients) if each is not None)
        if not scratch.inspected.issuperset(here):
            return None
    *_, seen = soundness.inspect(plan, fetched.gradients, fetched.seen, first=False)
    if seen is not None:
        scratch.learn(seen, len(plan.pieces))
    return seen
