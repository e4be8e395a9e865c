"""Gradients and weights of DTensors: this rank's shard of each, and bringing them into place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    Claimed,
    ClaimedWeights,
    Hold,
    Holder,
    MisplacedError,
    Piece,
)
from distclip.layouts.placements import local_spans

_mesh_ranks: WeakKeyDictionary[DeviceMesh, tuple[int, ...]] = WeakKeyDictionary()


def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """Global ranks of a mesh, in its order: one tuple, which all of its parameters share.

    Thousands of ranks times hundreds of parameters would be millions of numbers otherwise.
    """
    known = _mesh_ranks.get(mesh)
    if known is None:
        known = _mesh_ranks[mesh] = tuple(mesh.mesh.flatten().tolist())
    return known


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


_grad, _spec, _shard = map(operator.attrgetter, ("grad", "_spec", "_local_tensor"))


def _claim_dtensors(pieces: Sequence[Piece]) -> tuple[list[int], list[Hold]]:
    """The DTensors whose piece is all of their shard: their places and holds."""
    found = [
        (place, spread.hold)
        for place, piece in enumerate(pieces)
        if isinstance(spread := piece.spread, Moving) and spread.whole
    ]
    return [place for place, _ in found], [cast(Hold, hold) for _, hold in found]


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    """For :mod:`distclip.layouts.fetching`: DTensors whose piece is all of their shard."""
    places, holds = _claim_dtensors(pieces)
    specs = [_spec(hold()) for hold in holds]
    return (places, partial(_local_gradients, Hold.of_all(holds), specs)) if holds else None


def weights_at_once(pieces: Sequence[Piece]) -> ClaimedWeights | None:
    """As :func:`at_once`, for the weights of DTensor parameters."""
    places, holds = _claim_dtensors(pieces)
    return (places, partial(_local_weights, Hold.of_all(holds))) if holds else None


def _local_gradients(
    given: Callable[[], Sequence[Tensor]], specs: list[object]
) -> tuple[list[Tensor | None], None] | None:
    """All local gradients, where each lies as its parameter does."""
    with torch._C.DisableTorchFunctionSubclass():  # nothing to look up: twice as fast
        gradients = list(map(_grad, given()))
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
    return shards if same and set(map(type, shards)) == plain.TENSOR else None


def _local_weights(given: Callable[[], Sequence[Tensor]]) -> list[Tensor] | None:
    """All local weights at once; None where any of them needs a closer look."""
    shards = list(map(_shard, given()))
    return shards if set(map(type, shards)) == plain.TENSOR else None


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
    refuse_partial(name, gradient)


@dataclass(frozen=True, slots=True)
class Moving:
    """A DTensor parameter whose gradient may have other placements: a :class:`~.piece.Spread`."""

    name: str
    hold: Holder
    whole: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the parameter's mesh."""
        return mesh_ranks(self._parameter.device_mesh)

    @property
    def wanted(self) -> tuple[Placement, ...]:
        """The parameter's placements."""
        return tuple(self._parameter.placements)

    @property
    def _parameter(self) -> DTensor:
        return cast(DTensor, self.hold())

    def found(self) -> tuple[Placement, ...] | None:
        """Placements of the gradient on this rank."""
        gradient = self._parameter.grad
        return tuple(gradient.placements) if isinstance(gradient, DTensor) else None

    def check(self) -> None:
        """As :meth:`.piece.Spread.check`."""
        try:
            local_gradient(self.name, self.hold)
        except MisplacedError:
            return

    def align(self, found: Sequence[Placement]) -> None:
        """As :meth:`.piece.Spread.align`."""
        align(self.hold, found)

    def may_be_hooked(self, device: torch.device) -> bool:
        """As :meth:`.piece.Spread.may_be_hooked`.

        Under CPU offload a hook would make FSDP2 wait for the copy to the host.
        """
        parameter: Any = self._parameter
        return bool(
            parameter.requires_grad
            and parameter.is_leaf
            and parameter.device.type == parameter.device_mesh.device_type == device.type
        )


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


def refuse_partial(name: str, tensor: DTensor) -> None:
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
        found = cast(DTensor, hold().grad).placements
        align(hold, found)
        return local_gradient(name, hold)
