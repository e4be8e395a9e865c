"""Boxes out of flat tensors, fetched all at once: for FSDP1 and DeepSpeed ZeRO.

Every check is made once for each flat tensor, and of the boxes only the addresses are computed: the
compiled loops need no more. A view is made for whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from torch import Tensor

from distclip.kernels.look import Kinds, Look, Places, look


class Cut(Protocol):
    """One box, contiguous or transposed, out of a flat tensor."""

    @property
    def first(self) -> int:
        """Where in the flat tensor it begins, in elements."""
        ...

    @property
    def numel(self) -> int:
        """How many elements it has."""
        ...

    def is_row_major(self) -> bool:
        """Whether its elements lie in row-major order."""
        ...

    def view_of(self, whole: Tensor) -> Tensor:
        """The box, out of the flat tensor or one that is laid out like it."""
        ...


FetchBoxes: TypeAlias = Callable[[], "list[Tensor | None] | None"]


class Boxes:
    """Fetches the gradients of boxes that are cut out of flat tensors.

    Args:
        cuts: the boxes.
        owner: the number of the flat tensor that each is cut out of.
        numels: how many elements each flat tensor has.
        fetch: gives the gradients of the flat tensors; None where one of them is unusual.
    """

    def __init__(
        self, cuts: Sequence[Cut], owner: Sequence[int], numels: Sequence[int], fetch: FetchBoxes
    ) -> None:
        self._cuts, self._expected, self._fetch = cuts, list(numels), fetch
        self._owner = np.array(owner, np.int64)
        self._first = np.array([cut.first for cut in cuts], np.int64)
        self._numels = np.array([cut.numel for cut in cuts], np.int64)
        self._row_major = all(cut.is_row_major() for cut in cuts)
        self._offset = self._first
        self._known: tuple[Places, Places] | None = None
        """Where the flat tensors, and the boxes in them, lay the last time."""

    def __call__(self) -> tuple[Sequence[Tensor | None], Look] | None:
        """The boxes' gradients, and a look at them; None where one of them is unusual."""
        whole = self._fetch()
        return None if whole is None else self._out_of(whole)

    def _out_of(self, whole: Sequence[Any]) -> tuple[Sequence[Tensor | None], Look] | None:
        if set(map(type, whole)) != {Tensor}:
            return self._of_some(whole)
        known = None if self._known is None else self._known[0]
        seen = look(whole, known)
        if seen is None:
            return None
        new = known is None or known.kinds is not seen.kinds
        if new and not np.array_equal(seen.kinds.numels, self._expected):
            return None
        views = _Views(whole, self._owner, self._cuts)
        return views, Look(views, self._places_in(seen.places), seen)

    def _places_in(self, whole: Places) -> Places:
        """Where the boxes lie, in flat tensors that lie there."""
        known = self._known
        if known is None or known[0] is not whole:
            if known is None or known[0].kinds is not whole.kinds:
                sizes = np.array([dtype.itemsize for dtype in whole.kinds.dtypes], np.int64)
                self._offset = self._first * sizes[self._owner]
                dtypes = [whole.kinds.dtypes[each] for each in self._owner.tolist()]
                kinds = Kinds(dtypes, self._numels, whole.kinds.on_host)
            else:
                kinds = known[1].kinds
            at = whole.addresses[self._owner] + self._offset
            known = whole, Places(kinds, at, whole.row_major and self._row_major)
            self._known = known
        return known[1]

    def _of_some(self, whole: Sequence[Any]) -> tuple[Sequence[Tensor | None], Look] | None:
        """The boxes' gradients where some flat tensors have none."""
        there = [number for number, each in enumerate(whole) if each is not None]
        places = np.flatnonzero(np.isin(self._owner, there)).tolist()
        if not places or len(there) == len(whole):
            return None
        some = Boxes(
            [self._cuts[place] for place in places],
            np.searchsorted(there, self._owner[places]).tolist(),
            [self._expected[number] for number in there],
            self._fetch,
        )
        found = some._out_of([whole[number] for number in there])
        if found is None:
            return None
        gradients: list[Tensor | None] = [None] * len(self._cuts)
        for place, gradient in zip(places, found[0], strict=True):
            gradients[place] = gradient
        return gradients, found[1]


class _Views(Sequence[Tensor]):
    """Boxes out of flat tensors, each made when it is asked for."""

    def __init__(self, whole: Sequence[Tensor], owner: Any, cuts: Sequence[Cut]) -> None:
        self._whole, self._owner, self._cuts = whole, owner, cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        return self._cuts[place].view_of(self._whole[self._owner[place]])
