"""Which integration clips for an optimizer. Decided here, so that a gradient is clipped once.

An integration that adopts an optimizer says so by :class:`Adopted`. The integration of plain torch
scripts asks :func:`charge_of` and leaves such optimizers alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from distclip.application.folded import FusedStep
from distclip.application.stepping import Decision, StepHandle, is_attached
from distclip.layouts.detect import refuse_dummy

ENGINES = ("deepspeed",)
"""Packages whose engines step optimizers of their own."""


@dataclass(frozen=True)
class Charge:
    """What clips before the steps of an optimizer.

    Attributes:
        name: the integration, such as ``"accelerate"``.
        clip: clips parameters in place of a call of ``torch.nn.utils.clip_grad_norm_``, and returns
            their norm before; None: torch's function is left as it is.
    """

    name: str
    clip: Callable[[list[Tensor]], Tensor] | None = None


class Due(NamedTuple):
    """A step that is due, as :meth:`distclip.GradClipper.clip_before_step` takes it.

    Attributes:
        loss_scale: what the gradients are still multiplied by, 0-dim; None: nothing.
        found_inf: whether a gradient scaler has found them not finite; None where there is none.
        coming: the step, which may be able to multiply the gradients itself.
    """

    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    coming: FusedStep | None = None


class Adopted:
    """The optimizers that one integration clips for, with hooks on their steps.

    They are kept alive no longer than by their other users.

    Args:
        charge: the integration.
        before: clips before a step: called with the optimizer and the step.
        after: called after a step with the optimizer and whether the step was skipped.
    """

    def __init__(
        self,
        charge: Charge,
        before: Callable[[Optimizer, Due], Decision],
        after: Callable[[Optimizer, bool | Tensor], None],
    ) -> None:
        self._charge, self._before, self._after = charge, before, after
        self._handles: weakref.WeakKeyDictionary[Optimizer, StepHandle]
        self._handles = weakref.WeakKeyDictionary()

    def add(self, optimizer: Optimizer) -> bool:
        """Hook an optimizer, unless that is done already; returns whether it is new.

        Raises:
            ConfigurationError: a dummy, which DeepSpeed's engine replaces; no step hooks.
        """
        refuse_dummy(optimizer)
        if optimizer in self._handles:
            return False
        reference = weakref.ref(optimizer)

        def stepping() -> Optimizer:
            found = reference()
            assert found is not None  # it is calling
            return found

        self._handles[optimizer] = StepHandle(
            optimizer,
            lambda *given: self._before(stepping(), Due(*given)),
            lambda skipped: self._after(stepping(), skipped),
        )
        _charges[optimizer] = self._charge
        return True

    def __contains__(self, optimizer: Optimizer) -> bool:
        return optimizer in self._handles

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._handles)

    def is_stepping(self, optimizer: Optimizer) -> bool:
        """Whether this is asked from within a step of the optimizer."""
        return self._handles[optimizer].stepping

    def release(self) -> None:
        """Take the hooks off all optimizers."""
        for optimizer, handle in list(self._handles.items()):
            handle.remove()
            _charges.pop(optimizer, None)
        self._handles.clear()


def charge_of(optimizer: Optimizer) -> Charge | None:
    """What clips before the steps of ``optimizer``; None if nothing does.

    A GradClipper that the script itself has attached counts too, and so does an engine that makes
    this very step: it steps optimizers of its own, and some of them before it is finished.
    """
    known = _charges.get(optimizer)
    if known is not None:
        return known
    if is_attached(optimizer):
        return Charge("clipper")
    engine = next((name for name in ENGINES if name in sys.modules and is_running(name)), None)
    return None if engine is None else Charge(engine)


def is_running(package: str) -> bool:
    """Whether a function of a package (its full name) is being called."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if f"{frame.f_globals.get('__name__')}.".startswith(f"{package}."):
            return True
        frame = frame.f_back
    return False


def replaced_caller() -> str:
    """Who called the function of torch or of a framework that distclip has replaced, for messages.

    Returns:
        ``"the script"``, or the name of the installed package that the call comes from.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in _BETWEEN:
            installed = not _INSTALLED.isdisjoint(Path(frame.f_code.co_filename).parts)
            return package if installed else SCRIPT
        frame = frame.f_back
    return SCRIPT


SCRIPT = "the script"
_INSTALLED = {"site-packages", "dist-packages"}
_BETWEEN = ("distclip", "torch", "contextlib", "functools")
"""Packages whose frames lie between the call and what is called."""

_charges: weakref.WeakKeyDictionary[Optimizer, Charge] = weakref.WeakKeyDictionary()
