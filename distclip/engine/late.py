"""Errors that are raised one step late, so that no step waits for its device.

Under ``on_nonfinite="error_late"`` a step with a NaN or inf drops its update on the device. Which
gradients it was goes to the host by a copy that nothing waits for, and is looked at in the next
step, when the device has long made it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.errors import NonFiniteGradientError
from distclip.kernels import transfer


class LateError:
    """The gradients that were not finite in steps that are over, until an error says so.

    Args:
        names: of the parameters, in the order of the flags.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._flags: Tensor | None = None
        """Bool ``(parameters,)`` on the device: not finite in any step since the last error."""
        self._copy: transfer.HostCopy | None = None
        self._step = 0
        self._told = False
        """Whether this rank has raised for the present flags."""

    def note(self, flags: Tensor, step: int) -> None:
        """Keep the flags of a step. Waits for nothing, and may be captured in a CUDA graph.

        Args:
            flags: bool ``(parameters,)``, the same on every rank.
            step: counted from 0.
        """
        if self._flags is None:
            self._flags = torch.zeros_like(flags)
        self._flags.logical_or_(flags)
        self._told = False
        self._step = step
        captured = transfer.is_capturing(flags.device)
        self._copy = None if captured else transfer.HostCopy(self._flags, self._copy)

    def raise_earlier(self) -> None:
        """Raise for the steps before this one. Waits for the last of them, and for none later."""
        if self._copy is not None and (bad := self._names_of(self._copy.read())):
            self.forget()
            raise self._error(bad)

    def raise_now(self) -> None:
        """Raise for all steps so far, replays of a CUDA graph included. Waits for the device.

        This may be asked on one rank alone: the step to come raises on all of them all the same.
        """
        if self._flags is None or self._told or not (bad := self._names_of(self._flags)):
            return
        if self._copy is None:  # captured: no step to come runs Python
            self.forget()
        else:
            self._told = True
        raise self._error(bad)

    def forget(self) -> None:
        """Raise for no step so far."""
        self._copy, self._told = None, False
        if self._flags is not None:
            self._flags.zero_()

    def _names_of(self, flags: Tensor) -> list[str]:
        return [name for name, flag in zip(self._names, flags.tolist(), strict=True) if flag]

    def _error(self, bad: Sequence[str]) -> NonFiniteGradientError:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        listed = ", ".join(map(repr, bad[:8])) + more
        return NonFiniteGradientError(
            f"step {self._step} (counted from 0): NaN or inf in the gradient of {listed}, or "
            f"a norm that float64 cannot hold. Its update was dropped, and nothing was clipped "
            f"since. on_nonfinite='error' raises in the step itself; to go on without such steps "
            f"use on_nonfinite='skip'",
            bad,
        )
