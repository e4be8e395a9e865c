"""The DTensor layout: FSDP2, HSDP, tensor and expert parallelism, any placements on any mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from distclip.errors import UnsupportedGradientError
from distclip.layouts import dtensor_gradients as gradients
from distclip.layouts import plain
from distclip.layouts.piece import (
    Box,
    Described,
    Entry,
    Holder,
    Layout,
    Piece,
    Slice,
    held,
)
from distclip.layouts.placements import local_spans, shard_boxes, shard_dim


def describe(name: str, parameter: DTensor, hold: Holder | None = None) -> Described:
    """Entry and local pieces of a DTensor parameter, held anew unless ``hold`` is given.

    A rank outside of the mesh has no piece. Replicated mesh dims count at coordinate 0.

    Raises:
        UnsupportedGradientError: placements that leave no well-defined pieces.
    """
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    shape = tuple(parameter.shape)
    _check_placements(name, placements)
    entry = _entry(name, parameter)
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
        (dim,) = entry.split_dims
        entry = replace(entry, slice=Slice(found[dim], whole=True))
        # Somewhere: where exactly, the ranks say to each other when a GradClipper is built.
        start = min(spans[dim][0][0] if spans[dim] else 0, shape[dim] - found[dim])
        spans[dim] = [(start, start + found[dim])]
    hold = held(parameter) if hold is None else hold
    gradient = partial(gradients.local_gradient, name, hold)
    weight = partial(gradients.local_weight, name, hold)
    return entry, [
        Piece(
            0,
            box,
            1.0 if owned else 0.0,
            gradient if whole else partial(_cut_gradient, gradient, local),
            weight if whole else partial(_cut, weight, local),
            parameter.requires_grad,
            hold,
            gradients.Moving(name, hold, whole),
        )
        for box, local, whole in shard_boxes(spans)
    ]


def _entry(name: str, parameter: DTensor) -> Entry:
    """What all ranks know of a DTensor parameter."""
    mesh, placements = parameter.device_mesh, parameter.placements
    cuts = {
        shard_dim(placement)
        for size, placement in zip(mesh.shape, placements, strict=True)
        if size > 1
    }
    return Entry(
        name,
        tuple(parameter.shape),
        str(parameter.dtype).removeprefix("torch."),
        tuple(sorted(dim for dim in cuts if dim is not None)),
        gradients.mesh_ranks(mesh),
        f"{tuple(mesh.shape)} {' '.join(map(str, placements))}",
        replicated=None in cuts,
        copies=None in cuts,
    )


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


def describe_tensor(name: str, tensor: DTensor) -> Described:
    """Entry and pieces of a DTensor that is measured itself (``get_total_norm``)."""
    check: partial[Tensor] = partial(plain.check_dense, name)
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        placements = [
            Replicate() if isinstance(placement, Partial) else placement
            for placement in tensor.placements
        ]
        try:
            gradients.refuse_partial(name, tensor)
            tensor = gradients.redistributed(tensor, placements)
        except (
            UnsupportedGradientError
        ) as error:  # raised when measured: the other ranks get a flag then
            check = partial(_refuse, error)
            tensor = DTensor.from_local(
                tensor.to_local(), tensor.device_mesh, placements, run_check=False
            )
    entry, pieces = describe(name, tensor, hold=held(tensor))
    return entry, [
        replace(piece, gradient=partial(_checked, check, piece), trainable=True, spread=None)
        for piece in pieces
    ]


def _refuse(error: UnsupportedGradientError, tensor: Tensor) -> Tensor:
    raise error


def _checked(check: partial[Tensor], piece: Piece) -> Tensor:
    return check(piece.weight())


def _found(name: str, parameter: Tensor) -> list[Described] | None:
    return [describe(name, parameter)] if isinstance(parameter, DTensor) else None


LAYOUT = Layout(_found, gradients.at_once, gradients.weights_at_once)
