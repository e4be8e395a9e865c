"""Numbers from the host to a device and back, without waiting for it.

``torch.tensor(numbers, device="cuda")`` copies from pageable memory, which makes the host wait and
cannot be captured in a CUDA graph. From pinned memory neither is so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WITH_EVENTS = ("cuda", "xpu")

_captured: list[Tensor] = []
"""Host memory that a CUDA graph reads again at every replay, and so must never be given back."""


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes a part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(numbers: Sequence[int] | npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """An int64 tensor on a device. Nothing waits, and it may be captured."""
    made = torch.from_numpy(np.array(numbers, dtype=np.int64))
    if device.type != "cuda":
        return made.to(device)
    pinned = made.pin_memory()
    if is_capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


class HostCopy:
    """Numbers of a device on their way to the host. Nothing waits until they are read.

    Args:
        numbers: as they are when what is launched so far is done.
        previous: of an earlier copy of as many numbers, which has been read: its memory is used.
    """

    def __init__(self, numbers: Tensor, previous: HostCopy | None = None) -> None:
        if previous is None:
            pinned = numbers.device.type in _WITH_EVENTS
            self._there = torch.empty(
                numbers.shape, dtype=numbers.dtype, pin_memory=pinned, device="cpu"
            )
        else:
            self._there = previous._there
        self._there.copy_(numbers, non_blocking=has_events(numbers.device))
        self._event = record_event(numbers.device) if has_events(numbers.device) else None

    @property
    def ready(self) -> bool:
        """Whether they are there, so that :meth:`read` waits for nothing."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """The numbers, on the host. Waits for what was launched before the copy, and no more."""
        if self._event is not None:
            self._event.synchronize()
        return self._there


def has_events(device: torch.device) -> bool:
    """Whether a copy from the device may go on while the host does; elsewhere the copy waits."""
    return device.type in _WITH_EVENTS


def record_event(device: torch.device) -> torch.Event:
    """An event on the device's current stream, after all that is launched so far."""
    event: torch.Event = getattr(torch, device.type).current_stream(device).record_event()
    return event
