"""Float32 CPU tensors measured, and scaled, together where they are neighbours in memory.

The sharded gradients of an FSDP2 module lie side by side in one buffer: one call measures them all,
in lanes that no boundary cuts. Who lies beside whom is the same at every step, so it is learnt once
and then only checked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LANE = 512
"""Elements per float32 partial sum: at worst 32 additions one on the other, error below 1e-6."""
SHORTEST_DOT = 32
"""From here on a dot product is faster than a reduction of a row."""
CHUNK = 1 << 16
"""Elements of a temporary, 256 KiB in float32; with its float64 twin below 1 MiB."""
LANES = 1 << 14
"""Lanes measured before their sums are added up in float64, 128 KiB of them."""
SHORTEST_LANE = 32
"""Tensors whose size is a multiple of this can share lanes with their neighbours."""
PATIENCE = 4
"""Arrangements that may turn out to have changed before nothing is learnt any more."""

FLOAT32 = {torch.float32}
_numel, _is_contiguous, _address = Tensor.numel, Tensor.is_contiguous, Tensor.data_ptr
_dtype, _is_cpu = operator.attrgetter("dtype"), operator.attrgetter("is_cpu")

Floats: TypeAlias = npt.NDArray[np.float64]

UNDERFLOW = {1.0: 0.0, 2.0: 1e-30}
"""Mean p-th power below which powers lost to float32 underflow (1e-38 each) could matter."""


class Run(NamedTuple):
    """Neighbours without a gap, or one long tensor.

    ``first`` and ``last``: their places in ``positions``; ``shape``: of the view over all of them,
    ``(lanes, elements)``.
    """

    first: int
    last: int
    shape: tuple[int, int]


class Batch(NamedTuple):
    """Lanes that are measured before the next ones, so that no temporary outgrows a chunk.

    ``parts``: ``(run, first lane, last lane + 1, where their sums go)``; ``sums``: all those
    places, the same memory for every batch; ``segments``: which the lanes belong to; ``starts``:
    where the lanes of each begin, from 0.
    """

    parts: tuple[tuple[int, int, int, npt.NDArray[np.float32]], ...]
    sums: npt.NDArray[np.float32]
    segments: slice
    starts: npt.NDArray[np.int64]


class Division(NamedTuple):
    """Tensors cut into equal parts, none of which shares a lane with another.

    ``asked``: which of the arrangement's tensors are those; ``counts``: parts of every one, 1 for
    the others; ``stops``: where its parts end; ``lengths``: lanes of each part; ``least``: the sum
    of squares below which it is measured again; ``batches``: with the parts as segments.
    """

    asked: tuple[int, ...]
    counts: list[int]
    stops: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    least: Floats
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Arrangement:
    """Which tensors lie side by side.

    Attributes:
        positions: of all tensors in a run, run by run, in order of address in each.
        pick: gives the tensors at these positions.
        complete: whether these are all there are.
        order: which of them is the first tensor, the second, ...; None where they are in order.
        numels: their sizes.
        gaps: bytes from each to the next.
        runs: of neighbours.
        within: bool, whether the next of each belongs to the same run.
        index: ``positions`` as a tensor.
        lanes: per tensor.
        least: per tensor, the sum of squares below which it has to be measured again.
    """

    positions: tuple[int, ...]
    pick: Callable[[Any], Any]
    complete: bool
    order: Tensor | None
    numels: list[int]
    gaps: npt.NDArray[np.int64]
    runs: tuple[Run, ...]
    within: npt.NDArray[np.bool_]
    index: Tensor
    lanes: npt.NDArray[np.int64]
    least: Floats
    _divisions: dict[tuple[tuple[int, int], ...], Division] = field(default_factory=dict)

    def division(self, parts: Mapping[int, int]) -> Division:
        """How ``parts``, position -> number of equal parts, divide the lanes. Remembered."""
        key = tuple(parts.items())
        known = self._divisions.get(key)
        if known is None:
            if len(self._divisions) >= PATIENCE:
                self._divisions.clear()
            lanes = dict(zip(self.positions, self.lanes.tolist(), strict=True))
            fits = {each for each, count in parts.items() if lanes.get(each, 1) % count == 0}
            counts = [parts[each] if each in fits else 1 for each in self.positions]
            lengths = [lanes[e] // n for e, n in zip(self.positions, counts, strict=True)]
            numels = [numel // n for numel, n in zip(self.numels, counts, strict=True)]
            parts_of_each = np.repeat(lengths, counts)
            known = self._divisions[key] = Division(
                tuple(number for number, each in enumerate(self.positions) if each in fits),
                counts,
                np.cumsum(counts),
                parts_of_each,
                np.repeat(numels, counts) * UNDERFLOW[2.0],
                _batches(self.runs, parts_of_each),
            )
        return known

    @cached_property
    def pick_firsts(self) -> Callable[[Any], Any]:
        """Gives the first of each run."""
        return _picker(tuple(run.first for run in self.runs))

    @cached_property
    def pick_lasts(self) -> Callable[[Any], Any]:
        """Gives the last of each run."""
        return _picker(tuple(run.last for run in self.runs))

    @cached_property
    def numels_of_lasts(self) -> list[int]:
        """Sizes of those."""
        return [self.numels[run.last] for run in self.runs]

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the views over the runs."""
        return [run.shape for run in self.runs]

    @cached_property
    def strides(self) -> list[tuple[int, int]]:
        """Of these."""
        return [(run.shape[1], 1) for run in self.runs]

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All lanes, in order, a chunk at a time, with the tensors as segments."""
        return _batches(self.runs, self.lanes)

    def spans(
        self, tensors: Sequence[Tensor | None], *, shaped: bool = False
    ) -> list[Tensor] | None:
        """One ``(lanes, elements)`` view over each run; None if the tensors are not arranged so.

        Asked at every step, so without a Python loop over the tensors.

        Args:
            tensors: as at every step.
            shaped: their shapes and dtypes are known to be those that were learnt. Then the places
                of all and the ends of each run tell the rest: within one storage, tensors of the
                same sizes that start where they started cover what they covered.
        """
        if not self.positions:
            return []
        try:
            chosen: Any = self.pick(tensors)
            if not shaped and not self._are_alike(chosen):
                return None
            addresses = np.fromiter(map(_address, chosen), np.int64, len(chosen))
            if (_gaps(addresses) != self.gaps)[self.within].any():
                return None
            # One storage is on one device: the first of each run speaks for its neighbours. And
            # it has to be one storage still: torch refuses a view that would leave it.
            firsts, lasts = self.pick_firsts(chosen), self.pick_lasts(chosen)
            if not (
                all(map(_is_cpu, firsts))
                and all(map(_is_contiguous, lasts))
                and {*map(_dtype, firsts), *map(_dtype, lasts)} == FLOAT32
                and list(map(_numel, lasts)) == self.numels_of_lasts
            ):
                return None
            return [
                first.as_strided(shape, stride)
                for first, shape, stride in zip(firsts, self.shapes, self.strides, strict=True)
            ]
        except (TypeError, AttributeError, RuntimeError):  # missing now, or without an address
            return None

    def _are_alike(self, chosen: Sequence[Tensor]) -> bool:
        return (
            list(map(_numel, chosen)) == self.numels
            and set(map(_dtype, chosen)) == FLOAT32
            and all(map(_is_contiguous, chosen))
        )


def is_eligible(tensor: Tensor) -> bool:
    """Whether a tensor can share lanes with a neighbour."""
    return (
        tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
    )


class Neighbours:
    """Remembers who lies beside whom. One for the tensors of one plan."""

    def __init__(self) -> None:
        self._known: Arrangement | None = None
        self._misses = 0

    def find(
        self,
        tensors: Sequence[Tensor | None],
        *,
        shaped: bool = False,
        widths: Sequence[int] | None = None,
    ) -> Together | None:
        """Those that can be measured together; None where none can.

        Args:
            tensors: as at every step.
            shaped: see :meth:`Arrangement.spans`.
            widths: elements of each tensor's units, which no lane may leave; the same at every
                step.
        """
        if self._misses > PATIENCE:
            return None
        known, spans = self._known, None
        if known is not None:
            spans = known.spans(tensors, shaped=shaped)
        if known is None or spans is None:
            self._misses += known is not None
            known = self._known = learn(tensors, widths)
            spans = known.spans(tensors)
        return Together(known, spans) if spans else None


@dataclass(frozen=True)
class Together:
    """Tensors that lie side by side, to be treated as one.

    Attributes:
        known: which tensors these are.
        spans: float32 ``(lanes, elements)`` views, one of each run, that cover exactly them.
    """

    known: Arrangement
    spans: Sequence[Tensor]
    _parts: dict[float, tuple[Floats, Division]] = field(default_factory=dict)

    def norms(self, norm_type: float) -> tuple[Tensor, list[int]]:
        """Their p-norms, p = 1 or 2.

        Returns:
            Float64 ``(len(known.positions),)``, in that order; and the positions whose float32
            partial sums were zero, not finite, or too small to be sure of.
        """
        known = self.known
        measured = self._parts.get(norm_type)
        if measured is None:
            sums = self._summed(norm_type, known.batches)
        else:  # part by part already
            parts, division = measured
            sums = np.add.reduceat(parts, division.stops - division.counts)
        sound = _are_sound(sums, known.least, norm_type)
        doubtful = [] if sound.all() else [known.positions[each] for each in np.flatnonzero(~sound)]
        return _rooted(sums, norm_type), doubtful

    def divided(
        self, norm_type: float, parts: Mapping[int, int]
    ) -> tuple[dict[int, Tensor], set[int]]:
        """The p-norms, p = 1 or 2, of equal consecutive parts of some of them.

        Args:
            norm_type: 1 or 2.
            parts: position of a tensor -> how many parts it has.

        Returns:
            Position -> float64 ``(parts,)``, without those whose parts share a lane; and the
            positions of those with a part whose float32 partial sums cannot be relied on.
        """
        division = self.known.division(parts)
        if not division.asked:
            return {}, set()
        sums = self._summed(norm_type, division.batches)
        self._parts[norm_type] = sums, division
        sound = _are_sound(sums, division.least, norm_type)
        unsure = np.flatnonzero(~sound)  # of those most are zero
        nonzero = unsure[self._are_nonzero(unsure, division)] if len(unsure) else unsure
        owners = np.searchsorted(division.stops, nonzero, side="right")
        doubtful = {self.known.positions[each] for each in owners.tolist()}
        norms = torch.split(_rooted(sums, norm_type), division.counts)
        return {self.known.positions[each]: norms[each] for each in division.asked}, doubtful

    def _are_nonzero(
        self, parts: npt.NDArray[np.int64], division: Division
    ) -> npt.NDArray[np.bool_]:
        """Which of these parts have an element that is not zero. Reads no others."""
        lengths = division.lengths[parts]
        first = np.cumsum(division.lengths)[parts] - lengths
        starts = np.cumsum(lengths) - lengths
        # Every lane of every part, numbered over all runs.
        lanes = np.repeat(first - starts, lengths) + np.arange(lengths.sum())
        found = np.empty(len(lanes), np.bool_)
        before = done = 0
        for span in self.spans:
            stop = int(np.searchsorted(lanes, before + len(span)))
            here = torch.from_numpy(lanes[done:stop] - before)
            rows_per_chunk = max(1, CHUNK // span.shape[1])
            for rows in torch.split(here, rows_per_chunk) if len(here) else ():
                found[done : done + len(rows)] = span.index_select(0, rows).any(dim=1).numpy()
                done += len(rows)
            before += len(span)
        return np.logical_or.reduceat(found, starts)

    def _summed(self, norm_type: float, batches: Sequence[Batch]) -> Floats:
        """Sum of the p-th powers of every segment."""
        if len(batches) == 1:
            return np.add.reduceat(_powers(batches[0], self.spans, norm_type), batches[0].starts)
        sums = np.zeros(batches[-1].segments.stop)
        for batch in batches:
            powers = _powers(batch, self.spans, norm_type)
            sums[batch.segments] += np.add.reduceat(powers, batch.starts)
        return sums


def _batches(runs: Sequence[Run], lengths: npt.NDArray[np.int64]) -> tuple[Batch, ...]:
    """The lanes of all runs, so many at a time, in consecutive segments of these lengths."""
    ends = np.cumsum(lengths)
    places = np.empty(min(LANES, int(ends[-1])), dtype=np.float32)
    batches: list[Batch] = []
    parts: list[tuple[int, int, int, npt.NDArray[np.float32]]] = []
    done = filled = 0
    for number, run in enumerate(runs):
        start, total = 0, run.shape[0]
        while start < total:
            stop = min(total, start + LANES - filled)
            place = places[filled : filled + stop - start]
            parts.append((number, start, stop, place))
            start, filled = stop, filled + stop - start
            if filled == LANES or done + filled == ends[-1]:
                first, last = np.searchsorted(ends, (done, done + filled - 1), side="right")
                here = slice(int(first), int(last) + 1)
                starts = np.maximum(ends[here] - lengths[here] - done, 0)
                batches.append(Batch(tuple(parts), places[:filled], here, starts))
                done, filled, parts = done + filled, 0, []
    return tuple(batches)


def _powers(batch: Batch, spans: Sequence[Tensor], norm_type: float) -> Floats:
    """The p-th powers of a batch's lane norms. On arrays so small numpy costs a third of torch."""
    with np.errstate(all="ignore"):  # the sums show it
        for number, start, stop, place in batch.parts:
            power_sums(spans[number].numpy()[start:stop], norm_type, out=place)
    return batch.sums.astype(np.float64)


def _are_sound(sums: Floats, least: Floats, norm_type: float) -> npt.NDArray[np.bool_]:
    """Which sums of float32 powers have neither overflowed nor underflowed; NaN has."""
    sound: npt.NDArray[np.bool_] = (sums > (least if norm_type == 2.0 else 0.0)) & (sums < math.inf)
    return sound


def _rooted(sums: Floats, norm_type: float) -> Tensor:
    return torch.from_numpy(sums if norm_type == 1.0 else np.sqrt(sums))


def power_sums(
    rows: npt.NDArray[np.float32], norm_type: float, *, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Sums of p-th powers over the last axis of float32 numbers, in float32, p = 1 or 2.

    A lane of squares is one BLAS dot product, which adds up in 16 or more sums side by side; that
    is not worth a call for short rows. Absolute values are made a chunk at a time.
    """
    sums = np.empty(rows.shape[:-1], np.float32) if out is None else out
    if norm_type == 2.0 and rows.shape[-1] >= SHORTEST_DOT:
        np.vecdot(rows, rows, out=sums)
        return sums
    tensor, result = torch.from_numpy(rows), torch.from_numpy(sums)
    if norm_type == 2.0:
        torch.linalg.vector_norm(tensor, dim=-1, out=result).square_()
        return sums
    step = max(1, CHUNK * len(rows) // max(1, rows.size))
    for part, place in zip(torch.split(tensor, step), torch.split(result, step), strict=True):
        torch.sum(part.abs(), dim=-1, out=place)
    return sums


def learn(tensors: Sequence[Tensor | None], widths: Sequence[int] | None = None) -> Arrangement:
    """Find out which tensors lie side by side. A long one is a run of its own."""

    def lane_of(run: Sequence[tuple[int, int, int]]) -> int:
        units = [] if widths is None else [widths[position] for _, _, position in run]
        return math.gcd(LANE, *(numel for _, numel, _ in run), *units)

    eligible = sorted(
        (tensor.data_ptr(), tensor.numel(), position)
        for position, tensor in enumerate(tensors)
        if tensor is not None
        and tensor.numel() > 0
        and tensor.numel() % SHORTEST_LANE == 0
        and (widths is None or widths[position] % SHORTEST_LANE == 0)
        and is_eligible(tensor)
    )
    together: list[tuple[list[tuple[int, int, int]], int]] = []
    start = 0
    while start < len(eligible):
        address, numel, position = eligible[start]
        stop, end = start + 1, address + 4 * numel
        while stop < len(eligible) and eligible[stop][0] == end:
            end += 4 * eligible[stop][1]
            stop += 1
        total = (end - address) // 4
        if not _holds(tensors[position], total):  # side by side by chance
            stop, total = start + 1, numel
        if stop - start > 1 or total > LANE:
            together.append((eligible[start:stop], total))
        start = stop
    found: list[tuple[int, int, int]] = []
    runs: list[Run] = []
    within: list[bool] = []
    lengths: list[int] = []
    for run, total in sorted(together, key=lambda each: each[0][0][2]):  # in order of the tensors
        lane = lane_of(run)
        runs.append(Run(len(found), len(found) + len(run) - 1, (total // lane, lane)))
        found += run
        within += [True] * (len(run) - 1) + [False]
        lengths += [each[1] // lane for each in run]
    positions = tuple(position for _, _, position in found)
    sorted_already = all(map(operator.lt, positions, positions[1:]))
    return Arrangement(
        positions=positions,
        pick=_picker(positions),
        complete=len(positions) == len(tensors),
        order=None if sorted_already else torch.tensor(np.argsort(positions)),
        numels=[numel for _, numel, _ in found],
        gaps=_gaps(np.array([address for address, _, _ in found], dtype=np.int64)),
        runs=tuple(runs),
        within=np.array(within[:-1], dtype=np.bool_),
        index=torch.tensor(positions, dtype=torch.long),
        lanes=np.array(lengths, dtype=np.int64),
        least=np.array([numel for _, numel, _ in found], dtype=np.float64) * UNDERFLOW[2.0],
    )


def _picker(positions: tuple[int, ...]) -> Callable[[Any], Any]:
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda tensors: tuple(tensors[position] for position in positions)


def _gaps(addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return addresses[1:] - addresses[:-1]


def _holds(first: Tensor | None, numel: int) -> bool:
    """Whether the neighbours lie in one storage, and not by chance side by side in several."""
    assert first is not None
    available = first.untyped_storage().nbytes() // 4 - first.storage_offset()
    return numel <= available
