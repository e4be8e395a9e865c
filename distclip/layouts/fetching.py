"""The gradients of all pieces at once, in the usual case: no Python loop, every check made once.

A layout may offer a way for its own pieces (``at_once`` of its
:class:`~distclip.layouts.piece.Layout`). Whatever is unusual is left to the pieces themselves, one
by one, which say by name what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

from torch import Tensor

from distclip.errors import DistclipError
from distclip.kernels.look import Look, Places, look, there
from distclip.layouts.detect import LAYOUTS
from distclip.layouts.piece import ClaimedWeights, MisplacedError, Piece

Gradients: TypeAlias = Sequence[Tensor | None]


class Fetched(NamedTuple):
    """The gradient of every piece; and what a look at those that are there has found."""

    gradients: Gradients
    seen: Look | None


class Fetching:
    """How the gradients of these pieces are fetched."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        found = (each.at_once(pieces) for each in LAYOUTS if each.at_once is not None)
        self._ways = [each for each in found if each is not None]
        claimed = {place for places, _ in self._ways for place in places}
        self._others = [place for place in range(len(pieces)) if place not in claimed]

    def __call__(self, before: Places | None = None) -> Fetched | None:
        """All gradients; None where a piece has to be asked by itself.

        Args:
            before: what a look at those of an earlier step has found.
        """
        if len(self._ways) == 1 and not self._others:
            found = self._ways[0][1]()
            if found is None:
                return None
            gradients, seen = found
            seen = look(there(gradients), before) if seen is None else seen
            return None if seen is None else Fetched(gradients, seen)
        return self._mixed(before) if self._ways else None

    def weights(self) -> Sequence[Tensor] | None:
        """All local weights; None where one of them has to be asked for by itself."""
        weights: list[Tensor] = []
        for places, way in self._ways_to_weights:
            found = way()
            if found is None or len(places) < len(self._pieces):
                return None
            weights = found
        return weights or None

    @cached_property
    def _ways_to_weights(self) -> list[ClaimedWeights]:
        ways = [each.weights_at_once for each in LAYOUTS if each.weights_at_once is not None]
        return [claimed for way in ways if (claimed := way(self._pieces)) is not None]

    def _mixed(self, before: Places | None) -> Fetched | None:
        gradients: list[Tensor | None] = [None] * len(self._pieces)
        for places, way in self._ways:
            found = way()
            if found is None:
                return None
            for place, gradient in zip(places, found[0], strict=True):
                gradients[place] = gradient
        try:
            for place in self._others:
                gradients[place] = self._pieces[place].gradient()
        except (DistclipError, MisplacedError):
            return None
        seen = look(there(gradients), before)
        return None if seen is None else Fetched(gradients, seen)
