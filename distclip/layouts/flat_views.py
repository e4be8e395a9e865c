"""Views into FSDP1's flat tensors: the boxes that parameters are cut into, fetched one or all."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import plain
from distclip.layouts.boxes import Boxes
from distclip.layouts.piece import Claimed, Holder, Piece

_grad = operator.attrgetter("grad")


@dataclass(frozen=True, slots=True)
class Source:
    """The flat tensor that an optimizer steps: a ``FlatParameter`` or an original parameter."""

    name: str
    hold: Holder
    """The ``FlatParameter``."""
    index: int | None
    """Number of the original parameter within it; None for the ``FlatParameter`` itself."""
    numel: int
    spread: bool
    """Whether it is the shard of a DTensor."""

    def parameter(self) -> Tensor:
        """The flat or original parameter, provided it is sharded now.

        Raises:
            UnsupportedGradientError: it is gathered, or its gradient is not reduced.
        """
        refuse_unsharded(self.name, self.hold())
        return self.tensor()

    def tensor(self) -> Tensor:
        """The flat or original parameter, sharded or not."""
        flattened: Any = self.hold()
        found: Tensor = flattened if self.index is None else flattened._params[self.index]
        return found

    def gradient(self) -> Tensor | None:
        """The gradient of the flat tensor, if it is reduced and sharded."""
        parameter = self.parameter()
        gradient = parameter.grad
        if gradient is None:
            return None
        if gradient.numel() != self.numel or not flat_is_reduced(self.hold()):
            raise UnsupportedGradientError(
                f"the gradient of {self.name!r} is this rank's own and not reduced yet: the last "
                f"backward ran under FSDP1's no_sync(). Clip after a backward outside of "
                f"no_sync(), or drop the gradient with zero_grad()"
            )
        return plain.check_dense(self.name, gradient)


@dataclass(frozen=True, slots=True)
class FlatCut:
    """One box of a parameter, as a view into a flat tensor."""

    source: Source
    first: int
    shape: tuple[int, ...]
    """Extents of the box, dims as the parameter has them."""
    strides: tuple[int, ...]
    """Elements from one to the next along each of these dims."""

    @classmethod
    def of(
        cls, source: Source, first: int, extents: Sequence[int], memory: Sequence[int]
    ) -> FlatCut:
        """Make one from extents in memory order, and the dim that each of them belongs to."""
        strides = [math.prod(extents[place + 1 :]) for place in range(len(extents))]
        places = sorted(range(len(memory)), key=memory.__getitem__)
        shape = tuple(extents[place] for place in places)
        return cls(source, first, shape, tuple(strides[place] for place in places))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def is_row_major(self) -> bool:
        """Whether the box is contiguous; not so where the parameter has its channels last."""
        steps = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        strides = zip(self.shape, self.strides, steps, strict=True)
        return all(size == 1 or stride == step for size, stride, step in strides)

    def gradient(self) -> Tensor | None:
        """A view of the gradient, of the box's shape."""
        gradient = self.source.gradient()
        return None if gradient is None else self.view_of(gradient)

    def weight(self) -> Tensor:
        """A view of the weights, of the box's shape."""
        return self.view_of(self.source.parameter().detach())

    def view_of(self, whole: Tensor) -> Tensor:
        """The box out of the flat tensor, or that itself where it has kept its shape."""
        if whole.dim() != 1:  # unsharded, with the shape that it always had
            return whole
        step = whole.stride(0)
        strides = self.strides if step == 1 else [step * stride for stride in self.strides]
        return whole.as_strided(self.shape, strides, whole.storage_offset() + step * self.first)


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    """For :mod:`distclip.layouts.fetching`: boxes out of flat tensors."""
    found = [
        (place, owner)
        for place, piece in enumerate(pieces)
        if isinstance(owner := getattr(piece.gradient, "__self__", None), FlatCut)
    ]
    if not found:
        return None
    cuts = [cut for _, cut in found]
    # Many parameters, each with a source of its own name, lie in one flat tensor.
    tensors = {(id(cut.source.hold), cut.source.index): cut.source for cut in cuts}
    number = {tensor: each for each, tensor in enumerate(tensors)}
    sources = list(tensors.values())
    flats = list({id(source.hold): source.hold for source in sources}.values())

    def fetch() -> list[Tensor | None] | None:
        if not all(map(_is_ready, [hold() for hold in flats])):
            return None
        return list(map(_grad, [source.tensor() for source in sources]))

    owner = [number[id(cut.source.hold), cut.source.index] for cut in cuts]
    boxes = Boxes(cuts, owner, [source.numel for source in sources], fetch)
    return [place for place, _ in found], boxes


def _is_ready(flattened: Any) -> bool:
    """Whether a ``FlatParameter`` and its gradient are both sharded."""
    return bool(flattened.size() == flattened._sharded_size) and flat_is_reduced(flattened)


def flat_is_reduced(flattened: Any) -> bool:
    """Whether a ``FlatParameter``'s gradient is not the one of a backward under ``no_sync()``."""
    # FSDP1 takes the mark off again when a backward ends, but for one under no_sync().
    gradient = flattened.grad
    sharded = gradient is None or gradient.size() == flattened._sharded_size
    return sharded and not flattened._post_backward_called


def refuse_unsharded(name: str, flattened: Any) -> None:
    """Refuse a ``FlatParameter`` that FSDP1 has gathered.

    Raises:
        UnsupportedGradientError: names the parameter.
    """
    if flattened.size() != flattened._sharded_size:
        raise UnsupportedGradientError(
            f"FSDP1 has gathered the parameter {name!r} (summon_full_params, or a forward or "
            f"backward under way); build the clipper and clip outside of that, between backward "
            f"and step"
        )
