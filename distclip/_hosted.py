"""Copies of small tensors on the host, that do not make the device wait."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WITH_STREAMS = ("cuda", "xpu")


class HostCopy:
    """A tensor on its way to the host: asynchronous, into pinned memory, where there are streams.

    Args:
        tensor: float64, not changed from now on.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.Event | None = None
        if tensor.device.type in _WITH_STREAMS:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()
        else:
            self._host = tensor.cpu()

    @property
    def ready(self) -> bool:
        """Whether it is there, so that :meth:`read` waits for nothing."""
        return self._event is None or bool(self._event.query())

    def read(self) -> npt.NDArray[np.float64]:
        """The values; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        values: npt.NDArray[np.float64] = self._host.numpy()
        return values
