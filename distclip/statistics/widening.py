"""Half-precision CPU tensors in float32, a chunk at a time, in one buffer.

A new tensor for each chunk costs more in page faults than its conversion takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.statistics.exact import chunks_of, prepared
from distclip.statistics.neighbours import CHUNK

SHORT = 4096
"""Below this many elements a new tensor is cheaper than the buffer."""
UPPER = np.uint32(0xFFFF0000)

Floats32: TypeAlias = npt.NDArray[np.float32]


class Widener:
    """Converts for one measurement, which does not need a chunk any more when it has the next."""

    @cached_property
    def _buffer(self) -> npt.NDArray[np.uint32]:
        return np.empty(2 * CHUNK, np.uint32)

    def chunks(self, tensor: Tensor, bound: float | None) -> Iterator[Floats32]:
        """All elements in float32, clamped if asked, in any order.

        Args:
            tensor: bfloat16, float16 or float32, of any shape and strides.
            bound: measure ``clamp(x, -bound, bound)`` instead; None for as it is.

        Yields:
            1-D, of at most ``2 * CHUNK`` elements where something is converted.
        """
        numel = tensor.numel()
        if tensor.dtype is not torch.bfloat16 or not tensor.is_contiguous() or numel < SHORT:
            whole = tensor.dtype is torch.float32 and bound is None
            for chunk in chunks_of(tensor.detach(), whole=whole):
                yield self.rows(chunk, bound)
            return
        flat, even = tensor.detach().view(-1), numel - numel % 2
        pairs = _pairs(flat[:even])
        for start in range(0, even // 2, CHUNK):
            part = pairs[start : start + CHUNK]
            bits = self._buffer[: 2 * len(part)]
            _split(part, bits)
            yield _clamped(bits.view(np.float32), bound)
        if even < numel:
            yield self.rows(flat[even:], bound)

    def rows(self, rows: Tensor, bound: float | None) -> Floats32:
        """The same of a chunk as it is, or of the rows of a matrix, each of which stays one.

        Returns:
            Of the shape of ``rows``; valid until something else is asked for.
        """
        rows = rows.detach()
        numel = rows.numel()
        if rows.dtype is torch.float32 or not SHORT <= numel <= CHUNK:
            found: Floats32 = prepared(rows, bound, torch.float32).numpy()
            return found
        bits = self._buffer[:numel].reshape(rows.shape)
        wide = bits.view(np.float32)
        if rows.dtype is torch.bfloat16 and rows.is_contiguous() and rows.shape[-1] % 2 == 0:
            _split(_pairs(rows), bits)
        else:
            torch.from_numpy(wide).copy_(rows)
        return _clamped(wide, bound)


def _pairs(rows: Tensor) -> npt.NDArray[np.uint32]:
    """Two bfloat16 numbers in each."""
    found: npt.NDArray[np.uint32] = rows.view(torch.int16).numpy().view(np.uint32)
    return found


def _split(pairs: npt.NDArray[Any], bits: npt.NDArray[np.uint32]) -> None:
    """Write one half of the numbers, then the other, row by row, as the bits of float32 numbers.

    A bfloat16 number is the upper half of the same number in float32. So of the two in 32 bits one
    is moved up, and the other freed of what lies below it: twice as fast as a conversion.
    """
    half = pairs.shape[-1]
    np.left_shift(pairs, 16, out=bits[..., :half])
    np.bitwise_and(pairs, UPPER, out=bits[..., half:])


def _clamped(values: Floats32, bound: float | None) -> Floats32:
    return values if bound is None else np.clip(values, -bound, bound, out=values)
