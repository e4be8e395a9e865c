"""Warnings that point at the user's line, and what is noticed about the clips of one step."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from torch import Tensor

from distclip.layouts.plan import Plan
from distclip.layouts.tensors import own, version_of

_OURS = ("distclip", "torch")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, as from the innermost line that is neither distclip's nor torch's."""
    level, frame = 1, _parent(sys._getframe())
    while frame is not None and _module(frame) in _OURS and frame.f_back is not None:
        level, frame = level + 1, _parent(frame)
    warnings.warn(message, category, stacklevel=level + 1)


_former: set[str] = set()
"""Messages about former names that this process has given."""


def warn_of_former(message: str) -> None:
    """Warn once that something has another name now, as a ``FutureWarning``."""
    if message not in _former:
        _former.add(message)
        warn(message, FutureWarning)


def _parent(frame: FrameType) -> FrameType | None:
    return frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class Clipped(NamedTuple):
    """A gradient as a clip left it."""

    parameter: weakref.ref[Tensor]
    """The parameter, or its shard: see :func:`distclip.layouts.tensors.own`."""
    gradient: weakref.ref[Tensor]
    """The gradient, or its shard."""
    versions: tuple[int, int]
    """How often the gradient, and the weights, had been changed in place."""
    by: str
    owner: int
    """``id`` of the clipper; 0 of a function."""


_clipped: OrderedDict[int, Clipped] = OrderedDict()
"""``id`` of a parameter in a sample -> the last clip of its gradient by hand."""

_KEPT = 96


def sample(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first, the middle and the last: looking at all of them would cost time in every step."""
    if not parameters:
        return ()
    return parameters[0], parameters[len(parameters) // 2], parameters[-1]


def note_clip(chosen: Sequence[Tensor], by: str, owner: int = 0) -> None:
    """Note that the gradients of these parameters have been clipped by hand."""
    for parameter in chosen:
        gradient = parameter.grad
        if gradient is not None and not gradient.is_inference():
            versions = version_of(gradient), version_of(parameter)
            _clipped[id(parameter)] = Clipped(
                weakref.ref(own(parameter)), weakref.ref(own(gradient)), versions, by, owner
            )
            _clipped.move_to_end(id(parameter))
    while len(_clipped) > _KEPT:
        _clipped.popitem(last=False)


def forget_clips() -> None:
    """Forget all clips that were noted."""
    _clipped.clear()


def earlier_clip(chosen: Sequence[Tensor], owner: int) -> str | None:
    """Who else has clipped these gradients, with no backward and no step since.

    Args:
        chosen: a sample of the parameters; where it has gradients, all of them must agree.
        owner: ``id`` of the clipper that asks.
    """
    found = None
    for parameter in chosen:
        gradient = parameter.grad
        if gradient is None:
            continue
        known = _clipped.get(id(parameter))
        if known is None or known.owner == owner or known.parameter() is not own(parameter):
            return None
        if known.gradient() is not own(gradient):
            return None
        if known.versions != (version_of(gradient), version_of(parameter)):
            return None
        found = known.by
    return found


class Absence:
    """Says so, once, where a step finds no gradient at all.

    At once where something explains it; otherwise at the second such step in a row.
    """

    def __init__(self, plan: Plan, named: Sequence[tuple[str, Tensor]]) -> None:
        self._plan = plan
        self._named = tuple(named)
        self._sample = sample([tensor for _, tensor in named])
        self._looks = 3 if plan.device.type != "cpu" else -1
        """How often a host read may be spent on a rank without gradients; -1: it costs nothing."""
        self.before = False
        """Whether the step before found none either."""

    def is_here(self) -> bool:
        """Whether this rank has parameters, and no gradient of any; without a loop if it has."""
        if self._looks == 0 or not self._plan.pieces:
            return False
        if any(parameter.grad is not None for parameter in self._sample) or any(
            map(_has_gradient, self._plan.pieces)
        ):
            self.before = False
            return False
        return True

    def judge(self, norms: Tensor, *, speaks: bool) -> None:
        """Warn if the other ranks have found nothing either.

        Args:
            norms: ``(parameters,)``, reduced; NaN where they were not measured.
            speaks: whether this rank warns for all.
        """
        self._looks -= self._looks > 0
        if self._plan.group is not None and norms.sum().item() != 0.0:
            return
        reason = self._reason()
        if reason is None and not self.before:
            self.before = True
            return
        self._looks = 0
        if speaks:
            warn(self._message(reason or _GENERAL))

    def _message(self, reason: str) -> str:
        names = [name for name, _ in self._named]
        some = ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)
        where = (
            "" if self._plan.group is None else " on this rank, and their norm on all ranks is 0"
        )
        return (
            f"no gradient was found: none of the {len(names)} parameters ({some}) has one{where}, "
            f"so nothing is clipped. {reason}"
        )

    def _reason(self) -> str | None:
        hooked = [n for n, p in self._named if getattr(p, "_post_accumulate_grad_hooks", None)]
        if hooked:
            return (
                f"{len(hooked)} of them ({hooked[0]!r}) have a hook of "
                f"register_post_accumulate_grad_hook: an optimizer that steps and frees gradients "
                f"there, during backward, is done before there is a norm; step after backward"
            )
        elsewhere = [n for n, p in self._named if getattr(p, "main_grad", None) is not None]
        if elsewhere:
            return f"{elsewhere[0]!r} has its gradient in .main_grad instead of .grad"
        if not any(parameter.requires_grad for _, parameter in self._named):
            return "All of them are frozen (requires_grad=False)"
        return None


_GENERAL = (
    "Clip after a backward that synchronises (not within no_sync(), nor after "
    "set_requires_gradient_sync(False)) and before zero_grad(); parameters that were replaced in "
    "the model since (fully_shard, to_empty, a merged adapter) are not these: build the "
    "GradClipper from the model, after such changes"
)


def _has_gradient(piece: object) -> bool:
    try:
        return piece.gradient() is not None  # type: ignore[attr-defined]
    except Exception:  # there is one, and the step says what is wrong with it
        return True
