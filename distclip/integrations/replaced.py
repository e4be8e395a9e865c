"""Methods of other libraries' objects, replaced on the objects themselves and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Replaced:
    """The methods that are replaced now. Each replacement lies in its object's ``__dict__``."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, str]] = []

    def put(
        self,
        owner: Any,
        name: str,
        function: Callable[..., Any],
        when: Callable[[], bool] | None = None,
    ) -> None:
        """Have ``owner.name(...)`` call ``function(original, ...)``.

        Args:
            owner: an object whose method it is.
            name: of the method.
            function: given the original method, and what it was called with.
            when: asked at each call whether to; otherwise the original runs.
        """
        original = getattr(owner, name)

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            if when is not None and not when():
                return original(*args, **kwargs)
            return function(original, *args, **kwargs)

        setattr(owner, name, ours)
        self._known.append((owner, name))

    def undo_last(self) -> None:
        """Put back the method that was replaced last."""
        owner, name = self._known.pop()
        del owner.__dict__[name]

    def undo(self) -> None:
        """Restore every attribute that was replaced."""
        for owner, name in self._known:
            del owner.__dict__[name]
        self._known.clear()
