"""Questions about one tensor, whatever its layout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from distclip.layouts import dtensor_gradients, plain

Versions: TypeAlias = tuple[int, int]

_shape, _spec, _shard = map(operator.attrgetter, ("shape", "_spec", "_local_tensor"))


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is spread over ranks by torch itself (a ``DTensor``)."""
    return isinstance(tensor, DTensor)


def sharding_of(tensor: Tensor) -> object:
    """The shape, and of a DTensor its mesh and placements too; to be compared and hashed."""
    return tensor._spec if isinstance(tensor, DTensor) else tensor.shape


def is_partial(tensor: Tensor) -> bool:
    """Whether its values are spread over ranks as terms that are not summed yet."""
    return isinstance(tensor, DTensor) and any(
        isinstance(placement, Partial) for placement in tensor.placements
    )


def own(tensor: Tensor) -> Tensor:
    """The tensor object that lives and dies with ``tensor``: its shard, or itself if it is plain.

    For weak references: torch refuses to convert a DTensor (``model.cpu()``) while there are any to
    the DTensor itself. A conversion gives it another shard.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shardings_of(tensors: Sequence[Tensor]) -> list[object]:
    """:func:`sharding_of` each, without a Python loop where all are of one kind."""
    kinds: dict[bool | None, Callable[[Tensor], object]] = {True: _spec, False: _shape}
    return list(map(kinds.get(_are_sharded(tensors), sharding_of), tensors))


def owned(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """:func:`own` each, without a Python loop where all are of one kind."""
    sharded = _are_sharded(tensors)
    if sharded is False:
        return tensors
    return list(map(_shard if sharded else own, tensors))


def _are_sharded(tensors: Sequence[Tensor]) -> bool | None:
    """Whether all are DTensors, or none is; None where some are."""
    found = {issubclass(kind, DTensor) for kind in set(map(type, tensors))}
    return None if len(found) > 1 else found == {True}


def version_of(tensor: Tensor) -> int:
    """Counts the changes in place; a DTensor's shard has its own count.

    Always 0 for a tensor of ``torch.inference_mode()``, which has no count.
    """
    local = own(tensor)
    return 0 if local.is_inference() else local._version


def versions_of(tensor: Tensor) -> Versions:
    """How often it was changed in place, as a whole and by its shard: torch counts them apart."""
    return tensor._version, own(tensor)._version


def values_here(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor, without an autograd node."""
    if isinstance(tensor, DTensor):
        return dtensor_gradients.local_part(tensor)
    return tensor.detach()


def whole_values(tensor: Tensor) -> Tensor:
    """All values of a small tensor, on every rank; a collective where it is sharded."""
    return dtensor_gradients.replicated(tensor) if isinstance(tensor, DTensor) else tensor


def as_torch_returns(norm: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """A total norm in the form in which torch's own functions return it.

    Returns:
        A replicated DTensor where all parameters are DTensors of one mesh, since scripts call
        ``full_tensor()`` on it; ``norm`` itself otherwise.
    """
    meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in parameters}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None:
        return norm
    replicas = [Replicate()] * mesh.ndim
    return DTensor.from_local(norm.to(mesh.device_type), mesh, replicas, run_check=False)


def gradient_here(name: str, parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient; None if there is none.

    One that lies otherwise than its parameter is redistributed, which is a collective.

    Raises:
        UnsupportedGradientError: a gradient that cannot be measured or reduced; it is named.
    """
    read = plain.gradient_of
    if isinstance(parameter, DTensor):
        read = dtensor_gradients.gradient_moved_alone
    return read(name, partial(_itself, parameter))


def _itself(tensor: Tensor) -> Tensor:
    return tensor
