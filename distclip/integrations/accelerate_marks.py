"""What a script's own calls of ``clip_grad_norm_`` have clipped since the last update."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.layouts import fsdp1
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
        gradient = fsdp1.owner_of_gradient(parameter).grad
        if gradient is None:
            return cls(report, None, 0)
        return cls(report, weakref.ref(gradient), _version(gradient))

    def outdated(self, parameter: Tensor) -> bool:
        """Whether there has been a backward since, be it ``loss.backward()``."""
        gradient = fsdp1.owner_of_gradient(parameter).grad
        if gradient is None or self.gradient is None:
            return (gradient is None) != (self.gradient is None)
        return self.gradient() is not gradient or self.version != _version(gradient)


def _version(gradient: Tensor) -> int:
    """Counts the changes in place; a DTensor's local tensor has its own count."""
    return (gradient._local_tensor if isinstance(gradient, DTensor) else gradient)._version


class Together:
    """Several reports about the parameters of one optimizer: skipped if any of them says so."""

    def __init__(self, reports: Iterable[ClipReport]) -> None:
        flags = [report.leave_out for report in reports if report.leave_out is not None]
        self.leave_out = torch.stack(flags).any() if flags else None
