"""Questions about a gradient whose answer depends on the layout of its parameter."""

from __future__ import annotations

from torch import Tensor

from distclip.layouts import fsdp1


def owner_of(parameter: Tensor) -> Tensor:
    """The tensor whose ``.grad`` holds the gradient on every rank: mostly the parameter itself.

    Under FSDP1 it is the ``FlatParameter``: an original parameter has no gradient on the ranks
    where none of its elements lie.
    """
    return fsdp1.owner_of_gradient(parameter)


def is_uneven(parameter: Tensor) -> bool:
    """Whether some ranks may have a gradient of this parameter while others have none."""
    return fsdp1.is_flattened(parameter)


def is_reduced(parameter: Tensor) -> bool:
    """Whether the gradient, if there is one, is not the one of a backward under ``no_sync()``.

    True where the layout keeps no such gradient. The answer is the same on all ranks.
    """
    return fsdp1.is_reduced(parameter)
