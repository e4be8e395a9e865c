"""One look at the tensors of a step: all that their kinds, sizes and places say, asked once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PLAIN = frozenset((Tensor, nn.Parameter))
"""Types whose elements lie where their address says."""
PARTS_KEPT = 16
"""Of how many parts of some tensors it is kept what they are, and where."""
_dtype, _is_cpu = map(operator.attrgetter, ("dtype", "is_cpu"))
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(eq=False)
class Kinds:
    """What is to be known of tensors but where they lie: the same from step to step, mostly.

    Attributes:
        dtypes: of each.
        numels: int64, elements of each.
        on_host: whether all lie in host memory.
    """

    dtypes: list[torch.dtype]
    numels: npt.NDArray[np.int64]
    on_host: bool
    _some: dict[tuple[int, ...], Kinds] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Kinds)
            and self.dtypes == other.dtypes
            and self.on_host == other.on_host
            and self.numels.data == other.numels.data
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def distinct(self) -> frozenset[torch.dtype]:
        """The dtypes that there are."""
        return frozenset(self.dtypes)

    def at(self, positions: tuple[int, ...]) -> Kinds:
        """Of some of the tensors; made once. Of all of them, this itself."""
        known = self._some.get(positions)
        if known is None:
            dtypes, numels = [self.dtypes[each] for each in positions], self.numels[list(positions)]
            known = Kinds(dtypes, numels, self.on_host)
            if positions == tuple(range(len(self.dtypes))):
                known = self
            if len(self._some) >= PARTS_KEPT:  # where other gradients are missing at every step
                self._some.clear()
            self._some[positions] = known
        return known

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each."""
        widths = [dtype.itemsize for dtype in self.dtypes]
        return self.numels * np.array(widths, np.int64)


@dataclass(eq=False)
class Places:
    """What is to be known of tensors without gaps; the same where memory is used again.

    Attributes:
        kinds: what they are.
        addresses: int64, of the first element of each.
        row_major: whether all are contiguous; else some have their channels last.
    """

    kinds: Kinds
    addresses: npt.NDArray[np.int64]
    row_major: bool

    @cached_property
    def apart(self) -> bool:
        """Whether no two share an element, and only empty ones lie nowhere."""
        sizes = self.kinds.sizes
        order = self.addresses.argsort()
        starts, ends = self.addresses[order], sizes[order]
        del order  # a step takes most memory here
        ends += starts
        lost = bool(len(starts)) and starts[0] == 0 and bool(sizes[self.addresses == 0].any())
        return not lost and not bool((ends[:-1] > starts[1:]).any())

    def at(self, positions: tuple[int, ...]) -> Places:
        """The places of some of the tensors; of all of them, this itself."""
        kinds = self.kinds.at(positions)
        if kinds is self.kinds:
            return self
        return Places(kinds, self.addresses[list(positions)], self.row_major)

    def or_again(self, now: Places) -> Places:
        """What a later step finds, or as much of what was found before as is the same.

        What was made for that need not be compared, or made, again.
        """
        if now.kinds != self.kinds:
            return now
        if now.row_major == self.row_major and now.addresses.data == self.addresses.data:
            return self
        return Places(self.kinds, now.addresses, now.row_major)


@dataclass(eq=False)
class Look:
    """Tensors without gaps, and what is to be known of each, at the same place in the lists.

    Attributes:
        tensors: strided tensors, each of which fills a range of memory.
        places: what they are, and where they lie.
        whole: the look at the tensors that these are parts of, no two of which share an element;
            None where they are tensors of their own.
    """

    tensors: Sequence[Tensor]
    places: Places
    whole: Look | None = None

    @property
    def kinds(self) -> Kinds:
        """What the tensors are."""
        return self.places.kinds

    @property
    def owners(self) -> Sequence[Tensor]:
        """The tensors that these are parts of; else these."""
        return self.tensors if self.whole is None else self.whole.tensors

    def have_memory_of_their_own(self) -> bool:
        """Whether no two share an element, and only empty ones lie nowhere."""
        return (self if self.whole is None else self.whole).places.apart

    def at(self, positions: tuple[int, ...]) -> Look:
        """The look at some of the tensors."""
        places = self.places.at(positions)
        if places is self.places:
            return self
        return Look([self.tensors[each] for each in positions], places, self.whole)


def there(tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The tensors that are not None."""
    if NoneType not in set(map(type, tensors)):
        return cast(Sequence[Tensor], tensors)
    return [tensor for tensor in tensors if tensor is not None]


def positions_there(tensors: Sequence[Tensor | None]) -> list[int]:
    """The positions of the tensors that are not None."""
    return [position for position, tensor in enumerate(tensors) if tensor is not None]


def look(tensors: Sequence[Tensor], before: Places | None = None) -> Look | None:
    """Look at tensors; at every step, so without a Python loop.

    Args:
        tensors: any.
        before: what a look at an earlier step has found.

    Returns:
        None where one is of a type of its own, has gaps, or has no memory; or there are none.
    """
    if not tensors or not PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        row_major = all(map(Tensor.is_contiguous, tensors))
        if not (row_major or all(map(_is_dense, tensors))):
            return None
        addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    except RuntimeError:  # sparse, or without memory
        return None
    numels = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
    kinds = Kinds(list(map(_dtype, tensors)), numels, all(map(_is_cpu, tensors)))
    places = Places(kinds, addresses, row_major)
    return Look(tensors, places if before is None else before.or_again(places))


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a range of memory in one of torch's memory formats."""
    order = _CHANNELS_LAST.get(tensor.dim())
    return tensor.is_contiguous() or (
        order is not None and tensor.is_contiguous(memory_format=order)
    )
