"""Numbers from the host to a device, without waiting for it.

``torch.tensor(numbers, device="cuda")`` copies from pageable memory, which makes the host wait and
cannot be captured in a CUDA graph. From pinned memory neither is so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_captured: list[Tensor] = []
"""Host memory that a CUDA graph reads again at every replay, and so must never be given back."""


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes a part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(numbers: Sequence[int] | npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """An int64 tensor on a device. Nothing waits, and it may be captured.

    Args:
        numbers: on the host.
        device: any.
    """
    made = torch.from_numpy(np.array(numbers, dtype=np.int64))
    if device.type != "cuda":
        return made.to(device)
    pinned = made.pin_memory()
    if is_capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)
