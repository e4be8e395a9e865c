"""What is remembered of the gradients and weights of a plan from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from distclip.kernels.look import Kinds, Look, look
from distclip.kernels.measuring import PlanTables
from distclip.layouts.fetching import Fetched
from distclip.layouts.plan import Plan


@dataclass
class Scratch:
    """What is remembered of the gradients from step to step.

    Attributes:
        tables: of the plan's tensors, for the kernels.
        habits: ``"misplaced"`` where gradients had to be redistributed the last time,
            ``"rehearsed"`` once the policies of later passes were tried; the same on every rank.
        inspected: the places of the pieces whose gradients' memory and shape were looked at.
        only_measures: whether nothing is changed, so that memory may be shared.
        kinds: of what kinds the gradients were when every piece had one.
    """

    tables: PlanTables = field(default_factory=PlanTables)
    habits: set[str] = field(default_factory=set)
    inspected: set[int] = field(default_factory=set)
    only_measures: bool = False
    kinds: Kinds | None = None
    _last: Kinds | None = None
    _last_weights: Kinds | None = None

    def learn(self, seen: Look, pieces: int) -> None:
        """Remember of what kinds the gradients are, if each of so many pieces has one."""
        if self.kinds is None and len(seen.tensors) == pieces:
            self.kinds = seen.kinds

    def find(self, plan: Plan) -> Fetched | None:
        """The gradients, where every piece has one and each is of the kind that it was before."""
        found = None if self.kinds is None else plan.fetching()
        found = None if found is None else self.known(found)
        seen = None if found is None else found.seen
        return found if seen is not None and seen.kinds == self.kinds else None

    def known(self, fetched: Fetched) -> Fetched:
        """The gradients, with what was made of their kinds at the step before."""
        if fetched.seen is None:
            return fetched
        seen = fetched.seen.known(self._last)
        self._last = seen.kinds
        return Fetched(fetched.gradients, seen)

    def known_weights(self, weights: Sequence[Tensor | None]) -> Look | None:
        """A look at weights, with what was made of their kinds at the step before."""
        seen = look(cast("Sequence[Tensor]", weights))  # which looks for missing ones
        seen = None if seen is None else seen.known(self._last_weights)
        self._last_weights = None if seen is None else seen.kinds
        return seen
