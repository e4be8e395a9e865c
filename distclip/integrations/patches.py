"""A method of another library's object or class, replaced and put back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
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
        if "self" in kwargs:  # as torch.distributed.checkpoint calls a method of a class
            args = kwargs.pop("self"), *args
        return function(original, *args, **kwargs)

    def restore() -> None:
        nonlocal active
        active = False
        if vars(owner).get(name) is not placed:
            return
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    placed = staticmethod(replacement) if isinstance(before, staticmethod) else replacement
    setattr(owner, name, placed)
    return restore


def replace_everywhere(
    functions: Mapping[Callable[..., Any], Callable[..., Any]],
) -> list[Callable[[], None]]:
    """As :func:`replace`, in every module that has one of ``functions`` by now, under any name.

    Args:
        functions: original -> what is called in its place. distclip's own modules keep theirs.

    Returns:
        Functions that restore them.
    """
    undo = []
    for module in list(sys.modules.values()):
        name = vars(module).get("__name__") if isinstance(module, ModuleType) else None
        if not isinstance(name, str) or name.split(".")[0] == "distclip":
            continue
        for spelling, value in list(vars(module).items()):
            if callable(value) and _is_hashable(value) and value in functions:
                undo.append(replace(module, spelling, functions[value]))
    return undo


def _is_hashable(value: object) -> bool:
    return type(value).__hash__ is object.__hash__
