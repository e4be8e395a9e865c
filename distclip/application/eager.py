"""Entry points that ``torch.compile`` leaves alone: a graph break in place of a trace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as it is, with all that it calls, also within compiled code.

    As ``torch.compiler.disable``, but without importing ``torch._dynamo``, which takes a second and
    which only code that compiles has imported.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
            if disable is None:  # absent, or just being imported
                return function(*args, **kwargs)
            disabled.append(disable(function))
        return disabled[0](*args, **kwargs)

    entry._torchdynamo_disable = True  # type: ignore[attr-defined]
    return entry


_ENTRY = eagerly(len).__code__


def caller() -> FrameType:
    """The frame that called the function of :func:`eagerly` which calls this."""
    frame = sys._getframe(2)
    while frame.f_code is _ENTRY or frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
        assert frame.f_back is not None
        frame = frame.f_back
    return frame
