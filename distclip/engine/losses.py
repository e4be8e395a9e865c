"""The losses of the step to come, for a policy that reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from distclip.application.notices import warn
from distclip.errors import ConfigurationError
from distclip.layouts import tensors
from distclip.policies import Policy
from distclip.policies.compose import reads_loss


class Losses:
    """The sum of the losses that were observed since the last step, and their number."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._read = policy, reads_loss(policy)
        self._sum: Tensor | None = None
        self._warned = False

    def add(self, loss: Tensor | float, device: torch.device) -> None:
        """Take the loss of one micro-batch.

        Raises:
            ConfigurationError: several numbers, or a DTensor.
        """
        if not self._read:
            return
        if tensors.is_sharded(loss):
            raise ConfigurationError(
                "observe: the loss is a DTensor, which only all ranks together can read; give "
                "loss.full_tensor()"
            )
        value = (loss if isinstance(loss, Tensor) else torch.tensor(loss, device="cpu")).detach()
        if value.numel() != 1:
            raise ConfigurationError(
                f"observe: the loss must be one number, got a tensor of shape {list(value.shape)}; "
                f"give its mean"
            )
        value = value.to(device, torch.float64).reshape(())
        given = torch.stack([value, torch.ones_like(value)])
        self._sum = given if self._sum is None else self._sum + given

    def take(self) -> Tensor | None:
        """float64 ``(2,)``, sum and number, of the step to come; warns once of a missing one."""
        taken, self._sum = self._sum, None
        if self._read and taken is None and not self._warned:
            self._warned = True
            warn(
                f"{self._policy!r} reads the loss, and this step has none: call "
                f"clipper.observe(loss) before the step, or clipper.clip_(loss=loss); with "
                f"Accelerate accelerator.backward(loss), or the handle's observe(loss). Steps "
                f"without one are judged by their norm alone",
            )
        return taken
