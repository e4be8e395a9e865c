"""Float32 CPU tensors measured together where they are neighbours in memory.

The sharded gradients of an FSDP2 module lie side by side in one buffer: one call measures them all,
in lanes that no boundary cuts. Who lies beside whom is the same at every step, so it is learnt once
and then only checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LANE = 256
"""Elements per float32 partial sum: worst case 32 additions per SIMD lane, error below 1e-6."""
SHORTEST_LANE = 32
"""Tensors whose size is a multiple of this can share lanes with their neighbours."""
PATIENCE = 4
"""Arrangements that may turn out to have changed before nothing is learnt any more."""

UNDERFLOW = {1.0: 0.0, 2.0: 1e-30}
"""Mean p-th power below which powers lost to float32 underflow (1e-38 each) could matter."""


@dataclass(frozen=True)
class Arrangement:
    """Which tensors lie side by side.

    Attributes:
        positions: in order of address, of all tensors that have a neighbour.
        numels: their sizes.
        gaps: bytes from each to the next.
        runs: per run of neighbours, where it starts in ``positions``, its elements, its lane.
        within: bool, whether the next of each belongs to the same run.
        index, lengths, floor: as tensors: positions, lanes per tensor, and the sum of squares below
            which a tensor has to be measured again.
    """

    positions: tuple[int, ...]
    numels: list[int]
    gaps: npt.NDArray[np.int64]
    runs: tuple[tuple[int, int, int], ...]
    within: npt.NDArray[np.bool_]
    index: Tensor
    lengths: Tensor
    floor: Tensor

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these tensors are arranged so."""
        chosen: list[Any] = [tensors[position] for position in self.positions]
        float32 = torch.float32
        try:
            if [tensor.numel() for tensor in chosen] != self.numels or not all(
                tensor.dtype is float32 and tensor.is_contiguous() for tensor in chosen
            ):
                return False
            addresses = np.array([tensor.data_ptr() for tensor in chosen], dtype=np.int64)
        except AttributeError:  # a gradient that is missing now
            return False
        # One storage is on one device: the first of each run speaks for its neighbours. And it has
        # to be one storage still, or reading on past the first would leave it.
        return np.array_equal(_gaps(addresses)[self.within], self.gaps[self.within]) and all(
            chosen[start].is_cpu and _holds(chosen[start], numel) for start, numel, _ in self.runs
        )


def is_eligible(tensor: Tensor) -> bool:
    """Whether a tensor can share lanes with a neighbour."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


class Neighbours:
    """Measures neighbours, and remembers who they are. One for the tensors of one plan."""

    def __init__(self) -> None:
        self._known: Arrangement | None = None
        self._misses = 0

    def measure(
        self, tensors: Sequence[Tensor | None], norm_type: float, result: Tensor
    ) -> tuple[frozenset[int], list[int]]:
        """Write the p-norms, p = 1 or 2, of all tensors that have a neighbour into ``result``.

        Returns:
            The positions that were measured, and among them those whose float32 partial sums were
            zero, not finite, or too small to be sure of.
        """
        if self._misses > PATIENCE:
            return frozenset(), []
        known = self._known
        if known is None or not known.fits(tensors):
            self._misses += known is not None
            known = self._known = learn(tensors)
        if not known.positions:
            return frozenset(), []
        partials = []
        for start, numel, lane in known.runs:
            first = tensors[known.positions[start]]
            assert first is not None
            lanes = first.as_strided((numel // lane, lane), (lane, 1))
            partials.append(torch.linalg.vector_norm(lanes, norm_type, dim=1))
        powers = torch.cat(partials).double()
        if norm_type == 2.0:
            powers = powers * powers
        sums = torch.segment_reduce(powers, "sum", lengths=known.lengths, unsafe=True)
        result[known.index] = sums if norm_type == 1.0 else sums.sqrt()
        sound = (sums > known.floor * UNDERFLOW[norm_type]) & torch.isfinite(sums)
        doubtful = [] if bool(sound.all()) else known.index[~sound].tolist()
        return frozenset(known.positions), doubtful


def learn(tensors: Sequence[Tensor | None]) -> Arrangement:
    """Find out which tensors lie side by side."""
    eligible = sorted(
        (tensor.data_ptr(), tensor.numel(), position)
        for position, tensor in enumerate(tensors)
        if tensor is not None
        and tensor.numel() > 0
        and tensor.numel() % SHORTEST_LANE == 0
        and is_eligible(tensor)
    )
    found: list[tuple[int, int, int]] = []
    runs: list[tuple[int, int, int]] = []
    within: list[bool] = []
    lengths: list[int] = []
    start = 0
    while start < len(eligible):
        address, numel, position = eligible[start]
        stop, end = start + 1, address + 4 * numel
        while stop < len(eligible) and eligible[stop][0] == end:
            end += 4 * eligible[stop][1]
            stop += 1
        run = eligible[start:stop]
        total = (end - address) // 4
        if len(run) > 1 and _holds(tensors[position], total):
            lane = math.gcd(LANE, *(each[1] for each in run))
            runs.append((len(found), total, lane))
            found += run
            within += [True] * (len(run) - 1) + [False]
            lengths += [each[1] // lane for each in run]
        start = stop
    return Arrangement(
        positions=tuple(position for _, _, position in found),
        numels=[numel for _, numel, _ in found],
        gaps=_gaps(np.array([address for address, _, _ in found], dtype=np.int64)),
        runs=tuple(runs),
        within=np.array(within[:-1], dtype=np.bool_),
        index=torch.tensor([position for _, _, position in found], dtype=torch.long),
        lengths=torch.tensor(lengths, dtype=torch.long),
        floor=torch.tensor([numel for _, numel, _ in found], dtype=torch.float64),
    )


def _gaps(addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return addresses[1:] - addresses[:-1]


def _holds(first: Tensor | None, numel: int) -> bool:
    """Whether the neighbours lie in one storage, and not by chance side by side in several."""
    assert first is not None
    available = first.untyped_storage().nbytes() // 4 - first.storage_offset()
    return numel <= available
