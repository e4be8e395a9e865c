"""Which integration clips for an optimizer. Decided here, so that a gradient is clipped once.

An integration that adopts an optimizer says so by :func:`take`. The integration of plain torch
scripts asks :func:`of` and leaves such optimizers alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from torch import Tensor
from torch.optim import Optimizer

from distclip.application.stepping import is_attached

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


def take(optimizer: Optimizer, charge: Charge) -> None:
    """From now on ``charge`` clips before the steps of ``optimizer``."""
    _charges[optimizer] = charge


def release(optimizer: Optimizer) -> None:
    """Nothing clips before the steps of ``optimizer`` any more."""
    _charges.pop(optimizer, None)


def of(optimizer: Optimizer) -> Charge | None:
    """What clips before the steps of ``optimizer``; None if nothing does.

    A GradClipper that the script itself has attached counts too, and so does an engine that makes
    this very step: it steps optimizers of its own, and some of them before it is finished.
    """
    known = _charges.get(optimizer)
    if known is not None:
        return known
    if is_attached(optimizer):
        return Charge("clipper")
    engine = next((name for name in ENGINES if name in sys.modules and _is_running(name)), None)
    return None if engine is None else Charge(engine)


def _is_running(package: str) -> bool:
    """Whether a function of a package is being called."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


_charges: weakref.WeakKeyDictionary[Optimizer, Charge] = weakref.WeakKeyDictionary()
