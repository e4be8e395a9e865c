"""The one dispatch point: which layout does this parameter have?

A new layout is a file with a :class:`~distclip.layouts.piece.Layout`, and its line in
:data:`LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import declared, dtensor, fsdp1, fsdp2, names, plain, tensors, zero
from distclip.layouts.names import Named
from distclip.layouts.piece import Described, Entry, Layout

LAYOUTS: list[Layout] = [
    zero.LAYOUT,
    fsdp1.LAYOUT,
    dtensor.LAYOUT,
    declared.LAYOUT,
    plain.LAYOUT,
]
"""Asked in this order: the last one takes any tensor, and some parameters of the others look plain
and would be taken for whole ones."""


def refuse_stepped_in_backward(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that ``torch.distributed.optim._apply_optimizer_in_backward`` steps.

    Raises:
        UnsupportedGradientError: it is named.
    """
    if getattr(parameter, "_in_backward_optimizers", None):
        raise UnsupportedGradientError(
            f"parameter {name!r} is stepped during backward (_apply_optimizer_in_backward): its "
            f"gradient is gone before the others are there, so no norm over the model can clip it; "
            f"use an optimizer that steps after backward"
        )


def refuse_dummy(optimizer: object) -> None:
    """Refuse the optimizer that ``transformers`` puts in the place of layer-wise ones.

    Raises:
        UnsupportedGradientError: it is none that steps.
    """
    if type(optimizer).__name__ == "LayerWiseDummyOptimizer":
        raise UnsupportedGradientError(
            "LayerWiseDummyOptimizer steps nothing: with a layer-wise optimizer (optim="
            "'galore_adamw_layerwise' and the like) each parameter is updated during backward, "
            "before the gradients of the others are there, so no norm over the model can clip it; "
            "use the same optimizer without 'layerwise'"
        )


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


def describe_tensor(name: str, tensor: Tensor) -> Described:
    """The entry and pieces of a tensor that is measured itself, and not its gradient."""
    if tensors.is_sharded(tensor):
        return dtensor.describe_tensor(name, cast(DTensor, tensor))
    return plain.describe_tensor(name, tensor)


def detect(name: str, parameter: Tensor) -> list[Described]:
    """Entries and local pieces of ``parameter``, read off the tensor itself.

    One, except where a flat tensor stands for many parameters.

    Raises:
        ConfigurationError: a parameter without values or a shape yet; it is named.
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
    names.refuse_meta([(name, parameter)])
    refuse_stepped_in_backward(name, parameter)
    found = (layout.describe(name, parameter) for layout in LAYOUTS)
    return list(next(each for each in found if each is not None))


def sharding_kinds(entries: Iterable[Entry], here: Mapping[str, Tensor]) -> list[str]:
    """How the parameters of a plan lie on ranks, for a message: ``["FSDP2"]``.

    Returns:
        Each kind once, in the order of the parameters; none where all are replicas.
    """
    found: dict[str, None] = {}
    by_fsdp2 = fsdp2.known_to_fsdp2(here.values())
    elsewhere = False
    for entry in entries:
        parameter = here.get(entry.name)
        if entry.layout.startswith(("FSDP1", "ZeRO")):
            found[entry.layout.split(" [")[0].split(" (")[0]] = None
        elif tensors.is_sharded(parameter):
            found["FSDP2" if id(parameter) in by_fsdp2 else "DTensor"] = None
        elif entry.others:
            found["experts"] = None
        elsewhere = elsewhere or (parameter is None and not entry.others)
    return [*found, *(["stages"] if elsewhere else [])]


def is_whole(parameter: Tensor) -> bool:
    """Whether this rank has all of the parameter and its gradient is in ``.grad``."""
    sharded = any(layout.describe("", parameter) is not None for layout in LAYOUTS[:-1])
    return not sharded and not plain.has_main_gradient(parameter)
