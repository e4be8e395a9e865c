"""The FSDP1 layout: ranges of a ``FlatParameter``, each taken apart into boxes.

``FullyShardedDataParallel`` lays the parameters of a module out in one flat buffer and gives every
rank an equal range of it, rows cut wherever the border falls. With ``use_orig_params=True`` the
optimizer sees this rank's part of every original parameter, without it one ``FlatParameter`` that
stands for all of them. Either way what is described here are the original parameters.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import flat, flat_views, placements
from distclip.layouts.flat_views import FlatCut, Source
from distclip.layouts.names import without_wrappers
from distclip.layouts.piece import Box, Described, Entry, Layout, Piece, shared_ranks, weakly_held

FLAT_NAME = "_flat_param"
"""What torch calls a ``FlatParameter`` within the module that it belongs to."""


def is_flattened(tensor: Tensor) -> bool:
    """Whether this is a ``FlatParameter``, or an original parameter that FSDP1 has flattened."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def owner_of_gradient(parameter: Tensor) -> Tensor:
    """The tensor whose ``.grad`` all ranks have at the same time: the ``FlatParameter``.

    An original parameter has none on the ranks where none of its elements lie. Anything that is
    not of FSDP1 is its own owner.
    """
    if not is_flattened(parameter):
        return parameter
    owner: Tensor = _locate("a parameter", parameter)[0].flat_param
    return owner


def is_reduced(parameter: Tensor) -> bool:
    """Whether the gradient, if there is one, is not the one of a backward under ``no_sync()``.

    True of anything that is not of FSDP1. The answer is the same on all ranks.
    """
    if not is_flattened(parameter):
        return True
    flattened: Any = owner_of_gradient(parameter)
    return flattened.grad is None or flat_views.flat_is_reduced(flattened)


def describe(name: str, parameter: Tensor) -> list[Described]:
    """Entries and local pieces of what ``parameter`` stands for.

    Args:
        name: clean name. The originals of a ``FlatParameter`` called ``layer._flat_param`` are
            called ``layer.weight`` and so on, those of one called ``0`` ``0.weight``.
        parameter: an original parameter (``use_orig_params=True``), or a ``FlatParameter``.

    Raises:
        UnsupportedGradientError: no ``FlatParamHandle`` knows it, or it is not sharded now.
    """
    handle, index = _locate(name, parameter)
    flat_views.refuse_unsharded(name, handle.flat_param)
    if index is not None:
        return [_describe(name, handle, index)]
    prefix = name.removesuffix(FLAT_NAME) if name.endswith(FLAT_NAME) else f"{name}."
    return [
        _describe(without_wrappers(f"{prefix}{name_within}"), handle, number)
        for number, name_within in enumerate(handle.flat_param._fqns)
    ]


# ---- whose parameter is it ----------------------------------------------------------------------

_known: dict[int, tuple[weakref.ref[Any], int | None]] = {}
"""By id of a parameter: its handle, and which of the handle's originals it is (None: the flat
one). An id may have been given to another tensor since: what is found is checked."""


def _locate(name: str, parameter: Tensor) -> tuple[Any, int | None]:
    """The ``FlatParamHandle`` of a parameter, and the parameter's index in it.

    torch leaves no way from a parameter to its handle, so the handles themselves are looked for
    among the live objects, once for all parameters there are.
    """
    found = _recall(parameter)
    if found is None:
        _known.clear()
        _remember(_live_handles())
        found = _recall(parameter)
    if found is None:
        raise UnsupportedGradientError(
            f"parameter {name!r} was flattened by FSDP1 (FullyShardedDataParallel), but no "
            f"FlatParamHandle in this process has it: its module is gone or was copied, its "
            f"parameters were replaced, the model is between forward and backward, or gc.freeze() "
            f"hides it. Take the parameters from the wrapped model, after wrapping and not within "
            f"a step (and before gc.freeze())"
        )
    return found


def _recall(parameter: Tensor) -> tuple[Any, int | None] | None:
    reference, index = _known.get(id(parameter), (None, None))
    handle = reference() if reference is not None else None
    if handle is None:
        return None
    tensor = handle.flat_param if index is None else handle.flat_param._params[index]
    if tensor is parameter:
        return handle, index
    shared = handle.flat_param._shared_params or ()
    return (handle, index) if any(each is parameter for each in shared) else None


def _remember(handles: Iterable[Any]) -> None:
    for handle in handles:
        reference, flattened = weakref.ref(handle), handle.flat_param
        _known[id(flattened)] = (reference, None)
        places: dict[tuple[int, str], int] = {}
        for index, (parameter_name, module, _) in enumerate(flattened._param_infos):
            places[id(module), parameter_name] = index
        for index, parameter in enumerate(flattened._params or ()):
            _known[id(parameter)] = (reference, index)
        for parameter, info in zip(
            flattened._shared_params or (), flattened._shared_param_infos, strict=False
        ):
            primary = places[id(info.prim_module), info.prim_param_name]
            _known.setdefault(id(parameter), (reference, primary))


def _live_handles() -> list[Any]:
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    # By exact type: isinstance() would run code of whatever lives in this process.
    return [each for each in gc.get_objects() if type(each) is FlatParamHandle]


# ---- where its elements lie ---------------------------------------------------------------------


def _describe(name: str, handle: Any, index: int) -> Described:
    """Entry and pieces of one original parameter."""
    # Long: an entry and its pieces follow from the same handle.
    flattened = handle.flat_param
    local = tuple(flattened._shapes[index])
    spec = flattened._param_extensions[index]
    sharded = bool(handle.uses_sharded_strategy)
    # How many elements of the buffer each rank has, and from where in it this parameter begins.
    part = flattened._sharded_size.numel()
    start, numel = _starts(flattened)[index], math.prod(local)
    borders = [rank * part - start for rank in range(1, handle.world_size)] if sharded else []
    shard = dist.get_process_group_ranks(handle.process_group) if sharded else None
    if spec is None:
        shape, offsets, owned, ranks = local, (0,) * len(local), True, shard
    else:
        shape, offsets, owned, ranks = _within_mesh(name, handle, spec, local)
    memory = _memory_order(name, local, flattened._strides[index])
    split = {memory[dim] for dim in flat.split_dims([local[dim] for dim in memory], borders)}
    if any(each is not None for each in flattened._param_extensions):
        # Shards of an uneven DTensor differ in size, and with them where the borders fall: other
        # ranks may have other cuts than this one knows of.
        split = {dim for dim, extent in enumerate(shape) if extent > 1}
    entry = Entry(
        name,
        shape,
        str(flattened.dtype).removeprefix("torch."),
        tuple(sorted(split)),
        None if ranks is None else shared_ranks(tuple(sorted(ranks))),
        f"FSDP1 {handle._sharding_strategy.name}" + ("" if spec is None else f" {spec.placements}"),
        copies=spec is not None
        and any(
            size > 1 and placements.shard_dim(placement) is None
            for size, placement in zip(spec.mesh.shape, spec.placements, strict=True)
        ),
    )
    low = max(borders[handle.rank - 1] if sharded and handle.rank else -start, 0)
    high = min(part * (handle.rank + 1 if sharded else 1) - start, numel)
    original = flattened._params is not None
    source = Source(
        name,
        weakly_held(flattened),
        index if original else None,
        max(high - low, 0) if original else part,
        spec is not None,
    )
    first = 0 if original else max(start - part * (handle.rank if sharded else 0), 0)
    found = flat.range_boxes([local[dim] for dim in memory], low, high) if low < high else []
    trainable = flattened._params[index].requires_grad if original else flattened.requires_grad
    pieces = []
    for box, place in found:
        cut = FlatCut.of(source, first + place, box.extents, memory)
        pieces.append(
            Piece(
                0,
                _in_logical(box, memory, offsets),
                1.0 if owned else 0.0,
                cut.gradient,
                cut.weight,
                trainable,
                source.hold,
            )
        )
    return entry, pieces


def _starts(flattened: Any) -> list[int]:
    """Where each original parameter begins in the unsharded buffer, past the padding."""
    numels = flattened._numels_with_padding
    starts = accumulate(numels, initial=0)
    return [
        start
        for start, padding in zip(starts, flattened._is_padding_mask, strict=False)
        if not padding
    ]


def _memory_order(name: str, shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dims from the outermost in memory to the innermost: the buffer has memory order."""
    order = sorted(range(len(shape)), key=lambda dim: -stride[dim])
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            raise UnsupportedGradientError(
                f"parameter {name!r} of shape {list(shape)} had the strides {list(stride)} when "
                f"FSDP1 flattened it, with gaps or overlaps; make it contiguous before wrapping"
            )
        expected *= shape[dim]
    return tuple(order)


def _in_logical(box: Box, memory: Sequence[int], offsets: Sequence[int]) -> Box:
    """A box of the local tensor in memory order, as a box of the logical tensor."""
    low, extents = [0] * len(memory), [0] * len(memory)
    for place, dim in enumerate(memory):
        low[dim] = box.offsets[place] + offsets[dim]
        extents[dim] = box.extents[place]
    return Box(tuple(low), tuple(extents))


def _within_mesh(
    name: str, handle: Any, spec: Any, local: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], bool, list[int]]:
    """FSDP1 over a DTensor (tensor parallelism): which part of the whole ``local`` is.

    Returns:
        Logical shape, where the DTensor's shard begins in it, whether this rank owns that shard,
        and all ranks that the tensor is spread over.
    """
    shape, coordinate = tuple(spec.shape), spec.mesh.get_coordinate()
    spans = placements.local_spans(shape, tuple(spec.mesh.shape), coordinate, spec.placements)
    extents = [sum(stop - start for start, stop in dim) for dim in spans]
    if any(len(dim) > 1 for dim in spans) or extents != list(local):
        raise UnsupportedGradientError(
            f"{name!r}: FSDP1 has flattened a shard of shape {list(local)} of a DTensor with "
            f"placements {spec.placements}; distclip cannot tell which elements these are"
        )
    owned = all(
        placements.shard_dim(placement) is not None or coordinate[dim] == 0
        for dim, placement in enumerate(spec.placements)
    )
    tensor_parallel = spec.mesh.mesh.flatten().tolist()
    sharded = [dist.get_rank()]
    if handle.uses_sharded_strategy:
        sharded = dist.get_process_group_ranks(handle.process_group)
    ranks = _grid(_root(spec.mesh).mesh, set(tensor_parallel), set(sharded))
    if len(ranks) != len(tensor_parallel) * len(sharded):
        raise UnsupportedGradientError(
            f"{name!r} is sharded by FSDP1 over ranks {sharded} and by its DTensor over ranks "
            f"{tensor_parallel}, which are not two dims of one mesh; give FSDP1 a dim of the mesh "
            f"that the model was parallelized with: FSDP(..., device_mesh=mesh['dp'])"
        )
    return shape, tuple(dim[0][0] if dim else 0 for dim in spans), owned, ranks


def _root(mesh: Any) -> Any:
    """The mesh that a mesh was sliced out of; itself, if it was made whole."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # torch 2.9

    return _mesh_resources.get_root_mesh(mesh)


def _grid(mesh: Tensor, first: set[int], second: set[int]) -> list[int]:
    """The ranks of the mesh that two sets of ranks through this one span."""
    here = (mesh == dist.get_rank()).nonzero()[0].tolist()
    chosen = mesh
    for dim in reversed(range(mesh.dim())):
        through = [*here[:dim], slice(None), *here[dim + 1 :]]
        line = set(mesh[tuple(through)].tolist())
        if not (line <= first or line <= second):
            chosen = chosen.select(dim, here[dim])
    return [int(rank) for rank in chosen.flatten().tolist()]


def _found(name: str, parameter: Tensor) -> list[Described] | None:
    return describe(name, parameter) if is_flattened(parameter) else None


LAYOUT = Layout(_found, flat_views.at_once, fingerprint=is_flattened)
