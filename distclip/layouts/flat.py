"""Flat ranges, as FSDP1 and DeepSpeed ZeRO cut parameters, taken apart into boxes.

Both lay parameters out one after another in a flat buffer, and cut that buffer without regard to
rows. What a rank holds of one parameter is then a range of its row-major elements. Such a range is
a few boxes (at most ``2 * dims - 1``, one unless a border cuts the parameter), each contiguous in
the range: nothing beyond this file has to know of flat ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from distclip.layouts.piece import Box


def range_boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[Box, int]]:
    """The elements ``start : stop`` of a row-major tensor, as boxes in the order of the range.

    Returns:
        ``(box, first)`` pairs: the box is the elements ``first : first + prod(box.extents)`` of the
        range, viewed as ``box.extents``. Empty for an empty range.
    """
    found: list[tuple[Box, int]] = []
    first = 0
    for box in _boxes(tuple(shape), (), start, stop) if start < stop else ():
        found.append((box, first))
        first += math.prod(box.extents)
    return found


def _boxes(shape: tuple[int, ...], prefix: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes of a range that lies within the sub-tensor at ``prefix``; flat indices are in it."""
    dim = len(prefix)
    if dim == len(shape):
        yield Box(prefix, (1,) * dim)
        return
    inner = math.prod(shape[dim + 1 :])
    first, past = start // inner, stop // inner
    if start % inner:  # the rest of a slice that begins elsewhere
        end = min(stop - first * inner, inner)
        yield from _boxes(shape, (*prefix, first), start - first * inner, end)
        first += 1
    if first < past:
        rest = (0,) * (len(shape) - dim - 1)
        yield Box((*prefix, first, *rest), (*(1,) * dim, past - first, *shape[dim + 1 :]))
    if first <= past and stop % inner:  # the beginning of a slice that goes on elsewhere
        yield from _boxes(shape, (*prefix, past), 0, stop - past * inner)


def split_dims(shape: Sequence[int], borders: Iterable[int]) -> tuple[int, ...]:
    """The dims along which borders between ranks cut a row-major tensor.

    Args:
        shape: of the logical tensor.
        borders: flat indices at which another rank's range begins; those outside of the tensor and
            at its ends cut nothing.

    Returns:
        Sorted dims. A unit that extends along one of them is not whole on every rank.
    """
    numel = math.prod(shape)
    cut: set[int] = set()
    for border in borders:
        if not 0 < border < numel:
            continue
        for dim in range(len(shape)):
            if shape[dim] > 1:
                cut.add(dim)
            if border % math.prod(shape[dim + 1 :]) == 0:
                break
    return tuple(sorted(cut))
