"""The one dispatch point: which layout does this parameter have?"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.layouts import dtensor, plain
from distclip.layouts.piece import Described


def detect(name: str, parameter: Tensor) -> Described:
    """Entry and local pieces of ``parameter``, read off the tensor itself.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
    if isinstance(parameter, DTensor):
        return dtensor.describe(name, parameter)
    return plain.describe(name, parameter)
