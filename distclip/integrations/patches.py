"""A method of another library's object or class, replaced and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ABSENT = object()


def replace(
    owner: Any,
    name: str,
    function: Callable[..., Any],
    when: Callable[[], bool] | None = None,
) -> Callable[[], None]:
    """Have ``owner.name(...)`` call ``function(original, ...)``.

    Args:
        owner: an object, a class (then the next argument of ``function`` is ``self``), or a module.
        name: of the method.
        function: called with the original method, and with the arguments of the call.
        when: asked at each call; if it returns False, the original is called instead.

    Returns:
        A function that restores the method. If another library has replaced the method since, its
        replacement stays, and calls the original from then on.
    """
    original, before = getattr(owner, name), vars(owner).get(name, _ABSENT)
    active = True

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not active or (when is not None and not when()):
            return original(*args, **kwargs)
        return function(original, *args, **kwargs)

    def restore() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is not replacement:
            return
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, replacement)
    return restore
