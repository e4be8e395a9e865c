"""What a script's own calls of ``clip_grad_norm_`` have clipped since the last update."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.layouts.gradients import owner_of
from distclip.layouts.tensors import version_of
from distclip.report import ClipReport


class Mark(NamedTuple):
    """A call of the script has clipped a parameter; its gradient as the call left it.

    Under FSDP1 it is the flat gradient of the whole unit: a parameter that has none on this rank
    has one on others, and all ranks have to see that there has been a backward.
    """

    report: ClipReport
    gradient: weakref.ref[Tensor] | None
    version: int

    @classmethod
    def of(cls, parameter: Tensor, report: ClipReport) -> Mark:
        """The mark of a parameter that was clipped just now."""
        gradient = owner_of(parameter).grad
        if gradient is None:
            return cls(report, None, 0)
        return cls(report, weakref.ref(gradient), version_of(gradient))

    def is_of(self, parameter: Tensor) -> bool:
        """Whether the gradient is still the same tensor, changed or not."""
        gradient = owner_of(parameter).grad
        return gradient is not None and self.gradient is not None and self.gradient() is gradient

    def outdated(self, parameter: Tensor) -> bool:
        """Whether there has been a backward since, be it ``loss.backward()``."""
        gradient = owner_of(parameter).grad
        if gradient is None or self.gradient is None:
            return (gradient is None) != (self.gradient is None)
        return self.gradient() is not gradient or self.version != version_of(gradient)


class Marks(dict[int, Mark]):
    """The marks of parameters, by id, from a clip to the step that uses it."""

    def sound(self, parameters: Iterable[Tensor]) -> dict[int, ClipReport]:
        """The reports of those (by id) whose gradients are as they were clipped."""
        marks = [(self.get(id(parameter)), parameter) for parameter in parameters]
        return {id(p): mark.report for mark, p in marks if mark and not mark.outdated(p)}

    def fresh(self, parameters: list[Tensor]) -> list[Tensor]:
        """Parameters that are not clipped yet; all of these where one has seen a backward since."""
        marks = [self.get(id(parameter)) for parameter in parameters]
        if any(mark and mark.outdated(p) for mark, p in zip(marks, parameters, strict=True)):
            return parameters
        return [p for mark, p in zip(marks, parameters, strict=True) if mark is None]

    def clip(
        self,
        parameters: Iterable[Tensor],
        clip: Callable[[], ClipReport],
        stepped: Iterable[Tensor],
    ) -> ClipReport:
        """Mark what is clipped by ``clip()``; returns its report.

        Gradients may be views of one buffer (FSDP1, DDP), and share its count of changes: what is
        clipped now changes the marks of the others in ``stepped``, which are made anew.
        """
        known = {id(parameter): parameter for parameter in stepped}
        sound = self.sound(known.values())
        report = clip()
        for parameter in parameters:
            known[id(parameter)], sound[id(parameter)] = parameter, report
        self.update({key: Mark.of(known[key], clipped) for key, clipped in sound.items()})
        return report


class JointDecision:
    """Several reports about the parameters of one optimizer: skipped if any of them says so."""

    def __init__(self, reports: Iterable[ClipReport]) -> None:
        flags = [report.leave_out for report in reports if report.leave_out is not None]
        self.leave_out = torch.stack(flags).any() if flags else None
