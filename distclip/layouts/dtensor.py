"""The DTensor layout: FSDP2, HSDP, tensor and expert parallelism, any placements on any mesh."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import (  # type: ignore[attr-defined]
    DeviceMesh,
    DTensor,
    Partial,
    Placement,
    Replicate,
)

from distclip.errors import UnsupportedGradientError
from distclip.layouts import plain
from distclip.layouts.piece import (
    Box,
    Claimed,
    Described,
    Entry,
    Holder,
    Layout,
    MisplacedError,
    Piece,
    Slice,
    held,
)
from distclip.layouts.placements import boxes, local_spans, shard_dim


def describe(name: str, parameter: DTensor, hold: Holder | None = None) -> Described:
    """Entry and local pieces of a DTensor parameter, held weakly unless ``hold`` is given.

    A rank outside of the mesh has no piece. Replicated mesh dims count at coordinate 0.

    Raises:
        UnsupportedGradientError: placements that leave no well-defined pieces.
    """
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    shape = tuple(parameter.shape)
    _check_placements(name, placements)
    split = {
        dim
        for size, placement in zip(mesh.shape, placements, strict=True)
        if (dim := shard_dim(placement)) is not None and size > 1
    }
    replicated = any(
        size > 1 and shard_dim(placement) is None
        for size, placement in zip(mesh.shape, placements, strict=True)
    )
    entry = Entry(
        name,
        shape,
        str(parameter.dtype).removeprefix("torch."),
        tuple(sorted(split)),
        mesh_ranks(mesh),
        f"{tuple(mesh.shape)} {' '.join(map(str, placements))}",
        replicated=replicated,
        copies=replicated,
    )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return entry, ()
    owned = all(
        shard_dim(placement) is not None or coordinate[dim] == 0
        for dim, placement in enumerate(placements)
    )
    spans = local_spans(shape, tuple(mesh.shape), coordinate, placements)
    local_shape = tuple(sum(stop - start for start, stop in dim) for dim in spans)
    found = tuple(parameter._local_tensor.shape)
    if local_shape != found:
        if not _is_slice(parameter, found):
            raise UnsupportedGradientError(
                f"{name!r}: placements {placements} on a mesh of shape {tuple(mesh.shape)} give "
                f"this rank a shard of shape {local_shape}, but it holds {found}; distclip cannot "
                f"tell which elements these are (it can on a mesh of one dim that cuts one dim)"
            )
        (dim,) = split
        entry = replace(entry, slice=Slice(found[dim], whole=True))
        # Somewhere: where exactly, the ranks say to each other when a GradClipper is built.
        start = min(spans[dim][0][0] if spans[dim] else 0, shape[dim] - found[dim])
        spans[dim] = [(start, start + found[dim])]
    hold = held(parameter) if hold is None else hold
    gradient = partial(local_gradient, name, hold)
    weight = partial(local_weight, name, hold)
    return entry, [
        Piece(
            0,
            box,
            1.0 if owned else 0.0,
            gradient if whole else partial(_cut_gradient, gradient, local),
            weight if whole else partial(_cut, weight, local),
            parameter.requires_grad,
            hold if whole else None,
            hold,
        )
        for box, local, whole in boxes(spans)
    ]


def _is_slice(parameter: DTensor, found: Sequence[int]) -> bool:
    """Whether a shard that is not as ``torch.chunk`` cuts is still one of consecutive slices."""
    mesh, (placement, *others) = parameter.device_mesh, parameter.placements
    dim = shard_dim(placement)
    if others or mesh.size() == 1 or dim is None or type(placement).__name__.startswith("_Strided"):
        return False
    fits = (have == want for have, want in zip(found, parameter.shape, strict=True))
    return found[dim] <= parameter.shape[dim] and all(
        fit or number == dim for number, fit in enumerate(fits)
    )


_mesh_ranks: WeakKeyDictionary[DeviceMesh, tuple[int, ...]] = WeakKeyDictionary()


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """Global ranks of a mesh, in its order: one tuple, which all of its parameters share.

    Thousands of ranks times hundreds of parameters would be millions of numbers otherwise.
    """
    known = _mesh_ranks.get(mesh)
    if known is None:
        known = _mesh_ranks[mesh] = tuple(mesh.mesh.flatten().tolist())
    return known


def _check_placements(name: str, placements: Sequence[Placement]) -> None:
    for placement in placements:
        if isinstance(placement, Partial):
            raise UnsupportedGradientError(
                f"{name!r} is itself a Partial DTensor ({tuple(placements)}): its value is spread "
                f"over ranks as unreduced terms; redistribute it to Shard or Replicate first"
            )
        if not isinstance(placement, Replicate) and not hasattr(placement, "dim"):
            raise UnsupportedGradientError(
                f"{name!r} has a placement that distclip does not know: {placement!r}"
            )


def _cut(fetch: partial[Tensor], local: Box) -> Tensor:
    tensor = fetch()
    for dim, (offset, extent) in enumerate(zip(local.offsets, local.extents, strict=True)):
        tensor = tensor.narrow(dim, offset, extent)
    return tensor


def _cut_gradient(fetch: partial[Tensor | None], local: Box) -> Tensor | None:
    gradient = fetch()
    return None if gradient is None else _cut(partial(_itself, gradient), local)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def local_weight(name: str, hold: Holder) -> Tensor:
    """This rank's shard of the weights; see :func:`distclip.layouts.plain.values_of`."""
    return plain.values_of(name, local_part(cast(DTensor, hold())).detach())


def local_part(tensor: DTensor) -> Tensor:
    """The shard itself, without an autograd node, and waited for if still on its way."""
    local: Tensor = tensor._local_tensor
    if type(local) is Tensor:
        return local
    wait = getattr(local, "wait", None)  # an AsyncCollectiveTensor
    return cast(Tensor, wait()) if wait is not None else local


TENSOR = {Tensor}
_grad, _spec, _shard = map(operator.attrgetter, ("grad", "_spec", "_local_tensor"))


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    """For :mod:`distclip.layouts.fetching`: DTensors whose piece is all of their shard."""
    places = [place for place, piece in enumerate(pieces) if piece.hold is not None]
    holds = [piece.hold for piece in pieces if piece.hold is not None]
    specs = [_spec(hold()) for hold in holds]
    return (places, partial(_gradients, holds, specs)) if holds else None


def _gradients(
    holds: Sequence[Holder], specs: list[object]
) -> tuple[list[Tensor | None], None] | None:
    """All local gradients, where each lies as its parameter does."""
    with torch._C.DisableTorchFunctionSubclass():  # nothing to look up: twice as fast
        gradients = list(map(_grad, [hold() for hold in holds]))
    if NoneType not in set(map(type, gradients)):
        shards = _shards(gradients, specs)
        return None if shards is None else (shards, None)
    places = [place for place, gradient in enumerate(gradients) if gradient is not None]
    shards = _shards([gradients[each] for each in places], [specs[each] for each in places])
    if not shards:
        return None
    found: list[Tensor | None] = [None] * len(gradients)
    for place, shard in zip(places, shards, strict=True):
        found[place] = shard
    return found, None


def _shards(gradients: Sequence[Any], specs: list[object]) -> list[Tensor | None] | None:
    """The local tensors of gradients that have these specs; None where any is unusual."""
    try:
        # FSDP2 gives the gradient the parameter's own spec object: then this is quick too.
        same = list(map(_spec, gradients)) == specs
        shards: list[Tensor | None] = list(map(_shard, gradients))
    except AttributeError:  # a plain tensor
        return None
    return shards if same and set(map(type, shards)) == TENSOR else None


def quick_weights(holds: Sequence[Holder]) -> list[Tensor] | None:
    """All local weights at once; None where any of them needs a closer look."""
    shards = list(map(_shard, [hold() for hold in holds]))
    return shards if set(map(type, shards)) == TENSOR else None


def local_gradient(name: str, hold: Holder) -> Tensor | None:
    """This rank's shard of the gradient, in the parameter's own placements; None if there is none.

    Raises:
        MisplacedError: autograd left it in other placements (``Partial`` under tensor
            parallelism); to redistribute it (:func:`align`) takes all ranks of the mesh.
        UnsupportedGradientError: a plain, sparse or meta gradient, or one that cannot be reduced.
    """
    parameter: Any = hold()  # untyped: this runs once per parameter and step
    gradient = parameter.grad
    if gradient is None:
        return None
    if not isinstance(gradient, DTensor):
        raise UnsupportedGradientError(
            f"{name!r} is a DTensor but its gradient is a plain tensor of shape "
            f"{tuple(gradient.shape)}: whether that is a shard or the whole cannot be told; "
            f"assign a DTensor gradient with the parameter's placements"
        )
    # FSDP2 gives the gradient the parameter's own spec object: then one comparison does.
    found, wanted = gradient._spec, parameter._spec
    if found is not wanted and (
        found.placements != wanted.placements
        or (found.mesh is not wanted.mesh and found.mesh != wanted.mesh)
    ):
        check_movable(name, gradient, parameter)
        raise MisplacedError(name)
    local: Tensor = gradient._local_tensor
    if type(local) is Tensor and local.layout is torch.strided and not local.is_meta:
        return local
    return plain.check_dense(name, local_part(gradient))


def check_movable(name: str, gradient: DTensor, parameter: DTensor) -> None:
    """Refuse a gradient that no redistribution brings to its parameter's placements."""
    if gradient.device_mesh != parameter.device_mesh:
        raise UnsupportedGradientError(
            f"the gradient of {name!r} lives on another device mesh ({gradient.device_mesh}) than "
            f"the parameter ({parameter.device_mesh}); redistribute it before clipping"
        )
    reduced(name, gradient)


def found_placements(hold: Holder) -> tuple[Placement, ...] | None:
    """Placements of the gradient on this rank, None where there is none; for all to compare."""
    gradient = hold().grad
    return tuple(gradient.placements) if isinstance(gradient, DTensor) else None


def align(hold: Holder, placements: Sequence[Placement]) -> None:
    """Redistribute a gradient from ``placements`` to its parameter's own; zeros if it is missing.

    A collective over the parameter's mesh. ``parameter.grad`` is replaced by the result: the same
    tensor, now fully reduced.
    """
    parameter: Any = hold()
    gradient = parameter.grad
    if gradient is None:
        shape = list(parameter.shape)
        spans = local_spans(
            shape,
            tuple(parameter.device_mesh.shape),
            parameter.device_mesh.get_coordinate(),
            [Replicate() if isinstance(each, Partial) else each for each in placements],
        )
        local = parameter._local_tensor.new_zeros(
            [sum(stop - start for start, stop in dim) for dim in spans]
        )
        gradient = DTensor.from_local(
            local,
            parameter.device_mesh,
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    parameter.grad = redistributed(gradient, parameter.placements)


def redistributed(tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """``tensor`` in other placements, without an autograd node."""
    with torch.no_grad():
        return cast(DTensor, tensor.detach()).redistribute(placements=placements)


def replicated(tensor: DTensor) -> Tensor:
    """The whole of a small DTensor, on every rank of its mesh; what is ``Partial`` is reduced."""
    return local_part(redistributed(tensor, [Replicate()] * tensor.device_mesh.ndim))


def reduced(name: str, tensor: DTensor) -> None:
    """Refuse ``Partial`` placements that no reduction turns into the tensor's value."""
    for placement in tensor.placements:
        if isinstance(placement, Partial) and (
            type(placement) is not Partial or placement.reduce_op not in ("sum", "avg")
        ):
            raise UnsupportedGradientError(
                f"the gradient of {name!r} is {placement!r}: unreduced terms that distclip cannot "
                f"add up (only Partial sum and avg can be reduced); redistribute it yourself"
            )


def gradient_moved_alone(name: str, hold: Holder) -> Tensor | None:
    """As :func:`local_gradient`, but one that lies otherwise is redistributed here and now.

    That is a collective over its mesh: all of its ranks must have this gradient, and ask for it.

    Raises:
        UnsupportedGradientError: a gradient that cannot be measured or reduced.
    """
    try:
        return local_gradient(name, hold)
    except MisplacedError:
        found = found_placements(hold)
        assert found is not None
        align(hold, found)
        return local_gradient(name, hold)


def describe_tensor(name: str, tensor: DTensor) -> Described:
    """Entry and pieces of a DTensor that is measured itself (``get_total_norm``)."""
    check: partial[Tensor] = partial(plain.check_dense, name)
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        placements = [
            Replicate() if isinstance(placement, Partial) else placement
            for placement in tensor.placements
        ]
        try:
            reduced(name, tensor)
            tensor = redistributed(tensor, placements)
        except UnsupportedGradientError as error:  # raised when measured: others hear of it then
            check = partial(_refuse, error)
            tensor = DTensor.from_local(
                tensor.to_local(), tensor.device_mesh, placements, run_check=False
            )
    entry, pieces = describe(name, tensor, hold=partial(_itself, tensor))
    return entry, [
        Piece(0, piece.box, piece.share, partial(_checked, check, piece), piece.weight)
        for piece in pieces
    ]


def _refuse(error: UnsupportedGradientError, tensor: Tensor) -> Tensor:
    raise error


def _checked(check: partial[Tensor], piece: Piece) -> Tensor:
    return check(piece.weight())


def _found(name: str, parameter: Tensor) -> list[Described] | None:
    return [describe(name, parameter)] if isinstance(parameter, DTensor) else None


LAYOUT = Layout(_found, at_once)
