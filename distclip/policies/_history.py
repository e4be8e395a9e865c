"""The last norms, in a ring of fixed size, and all norms, counted in bins of fixed ratio.

Both take a sample under a condition that is a tensor: nothing is read on the host. What a sample
must not be (NaN, inf, 0) is the caller's condition; it is chosen by ``torch.where`` and never
multiplied away, since ``0 * nan`` is NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from distclip.policies._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

PER_OCTAVE = 128
"""Bins between a norm and its double."""
OCTAVES = 64
"""Norms from ``2 ** -OCTAVES`` to ``2 ** OCTAVES`` have bins of their own."""
BINS = 2 * OCTAVES * PER_OCTAVE
BIN_ERROR = 2.0 ** (0.5 / PER_OCTAVE) - 1.0
"""Relative error of a norm that is known by its bin only: 0.27 %."""


def is_sample(norm: Tensor) -> Tensor:
    """Whether a norm says something about the size of gradients: finite and not 0. 0-dim bool."""
    return torch.isfinite(norm) & (norm > 0)


# ---- the last norms --------------------------------------------------------------------------


def filled_places(ring: Tensor, seen: Tensor) -> Tensor:
    """Which places of a ring hold a sample, bool ``(window,)``."""
    return torch.arange(len(ring), device=ring.device) < seen


def put(ring: Tensor, seen: Tensor, sample: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The ring with one more sample, if it is wanted.

    Args:
        ring: float64 ``(window,)``, filled from the front, then from the front again.
        seen: 0-dim int64, samples put in so far.
        sample: 0-dim float64.
        wanted: 0-dim bool.
    """
    place = torch.arange(len(ring), device=ring.device) == seen % len(ring)
    return torch.where(place & wanted, sample, ring), seen + wanted.long()


def percentile(ring: Tensor, seen: Tensor, percent: float) -> Tensor:
    """The percentile of a ring's samples, interpolated linearly; inf where there are none."""
    count = torch.clamp(seen, max=len(ring))
    ordered = torch.where(filled_places(ring, seen), ring, math.inf).sort().values
    ranks, share = _ranks(count, percent)
    low, high = ordered.gather(0, ranks).unbind()
    return torch.where(count > 0, low + torch.nan_to_num(high - low) * share, math.inf)


def mean_and_deviation(ring: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of a ring's samples, without overflow; NaN for too few.

    0-dim float64 each.
    """
    mask = filled_places(ring, seen)
    count = mask.sum()
    samples = torch.where(mask, ring, 0.0)
    largest = samples.abs().max()
    unit = torch.where(largest > 0, largest, 1.0)
    scaled = samples / unit
    mean = scaled.sum() / count
    spread = torch.where(mask, scaled - mean, 0.0)
    deviation = (spread.square().sum() / (count - 1)).sqrt()
    return mean * unit, deviation * unit


# ---- all norms -------------------------------------------------------------------------------


def count_sample(counts: Tensor, sample: Tensor, wanted: Tensor) -> Tensor:
    """The histogram, int64 ``(BINS,)``, with one more sample, if it is wanted.

    A sample beyond the outermost bins counts in the nearest one.
    """
    sound = torch.where(wanted, sample, 1.0)
    place = torch.floor((torch.log2(sound) + OCTAVES) * PER_OCTAVE).long().clamp(0, BINS - 1)
    return counts.scatter_add(0, place.reshape(1), wanted.long().reshape(1))


def percentile_of_counts(counts: Tensor, percent: float) -> Tensor:
    """The percentile of a histogram's samples to within ``BIN_ERROR``; inf where there are none."""
    running = counts.cumsum(0)
    total = running[-1]
    ranks, share = _ranks(total, percent)
    places = torch.searchsorted(running, ranks, right=True).double()
    low, high = torch.exp2((places + 0.5) / PER_OCTAVE - OCTAVES).unbind()
    return torch.where(total > 0, low + (high - low) * share, math.inf)


def _ranks(count: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """The two order statistics beside a percentile, int64 ``(2,)``, and how far between them."""
    position = torch.clamp(count - 1, min=0).double() * (percent / 100.0)
    low = torch.floor(position)
    high = torch.ceil(position)
    return torch.stack([low, high]).long(), position - low
