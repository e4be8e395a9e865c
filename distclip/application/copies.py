"""Deep copies of an optimizer that a clipper is attached to: torch leaves step hooks behind."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class FollowedCopy:
    """Stands in for an optimizer's ``__deepcopy__``, and has something copied along with it."""

    def __init__(self, optimizer: Optimizer, follow: Callable[[dict[int, Any]], None]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._follow = follow
        self._before = optimizer.__dict__.get("__deepcopy__")
        self._put(self)

    def __call__(self, memo: dict[int, Any]) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # it is being copied
        self._put(self._before)
        try:
            twin = memo[id(optimizer)] = copy.deepcopy(optimizer, memo)
        finally:
            self._put(self)
        self._follow(memo)
        return twin

    def remove(self) -> None:
        """Leave the optimizer to be copied as before."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.__dict__.get("__deepcopy__") is self:
            self._put(self._before)

    def _put(self, copier: object) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if copier is None:
            del optimizer.__dict__["__deepcopy__"]
        else:
            optimizer.__dict__["__deepcopy__"] = copier
