"""What is remembered of the gradients and weights of a plan from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from distclip.kernels.look import Kinds, Look, Places, look, positions_there
from distclip.kernels.measuring import PlanTables
from distclip.layouts.fetching import Fetched
from distclip.layouts.plan import Plan


@dataclass
class Scratch:
    """What is remembered of the gradients from step to step.

    Attributes:
        tables: of the plan's tensors, for the kernels.
        habits: ``"misplaced"`` where gradients had to be redistributed the last time; the same on
            every rank.
        inspected: the places of the pieces whose gradients' memory and shape were looked at.
        only_measures: whether nothing is changed, so that memory may be shared.
        kinds: of what kinds the gradients were when every piece had one.
    """

    tables: PlanTables = field(default_factory=PlanTables)
    habits: set[str] = field(default_factory=set)
    inspected: set[int] = field(default_factory=set)
    only_measures: bool = False
    kinds: Kinds | None = None
    _last: Places | None = None
    _last_weights: Places | None = None

    def has_inspected(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether all of the gradients of a plan that are there have been looked at before."""
        if len(self.inspected) == len(gradients):
            return True
        return self.inspected.issuperset(positions_there(gradients))

    def learn(self, seen: Look, pieces: int) -> None:
        """Remember of what kinds the gradients are, if each of so many pieces has one."""
        if self.kinds is None and len(seen.tensors) == pieces:
            self.kinds = seen.kinds

    def find(self, plan: Plan) -> Fetched | None:
        """The gradients, where every piece has one and each is of the kind that it was before."""
        found = None if self.kinds is None else self.fetch(plan)
        seen = None if found is None else found.seen
        return found if seen is not None and seen.kinds == self.kinds else None

    def fetch(self, plan: Plan) -> Fetched | None:
        """The gradients, as of :class:`~distclip.layouts.fetching.Fetching`, by the step before."""
        found = plan.fetching(self._last)
        if found is not None and found.seen is not None:
            self._last = found.seen.places
        return found

    def known(self, found: Look) -> Look:
        """A look at the gradients, with what was made at the step before of what is the same."""
        places = found.places if self._last is None else self._last.or_again(found.places)
        self._last = places
        return Look(found.tensors, places, found.whole)

    def known_weights(self, weights: Sequence[Tensor | None]) -> Look | None:
        """A look at weights, with what was made of their kinds at the step before."""
        # Which looks for missing ones, too.
        seen = look(cast("Sequence[Tensor]", weights), self._last_weights)
        self._last_weights = None if seen is None else seen.places
        return seen
