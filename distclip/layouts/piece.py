"""The vocabulary of layouts: logical parameters, and the pieces of them that lie on this rank."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from distclip.kernels.look import Look

Fetch: TypeAlias = Callable[[], Tensor | None]

Holder: TypeAlias = Callable[[], Tensor]
"""A callable without arguments that returns a parameter."""


class Hold:
    """A reference to a parameter that can be emptied; calling it gives the parameter.

    It can be emptied and filled again, since a plan may outlive its model (a report
    that is kept has one). Not a weak reference: while there is one to a DTensor, torch refuses to
    convert it (``model.cpu()``, ``.to()``, ``.double()`` under FSDP2 and tensor parallelism).
    """

    __slots__ = ("_place", "_row")

    def __init__(self, parameter: Tensor) -> None:
        self._row: list[Any] = [parameter]
        self._place = 0

    def __call__(self) -> Tensor:
        """The parameter."""
        return cast(Tensor, self._row[self._place])

    def move(self, row: list[Any], place: int) -> None:
        """From now on ``row[place]`` is the parameter: one row serves, and empties, many holds."""
        self._row, self._place = row, place

    def release(self) -> None:
        """Let go of the parameter."""
        self._row[self._place] = None

    @staticmethod
    def of_all(holds: Sequence[Hold]) -> Callable[[], Sequence[Any]]:
        """Gives all their parameters; without a loop where the holds are one row, in order.

        Holds that have shared no row yet become one.
        """
        if len(holds) > 1 and all(len(hold._row) == 1 for hold in holds):
            row = [hold() for hold in holds]
            for place, hold in enumerate(holds):
                hold.move(row, place)
        row = holds[0]._row
        if len(row) == len(holds) and all(
            hold._row is row and hold._place == place for place, hold in enumerate(holds)
        ):
            return row.copy
        return lambda: [hold() for hold in holds]


def held(parameter: Tensor) -> Hold:
    """A hold on ``parameter``, which whoever opens the plan releases."""
    return Hold(parameter)


def weakly_held(parameter: Tensor) -> Holder:
    """A weak reference: for tensors that torch converts in place, as it does plain ones."""
    return cast(Holder, weakref.ref(parameter))


@functools.lru_cache(maxsize=256)
def shared_ranks(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all who give equal ones: thousands of ranks are not kept per parameter."""
    return ranks


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box of a logical tensor: ``offsets[d] : offsets[d] + extents[d]``."""

    offsets: tuple[int, ...]
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """What a rank says of its slice where the slices need not be of one size.

    Attributes:
        extent: of this rank's slice, along the dim that is cut.
        whole: whether the entry's shape is the logical one, and no guess from this slice.
    """

    extent: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One logical parameter, as all ranks know it.

    Attributes:
        name: clean name, without wrapper prefixes.
        shape: logical shape.
        dtype: name of the parameter's dtype, such as ``"float32"``.
        split_dims: dims along which the tensor is cut across ranks (a unit that extends along one
            of them is not whole on any rank).
        ranks: global ranks of the device mesh, in mesh order; None for a plain tensor.
        layout: the sharding in words, for messages and for comparing ranks.
        others: global ranks that hold other tensors under the same name (experts); empty where
            there are none. The entry's name then says whose it is: ``name@place``.
        replicated: whether the mesh holds replicas of it, whose gradients may come unreduced.
        copy: whether another rank has the same tensor under another name, where it is counted.
        copies: whether some of ``ranks`` hold copies of what others of them hold, which their
            layout counts elsewhere (pieces with a share of 0).
        slice: of a tensor that is cut along one dim only; its ranks hold the slices in order. None
            once the ranks have compared notes; see :mod:`distclip.layouts.slices`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    split_dims: tuple[int, ...] = ()
    ranks: tuple[int, ...] | None = None
    layout: str = "plain"
    others: tuple[int, ...] = ()
    replicated: bool = False
    copy: bool = False
    copies: bool = False
    slice: Slice | None = None


class Spread(Protocol):
    """A parameter whose gradient may lie otherwise on its ranks than it does itself.

    Such as autograd leaves it ``Partial`` under tensor parallelism. To bring it into place takes
    all of these ranks: see :mod:`distclip.statistics.alignment`.
    """

    @property
    def whole(self) -> bool:
        """Whether the piece is all that this rank has of the parameter."""
        ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks that the parameter is spread over."""
        ...

    @property
    def wanted(self) -> object:
        """How the parameter lies."""
        ...

    def found(self) -> object | None:
        """How its gradient lies, to be compared between ranks; None where there is none."""
        ...

    def check(self) -> None:
        """Refuse a gradient that can be neither measured nor moved.

        Raises:
            UnsupportedGradientError: says what is wrong with it.
        """
        ...

    def align(self, found: Any) -> None:
        """Bring the gradient from how it was ``found`` to how the parameter lies; a collective."""
        ...

    def may_be_hooked(self, device: torch.device) -> bool:
        """Whether FSDP2 may call a hook of the parameter when its gradient is on ``device``."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One local piece of one logical parameter.

    Attributes:
        index: row of its :class:`Entry` in the plan's table.
        box: where the piece lies in the logical tensor.
        share: the part of its sums that counts towards the reduced total. Of identical replicas
            one has 1 and the others 0, so that one sum over one group counts every element once.
        gradient: gives the local gradient, of shape ``box.extents``, or None.
        weight: gives the local weights, of shape ``box.extents``.
        trainable: whether the parameter requires a gradient.
        hold: gives the parameter that it is a piece of, as :func:`held` has made it. A function
            without memory describes a parameter anew at each call where this is None.
        spread: where the gradient may lie otherwise than the parameter, what moves it.
    """

    index: int
    box: Box
    share: float
    gradient: Fetch
    weight: Callable[[], Tensor]
    trainable: bool = True
    hold: Holder | None = None
    spread: Spread | None = None

    def numbered(self, index: int, share: float) -> Piece:
        """This piece under another table row, with its share multiplied."""
        return replace(self, index=index, share=self.share * share)


class MisplacedError(Exception):
    """A gradient lies otherwise than its parameter: the mesh's ranks must move it together."""


Described: TypeAlias = tuple[Entry, Sequence[Piece]]
"""Entry and local pieces of one parameter; the pieces' ``index`` is still 0."""

Way: TypeAlias = Callable[[], "tuple[Sequence[Tensor | None], Look | None] | None"]
"""Fetches the gradients of several pieces at once, with a look at them where that is cheap; gives
None where one of them is unusual. See :mod:`distclip.layouts.fetching`."""

Claimed: TypeAlias = tuple[Sequence[int], Way]
"""The places of pieces that a layout knows how to fetch at once, and how."""


ClaimedWeights: TypeAlias = tuple[Sequence[int], Callable[[], "list[Tensor] | None"]]
"""The places of pieces whose weights a layout knows how to fetch at once, and how."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which parameters lie on ranks, listed in :mod:`distclip.layouts.detect`.

    Attributes:
        describe: from a clean name and a parameter to all that the parameter stands for; None where
            it is of another layout. Raises what :func:`distclip.layouts.detect.detect` does.
        at_once: out of all pieces of a plan those of this layout, and a fast way to fetch their
            gradients; without it each piece is asked by itself.
        weights_at_once: the same for the weights, all of them as tensors; gives None too where one
            needs a closer look.
        fingerprint: of a parameter, what differs when ``describe`` would give something else than
            before; called at every step of a function without memory, for parameters that have
            attributes of their own. Shape, dtype, device and ``requires_grad`` are compared anyway.
    """

    describe: Callable[[str, Tensor], Sequence[Described] | None]
    at_once: Callable[[Sequence[Piece]], Claimed | None] | None = None
    weights_at_once: Callable[[Sequence[Piece]], ClaimedWeights | None] | None = None
    fingerprint: Callable[[Tensor], object] | None = None
