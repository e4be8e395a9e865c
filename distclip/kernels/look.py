"""One look at the tensors of a step: all that their kinds, sizes and places say, asked once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import NoneType
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PLAIN = frozenset((Tensor, nn.Parameter))
"""Types whose elements lie where their address says."""
_dtype, _is_cpu = map(operator.attrgetter, ("dtype", "is_cpu"))
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
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
            and np.array_equal(self.numels, other.numels)
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
            self._some[positions] = known
        return known

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each."""
        widths = [dtype.itemsize for dtype in self.dtypes]
        return self.numels * np.array(widths, np.int64)


@dataclass(frozen=True, eq=False)
class Look:
    """What is to be known of tensors without gaps, each at the same place in the lists.

    Attributes:
        tensors: strided tensors, each of which fills a range of memory.
        kinds: what they are.
        addresses: int64, of the first element of each.
        row_major: whether all are contiguous; else some have their channels last.
        whole: the look at the tensors that these are parts of, no two of which share an element;
            None where they are tensors of their own.
    """

    tensors: Sequence[Tensor]
    kinds: Kinds
    addresses: npt.NDArray[np.int64]
    row_major: bool
    whole: Look | None = None

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtype of each tensor."""
        return self.kinds.dtypes

    @property
    def numels(self) -> npt.NDArray[np.int64]:
        """Int64, elements of each."""
        return self.kinds.numels

    @property
    def on_host(self) -> bool:
        """Whether all lie in host memory."""
        return self.kinds.on_host

    @property
    def owners(self) -> Sequence[Tensor]:
        """The tensors that these are parts of; else these."""
        return self.tensors if self.whole is None else self.whole.tensors

    def have_memory_of_their_own(self) -> bool:
        """Whether no two share an element, and only empty ones lie nowhere."""
        if self.whole is not None:
            return self.whole.have_memory_of_their_own()
        sizes = self.kinds.sizes
        order = self.addresses.argsort()
        starts, ends = self.addresses[order], sizes[order]
        del order  # a step takes most memory here
        ends += starts
        lost = bool(len(starts)) and starts[0] == 0 and bool(sizes[self.addresses == 0].any())
        return not lost and not bool((ends[:-1] > starts[1:]).any())

    def at(self, positions: tuple[int, ...]) -> Look:
        """The look at some of the tensors."""
        kinds = self.kinds.at(positions)
        if kinds is self.kinds:
            return self
        tensors = [self.tensors[each] for each in positions]
        addresses = self.addresses[list(positions)]
        return replace(self, tensors=tensors, kinds=kinds, addresses=addresses)

    def known(self, kinds: Kinds | None) -> Look:
        """This, with the very ``kinds`` of an earlier step where they are the same.

        What was made for those need not be compared, or made, again.
        """
        if kinds is None or kinds is self.kinds or kinds != self.kinds:
            return self
        return Look(self.tensors, kinds, self.addresses, self.row_major, self.whole)


def there(tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The tensors that are not None."""
    if NoneType not in set(map(type, tensors)):
        return cast(Sequence[Tensor], tensors)
    return [tensor for tensor in tensors if tensor is not None]


def look(tensors: Sequence[Tensor]) -> Look | None:
    """Look at tensors; at every step, so without a Python loop.

    Returns:
        None where one is of a type of its own, has gaps, or has no memory; or there are none.
    """
    if not tensors or not set(map(type, tensors)) <= PLAIN:
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
    return Look(tensors, kinds, addresses, row_major)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a range of memory in one of torch's memory formats."""
    order = _CHANNELS_LAST.get(tensor.dim())
    return tensor.is_contiguous() or (
        order is not None and tensor.is_contiguous(memory_format=order)
    )
