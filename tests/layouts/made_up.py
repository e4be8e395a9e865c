"""A layout that distclip does not have: a stranger's tensor subclass, as one file of its own.

A ``Part`` holds consecutive slices of one tensor along one dim, and its gradient is not in
``.grad`` but in ``.collected``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from distclip.layouts.piece import Box, Claimed, Described, Entry, Holder, Layout, Piece, held


class Part(Tensor):
    """Rows or columns ``start`` and following of a tensor of the shape ``whole``."""

    whole: tuple[int, ...]
    cut_dim: int
    start: int
    collected: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, dim: int, sizes: Sequence[int]) -> Part:
        """This rank's part, of a tensor that is cut into parts of these sizes."""
        start, size = sum(sizes[: dist.get_rank()]), sizes[dist.get_rank()]
        local = values.narrow(dim, start, size).clone()
        part = cast(Part, Tensor._make_subclass(cls, local, True))  # type: ignore[attr-defined]
        part.whole, part.cut_dim, part.start = tuple(values.shape), dim, start
        return part

    def part_of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of that shape."""
        return whole.narrow(self.cut_dim, self.start, self.shape[self.cut_dim])


def describe(name: str, parameter: Tensor) -> list[Described] | None:
    if not isinstance(parameter, Part):
        return None
    offsets = [0] * parameter.dim()
    offsets[parameter.cut_dim] = parameter.start
    ranks = tuple(range(dist.get_world_size()))
    dtype = str(parameter.dtype).removeprefix("torch.")
    cut = (parameter.cut_dim,) if len(ranks) > 1 else ()
    entry = Entry(name, parameter.whole, dtype, cut, ranks, f"parts along {cut}")
    hold = held(parameter)
    box = Box(tuple(offsets), tuple(parameter.shape))
    return [(entry, [Piece(0, box, 1.0, partial(collected, hold), partial(values, hold))])]


def collected(hold: Holder) -> Tensor | None:
    return cast(Part, hold()).collected


def values(hold: Holder) -> Tensor:
    return hold().detach().as_subclass(Tensor)


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    found = [(place, piece.gradient) for place, piece in enumerate(pieces)]
    mine = [(p, f) for p, f in found if isinstance(f, partial) and f.func is collected]
    return ([place for place, _ in mine], partial(fetch, [f for _, f in mine])) if mine else None


def fetch(ways: Sequence[Any]) -> tuple[list[Tensor | None], None]:
    return [way() for way in ways], None


SLOW = Layout(describe)
FAST = Layout(describe, at_once)
