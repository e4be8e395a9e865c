"""One look at the tensors of a step: all that their kinds, sizes and places say, asked once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
class Look:
    """What is to be known of tensors without gaps, each at the same place in the lists.

    Attributes:
        tensors: strided tensors, each of which fills a range of memory.
        dtypes: of each.
        numels: elements of each.
        addresses: int64, of the first element of each.
        on_host: whether all lie in host memory.
        row_major: whether all are contiguous; else some have their channels last.
        owners: the tensors that these are views of, where they are views; else these.
    """

    tensors: Sequence[Tensor]
    dtypes: list[torch.dtype]
    numels: list[int]
    addresses: npt.NDArray[np.int64]
    on_host: bool
    row_major: bool
    owners: Sequence[Tensor]

    def have_memory_of_their_own(self) -> bool:
        """Whether no two share an element, and only empty ones lie nowhere."""
        kinds = set(self.dtypes)
        numels = np.array(self.numels, np.int64)
        if len(kinds) == 1:
            sizes = numels * kinds.pop().itemsize
        else:
            sizes = numels * np.array([each.itemsize for each in self.dtypes], np.int64)
        order = np.argsort(self.addresses)
        starts = self.addresses[order]
        ends = starts + sizes[order]
        lost = bool(len(starts)) and starts[0] == 0 and bool(sizes[self.addresses == 0].any())
        return not lost and not bool((ends[:-1] > starts[1:]).any())

    def at(self, positions: list[int]) -> Look:
        """The look at some of the tensors."""
        tensors = [self.tensors[each] for each in positions]
        return replace(
            self,
            tensors=tensors,
            owners=tensors if self.owners is self.tensors else self.owners,
            dtypes=[self.dtypes[each] for each in positions],
            numels=[self.numels[each] for each in positions],
            addresses=self.addresses[positions],
        )


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
    return Look(
        tensors,
        list(map(_dtype, tensors)),
        list(map(Tensor.numel, tensors)),
        addresses,
        all(map(_is_cpu, tensors)),
        row_major,
        tensors,
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills a range of memory in one of torch's memory formats."""
    order = _CHANNELS_LAST.get(tensor.dim())
    return tensor.is_contiguous() or (
        order is not None and tensor.is_contiguous(memory_format=order)
    )
