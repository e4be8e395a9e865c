"""Entry points that ``torch.compile`` leaves alone: a graph break in place of a trace."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from distclip.errors import DistclipError

_REASON = "distclip clips eagerly: compile without fullgraph=True, or clip outside what is compiled"

P = ParamSpec("P")
R = TypeVar("R")


def eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as it is, with all that it calls, also within compiled code.

    As ``torch.compiler.disable``, but without importing ``torch._dynamo``, which takes a second and
    which only code that compiles has imported. An error keeps no parameter alive beyond itself.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled and (disable := _disable()) is not None:
            disabled.append(disable(function))
        try:
            return (disabled[0] if disabled else function)(*args, **kwargs)
        except DistclipError as error:
            _forget_locals(error)
            raise

    entry._torchdynamo_disable = True  # type: ignore[attr-defined]
    entry._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return entry


_ENTRY = eagerly(len).__code__


def _disable() -> Any:
    """What torch has for this; None where its module is absent, or just being imported."""
    return getattr(sys.modules.get("torch._dynamo"), "disable", None)


def _forget_locals(error: BaseException) -> None:
    """Take the variables out of distclip's frames that an error has ended.

    An error is kept until all ranks have heard of it, by frames that its traceback keeps: a cycle,
    with all parameters in it, which only the garbage collector would find.
    """
    chain = [error]
    for each in chain:
        lines = each.__traceback__
        while lines is not None:
            frame: FrameType | None = lines.tb_frame
            while frame is not None and frame.f_globals.get("__name__", "").startswith("distclip."):
                try:
                    frame.clear()
                except RuntimeError:  # it is still running, and so are those that called it
                    break
                frame = frame.f_back
            lines = lines.tb_next
        earlier = each.__cause__ or each.__context__
        if earlier is not None and earlier not in chain:
            chain.append(earlier)


def caller() -> FrameType:
    """The frame that called the function of :func:`eagerly` which calls this."""
    frame = sys._getframe(2)
    while frame.f_code is _ENTRY or frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
        assert frame.f_back is not None
        frame = frame.f_back
    return frame
