"""The ZeRO layout: which elements of which parameter lie where in DeepSpeed's flat buffers.

DeepSpeed keeps gradients and fp32 master weights in flat buffers that are cut across ranks without
regard to rows, and each of its optimizer wrappers keeps the books in its own way (read here from
attributes; DeepSpeed itself is not imported). Each way is described by :class:`Stretch`, and
stretches become ordinary pieces. Read on 0.16.9, 0.18.0 and 0.19.8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from distclip.errors import UnsupportedGradientError
from distclip.layouts import declared, flat, plain
from distclip.layouts.boxes import Boxes
from distclip.layouts.piece import Claimed, Described, Entry, Layout, Piece

_marked: Any = WeakIdKeyDictionary()
"""Parameter -> Extent. Not an attribute: those travel with copies and pickles of a model."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive elements of one parameter, in row-major order, that this rank steps.

    Attributes:
        start: index of the first in the parameter.
        numel: how many.
        owner: the tensor that the inner torch optimizer steps (fp32 master weights, flat).
        offset: where the stretch begins in it.
        gradient: gives these elements' gradient before the step, or None: flat, or all of the
            parameter in its own shape.
    """

    start: int
    numel: int
    owner: Tensor
    offset: int
    gradient: Callable[[], Tensor | None]


@dataclass(frozen=True, slots=True)
class Extent:
    """How one parameter lies on the ranks.

    Attributes:
        stretches: what of it lies here.
        borders: where another rank's part begins, as indices of elements.
        ranks: global ranks that hold a part; None where every rank holds all of it.
        words: for messages.
    """

    stretches: tuple[Stretch, ...]
    borders: tuple[int, ...] = ()
    ranks: tuple[int, ...] | None = None
    words: str = "ZeRO"


@dataclass(frozen=True, slots=True)
class StretchBox:
    """A box within a stretch; called, it gives the box's gradient."""

    stretch: Stretch
    first: int
    extents: tuple[int, ...]
    name: str

    def __call__(self) -> Tensor | None:
        whole = self.stretch.gradient()
        return None if whole is None else self.view_of(plain.check_dense(self.name, whole))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.extents)

    def is_row_major(self) -> bool:
        """Whether its elements lie in row-major order."""
        return True

    def view_of(self, whole: Tensor) -> Tensor:
        """The box out of the stretch's gradient, or that itself where it has kept its shape."""
        return whole if whole.shape == self.extents else self._of(whole.reshape(-1), self.first)

    def of_owner(self, buffer: Tensor) -> Tensor:
        """The box in a flat tensor laid out like the owner: its gradient or its values."""
        return self._of(buffer.view(-1), self.stretch.offset + self.first)

    def weight(self) -> Tensor:
        """The box of the fp32 master weights."""
        return self.of_owner(self.stretch.owner.detach())

    def _of(self, buffer: Tensor, first: int) -> Tensor:
        return buffer[first : first + self.numel].view(self.extents)


def mark(parameter: Tensor, extent: Extent | None) -> None:
    """Say how a parameter lies; None forgets it."""
    if extent is not None:
        _marked[parameter] = extent
    else:
        _marked.pop(parameter, None)


def extent_of(parameter: Tensor) -> Extent | None:
    """Where a parameter lies in ZeRO's flat buffers, as :func:`mark` recorded it."""
    return cast("Extent | None", _marked.get(parameter))


def describe(name: str, parameter: Tensor, extent: Extent) -> Described:
    """Entry and local pieces of a marked parameter; an expert is called ``name@place``.

    Raises:
        UnsupportedGradientError: a slice of a tensor (Megatron's tensor parallelism).
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    spread = declared.spread_of(name, parameter) or declared.DeclaredSpread()
    if len(spread.slices) > 1:
        raise UnsupportedGradientError(
            f"parameter {name!r} is a slice of a tensor (tensor parallelism) in a DeepSpeed "
            f"engine, which distclip was not run with; use ZeRO alone, or FSDP2 with DTensor"
        )
    others = spread.others if len(spread.others) > 1 else ()
    entry = Entry(
        f"{name}@{others.index(dist.get_rank())}" if others else name,
        shape,
        str(parameter.dtype).removeprefix("torch."),
        flat.split_dims(shape, extent.borders),
        extent.ranks,
        extent.words,
        others,
    )
    pieces = []
    for stretch in extent.stretches:
        stop = stretch.start + stretch.numel
        for box, first in flat.range_boxes(shape, stretch.start, stop):
            cut = StretchBox(stretch, first, box.extents, name)
            pieces.append(Piece(0, box, 1.0, cut, cut.weight, parameter.requires_grad))
    return entry, pieces


# ---- one reader for each of DeepSpeed's wrappers ----------------------------------------------


def extents(optimizer: Any, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Extent]]:
    """How the trained parameters lie under ``engine.optimizer``.

    Args:
        optimizer: one of DeepSpeed's wrappers, or a torch optimizer (stage 0 in fp32).
        parameters: the engine's parameters that require a gradient.

    Raises:
        UnsupportedGradientError: a wrapper that distclip does not know, by name.
    """
    kind = type(optimizer).__name__
    if kind in READERS:
        return list(READERS[kind](optimizer))
    if isinstance(optimizer, torch.optim.Optimizer):
        return [(p, _whole(p, p, 0)) for p in parameters]
    raise UnsupportedGradientError(
        f"distclip does not know DeepSpeed's optimizer wrapper {type(optimizer).__module__}."
        f"{kind}; it reads {', '.join(READERS)} and plain torch optimizers. Run without "
        f"distclip, or with ZeRO stage 1, 2 or 3 without the option that brings this wrapper"
    )


def _stage_1_and_2(optimizer: Any) -> Iterator[tuple[Tensor, Extent]]:
    """Partitions of each group's flat buffer. ``_hp_mapping`` is wrong under round robin."""
    for i, owner in enumerate(optimizer.single_partition_of_fp32_groups):
        group = optimizer.real_dp_process_group[i]
        rank, ranks = dist.get_rank(group), _ranks_of_group(group)
        size = int(optimizer.partition_size[i])
        starts, offsets = (
            optimizer.grad_start_offset[i],
            optimizer.grad_partition_insertion_offset[i],
        )
        here = {id(p): number for number, p in enumerate(optimizer.params_in_partition[i])}
        fetch = _offloaded(owner) if optimizer.cpu_offload else None
        averaged = _Averaged(optimizer, i)
        for p in optimizer.bit16_groups[i]:
            key = optimizer.get_param_id(p)
            borders = tuple(int(starts[r][key]) for r in range(len(ranks)) if key in starts[r])
            stretches = []
            if id(p) in here:
                start, offset = int(starts[rank][key]), int(offsets[rank][key])
                numel = min(p.numel() - start, size - offset)
                if numel > 0:
                    gradient = (
                        _slice(fetch, offset, numel)
                        if fetch is not None
                        else _Listed(averaged, here[id(p)], numel)
                    )
                    stretches.append(Stretch(start, numel, owner, offset, gradient))
            yield p, Extent(tuple(stretches), borders, ranks, words="ZeRO-1/2")


class _Averaged:
    """The list of one group's reduced gradients, as DeepSpeed keeps it until its step.

    Between them there may be padding, marked as such. What pads where does not change, so that it
    is looked up once, and no gradient is held between steps.
    """

    def __init__(self, optimizer: Any, group: int) -> None:
        self._optimizer, self._group = optimizer, group
        self._count = 0
        self._places: list[int] = []

    def __call__(self) -> Sequence[Tensor] | None:
        """The gradients of the parameters in this rank's partition, in order; None: not there."""
        listed: Sequence[Tensor] | None = self._optimizer.averaged_gradients.get(self._group)
        if listed is None:
            return None
        if len(listed) != self._count:
            self._count = len(listed)
            padding = [getattr(tensor, "_zero_padding", False) for tensor in listed]
            self._places = [place for place, padded in enumerate(padding) if not padded]
        if len(self._places) == self._count:
            return listed
        return [listed[place] for place in self._places]


@dataclass(frozen=True, slots=True)
class _Listed:
    """Gives one of a list of gradients; of a padded one the first ``numel`` elements."""

    averaged: _Averaged
    number: int
    numel: int
    padded: bool = False

    def __call__(self) -> Tensor | None:
        listed = self.averaged()
        return None if listed is None else self.cut(listed[self.number])

    def cut(self, gradient: Tensor) -> Tensor:
        """What is not padding."""
        return gradient.reshape(-1)[: self.numel] if self.padded else gradient


def _stage_3(optimizer: Any) -> Iterator[tuple[Tensor, Extent]]:
    """Each parameter is cut into as many equal parts as there are ranks, padded at the end."""
    for sub, group in enumerate(optimizer.fp16_groups):
        owner, averaged = optimizer.fp32_partitioned_groups_flat[sub], _Averaged(optimizer, sub)
        for number, p in enumerate(group):
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            partition = getattr(p, "ds_process_group", None) or optimizer.dp_process_group
            rank, ranks = dist.get_rank(partition), _ranks_of_group(partition)
            start, numel = rank * size, max(0, min(size, p.ds_numel - rank * size))
            gradient: Callable[[], Tensor | None] = _Listed(averaged, number, numel, numel < size)
            if optimizer.offload_optimizer:
                gradient = _slice(_offloaded(owner), offset, numel)
            stretches = (Stretch(start, numel, owner, offset, gradient),) if numel else ()
            borders = tuple(range(size, p.ds_numel, size)) if size else ()
            yield p, Extent(stretches, borders, ranks, words="ZeRO-3")


def _bf16(optimizer: Any) -> Iterator[tuple[Tensor, Extent]]:
    """One flat fp32 buffer a group, cut into equal partitions."""
    for i, group in enumerate(optimizer.bf16_groups):
        process_group = optimizer.real_dp_process_group[i]
        rank, ranks = dist.get_rank(process_group), _ranks_of_group(process_group)
        owner = optimizer.fp32_groups_flat_partition[i]
        size = optimizer.bf16_groups_flat[i].numel() // len(ranks)
        fetch = _item_fetch(optimizer.fp32_groups_gradient_flat_partition, i)
        first = 0
        for p in group:
            low, high = max(first, rank * size), min(first + p.numel(), (rank + 1) * size)
            borders = tuple(r * size - first for r in range(1, len(ranks)))
            stretches: tuple[Stretch, ...] = ()
            if low < high:
                gradient = _slice(fetch, low - rank * size, high - low)
                stretches = (Stretch(low - first, high - low, owner, low - rank * size, gradient),)
            yield p, Extent(stretches, borders, ranks, words="BF16_Optimizer")
            first += p.numel()


def _unfused(optimizer: Any) -> Iterator[tuple[Tensor, Extent]]:
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for p, master in zip(group, masters, strict=True):
            yield p, _whole(p, master, 0)


def _fused(optimizer: Any) -> Iterator[tuple[Tensor, Extent]]:
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        offsets = itertools.accumulate((p.numel() for p in group), initial=0)
        for p, offset in zip(group, offsets, strict=False):
            yield p, _whole(p, master, offset)


READERS: dict[str, Callable[[Any], Iterator[tuple[Tensor, Extent]]]] = {
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    "BF16_Optimizer": _bf16,
    "FP16_UnfusedOptimizer": _unfused,
    "FP16_Optimizer": _fused,
}
"""By the exact class: a subclass (ZenFlow, SuperOffload) steps in ways of its own."""


def _whole(parameter: Tensor, owner: Tensor, offset: int) -> Extent:
    """All of a parameter is stepped here; experts are told apart by their marks."""
    stretch = Stretch(0, parameter.numel(), owner, offset, _gradient(parameter))
    return Extent((stretch,), words="plain")


def _gradient(parameter: Tensor) -> Callable[[], Tensor | None]:
    def fetch() -> Tensor | None:
        return parameter.grad

    return fetch


def _offloaded(owner: Tensor) -> Callable[[], Tensor | None]:
    def fetch() -> Tensor | None:
        return owner.grad

    return fetch


def _item_fetch(listed: Sequence[Tensor], number: int) -> Callable[[], Tensor | None]:
    def fetch() -> Tensor | None:
        return listed[number]

    return fetch


def _slice(
    fetch: Callable[[], Tensor | None], offset: int, numel: int
) -> Callable[[], Tensor | None]:
    def sliced() -> Tensor | None:
        whole = fetch()
        return None if whole is None else whole.view(-1)[offset : offset + numel]

    return sliced


def _ranks_of_group(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _found(name: str, parameter: Tensor) -> list[Described] | None:
    if (extent := extent_of(parameter)) is not None:
        return [describe(name, parameter, extent)]
    if hasattr(parameter, "ds_tensor"):
        raise UnsupportedGradientError(
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3: attach to the engine instead, "
            f"distclip.deepspeed.attach(engine, policy)"
        )
    return None


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    """For :mod:`distclip.layouts.fetching`: boxes out of stretches."""
    places = [place for place, piece in enumerate(pieces) if isinstance(piece.gradient, StretchBox)]
    if not places:
        return None
    cuts = [cast(StretchBox, pieces[place].gradient) for place in places]
    stretches = list({id(cut.stretch): cut.stretch for cut in cuts}.values())
    number = {id(stretch): each for each, stretch in enumerate(stretches)}

    owner = [number[id(cut.stretch)] for cut in cuts]
    return places, Boxes(cuts, owner, [stretch.numel for stretch in stretches], _all(stretches))


def _all(stretches: Sequence[Stretch]) -> Callable[[], list[Tensor | None]]:
    """Fetches the gradients of stretches; each list of gradients is asked for once."""
    ways: list[_Listed] = [s.gradient for s in stretches if isinstance(s.gradient, _Listed)]
    if len(ways) < len(stretches):
        return lambda: [stretch.gradient() for stretch in stretches]
    runs = [list(run) for _, run in itertools.groupby(ways, lambda way: way.averaged)]
    padded = [(place, way) for place, way in enumerate(ways) if way.padded]

    def fetch() -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for run in runs:
            listed = run[0].averaged()
            found += [None if listed is None else listed[way.number] for way in run]
        for place, way in padded:
            whole = found[place]
            found[place] = None if whole is None else way.cut(whole)
        return found

    return fetch


LAYOUT = Layout(_found, at_once)
