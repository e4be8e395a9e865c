"""What a script's own calls of ``clip_grad_norm_`` have clipped since the last update."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
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


class JointDecision:
    """Several reports about the parameters of one optimizer: skipped if any of them says so."""

    def __init__(self, reports: Iterable[ClipReport]) -> None:
        flags = [report.leave_out for report in reports if report.leave_out is not None]
        self.leave_out = torch.stack(flags).any() if flags else None
