"""Views into FSDP1's flat tensors: the boxes that parameters are cut into, fetched one or all."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from torch import Tensor

from distclip.errors import UnsupportedGradientError
from distclip.kernels.look import Kinds, Look, look
from distclip.layouts import plain
from distclip.layouts.piece import Claimed, Holder, Piece

_grad = operator.attrgetter("grad")


@dataclass(frozen=True, slots=True)
class Source:
    """The flat tensor that an optimizer steps: a ``FlatParameter`` or an original parameter."""

    name: str
    hold: Holder
    """The ``FlatParameter``."""
    index: int | None
    """Which of its originals; None for itself."""
    numel: int
    spread: bool
    """Whether it is the shard of a DTensor."""

    def parameter(self) -> Tensor:
        """The flat or original parameter, provided it is sharded now.

        Raises:
            UnsupportedGradientError: it is gathered, or its gradient is not reduced.
        """
        flattened: Any = self.hold()
        refuse_unsharded(self.name, flattened)
        found: Tensor = flattened if self.index is None else flattened._params[self.index]
        return found

    def gradient(self) -> Tensor | None:
        """Its gradient, if it is reduced and sharded."""
        parameter = self.parameter()
        gradient = parameter.grad
        if gradient is None:
            return None
        if gradient.numel() != self.numel or not is_reduced(self.hold()):
            raise UnsupportedGradientError(
                f"the gradient of {self.name!r} is this rank's own and not reduced yet: the last "
                f"backward ran under FSDP1's no_sync(). Clip after a backward outside of "
                f"no_sync(), or drop the gradient with zero_grad()"
            )
        return plain.check_dense(self.name, gradient)


@dataclass(frozen=True, slots=True)
class Cut:
    """One box of a parameter, as a view into a flat tensor."""

    source: Source
    first: int
    shape: tuple[int, ...]
    """Of the box, dims as the parameter has them."""
    strides: tuple[int, ...]
    """Elements from one to the next along each of these dims."""

    @classmethod
    def of(cls, source: Source, first: int, extents: Sequence[int], memory: Sequence[int]) -> Cut:
        """From extents in memory order, and the dim that each of them belongs to."""
        strides = [math.prod(extents[place + 1 :]) for place in range(len(extents))]
        places = sorted(range(len(memory)), key=memory.__getitem__)
        shape = tuple(extents[place] for place in places)
        return cls(source, first, shape, tuple(strides[place] for place in places))

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
    cuts: list[Cut] = []
    places = []
    for place, piece in enumerate(pieces):
        owner = getattr(piece.gradient, "__self__", None)
        if isinstance(owner, Cut):
            cuts.append(owner)
            places.append(place)
    return (places, _AtOnce(cuts)) if cuts else None


class _AtOnce:
    """Every check once for each flat tensor; of the boxes only the addresses are made."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._cuts = cuts
        # Many parameters, each with a source of its own name, lie in one flat tensor.
        tensors = {(id(cut.source.hold), cut.source.index): cut.source for cut in cuts}
        self._sources = list(tensors.values())
        self._flats = list({id(s.hold): s.hold for s in self._sources}.values())
        number = {tensor: each for each, tensor in enumerate(tensors)}
        owners = [number[id(cut.source.hold), cut.source.index] for cut in cuts]
        self._owner = np.array(owners, np.int64)
        self._first = np.array([cut.first for cut in cuts], np.int64)
        self._expected = [source.numel for source in self._sources]
        self._numels = np.array([math.prod(cut.shape) for cut in cuts], np.int64)
        self._row_major = all(cut.is_row_major() for cut in cuts)
        self._offset = self._first
        self._known: tuple[Kinds, Kinds] | None = None
        """Of the flat tensors, and of the boxes."""

    def __call__(self) -> tuple[Sequence[Tensor | None], Look] | None:
        flats: list[Any] = [hold() for hold in self._flats]
        if not all(map(_is_ready, flats)):
            return None
        parameters: list[Any] = [
            source.hold() if source.index is None else source.hold()._params[source.index]  # type: ignore[attr-defined]
            for source in self._sources
        ]
        whole = list(map(_grad, parameters))
        if set(map(type, whole)) != {Tensor}:
            return self._of_some([gradient is None for gradient in whole])
        seen = look(whole)
        if seen is None or not np.array_equal(seen.numels, self._expected):
            return None
        views = _Views(whole, self._owner, self._cuts)
        seen, kinds = self._kinds_of(seen)
        at = seen.addresses[self._owner] + self._offset
        return views, Look(views, kinds, at, seen.row_major and self._row_major, seen)

    def _kinds_of(self, seen: Look) -> tuple[Look, Kinds]:
        """The look at the flat tensors, and what the boxes in them are."""
        if self._known is None or self._known[0] != seen.kinds:
            self._offset = self._first * np.array([d.itemsize for d in seen.dtypes])[self._owner]
            dtypes = [seen.dtypes[each] for each in self._owner.tolist()]
            self._known = seen.kinds, Kinds(dtypes, self._numels, seen.on_host)
        whole, kinds = self._known
        return seen.known(whole), kinds

    def _of_some(self, missing: Sequence[bool]) -> tuple[Sequence[Tensor | None], Look] | None:
        """Where some flat tensors have no gradient."""
        places = [place for place, owner in enumerate(self._owner) if not missing[owner]]
        if not places or not any(missing):
            return None
        found = _AtOnce([self._cuts[place] for place in places])()
        if found is None:
            return None
        gradients: list[Tensor | None] = [None] * len(self._cuts)
        for place, gradient in zip(places, found[0], strict=True):
            gradients[place] = gradient
        return gradients, found[1]


class _Views(Sequence[Tensor]):
    """Boxes out of flat tensors, each made when it is asked for."""

    def __init__(self, whole: Sequence[Tensor], owner: Any, cuts: Sequence[Cut]) -> None:
        self._whole, self._owner, self._cuts = whole, owner, cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        return self._cuts[place].view_of(self._whole[self._owner[place]])


def _is_ready(flattened: Any) -> bool:
    """Whether a ``FlatParameter`` and its gradient are both sharded."""
    return bool(flattened.size() == flattened._sharded_size) and is_reduced(flattened)


def is_reduced(flattened: Any) -> bool:
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
