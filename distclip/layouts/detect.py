"""The one dispatch point: which layout does this parameter have?"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import dtensor, fsdp1, names, plain
from distclip.layouts.names import Named
from distclip.layouts.piece import Described


def describe(named: Named) -> tuple[Named, list[Described]]:
    """Everything that the named parameters stand for.

    Returns:
        ``(name, tensor)`` of every logical parameter, where the tensor is the one that an optimizer
        steps (a flat one belongs to many), and in the same order its entry and local pieces.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
        ConfigurationError: two logical parameters of one name.
    """
    logical: Named = []
    described: list[Described] = []
    for name, parameter in named:
        for entry, pieces in detect(name, parameter):
            logical.append((entry.name, parameter))
            described.append((entry, pieces))
    names.refuse_repeated(logical)
    return logical, described


def detect(name: str, parameter: Tensor) -> list[Described]:
    """Entries and local pieces of ``parameter``, read off the tensor itself.

    One, except where a flat tensor stands for many parameters.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
    # These may look like plain tensors, and would be taken for whole ones.
    if fsdp1.is_flattened(parameter):
        return fsdp1.describe(name, parameter)
    if isinstance(parameter, DTensor):
        return [dtensor.describe(name, parameter)]
    if hasattr(parameter, "ds_tensor"):
        raise UnsupportedGradientError(
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3, which distclip cannot read "
            f"yet; use FSDP2, or ZeRO with DeepSpeed's own gradient_clipping"
        )
    return [plain.describe(name, parameter)]
