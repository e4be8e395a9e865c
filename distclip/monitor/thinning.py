"""Fewer points for a picture, with every peak kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distclip.common.rollups import Floats

BLOCKS = "▁▂▃▄▅▆▇█"


def bins(count: int, most: int) -> npt.NDArray[np.int64]:
    """Where each of at most ``most`` bins of ``count`` points begins, and the end."""
    return np.linspace(0, count, min(count, most) + 1).astype(np.int64)


def thinned(steps: Floats, columns: Sequence[Floats], most: int) -> tuple[Floats, list[Floats]]:
    """At most ``most`` points of which each bin has two: its smallest and its largest values.

    The two lie at the first step of the bin and in its middle. NaN where a bin has nothing else.
    """
    if len(steps) <= most:
        return steps, list(columns)
    edges = bins(len(steps), most // 2)
    starts = edges[:-1]
    x = np.stack((steps[starts], steps[(starts + edges[1:]) // 2]), axis=1).ravel()
    thin = []
    for column in columns:
        known = np.isfinite(column)
        low = np.minimum.reduceat(np.where(known, column, np.inf), starts)
        high = np.maximum.reduceat(np.where(known, column, -np.inf), starts)
        pair = np.stack((low, high), axis=1).ravel()
        thin.append(np.where(np.isfinite(pair), pair, np.nan))
    return x, thin


def running_mean(values: Floats, part: int) -> Floats:
    """Mean over the ``part``-th part of the run around each point, shorter at both ends.

    Of the values that are finite; NaN where none is.
    """
    width = max(1, len(values) // part)
    known = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(known)))
    here = np.arange(len(values))
    low, high = np.maximum(here - width // 2, 0), np.minimum(here + (width + 1) // 2, len(values))
    seen = count[high] - count[low]
    return np.where(seen > 0, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def sparkline(values: Floats, width: int = 60) -> str:
    """Largest value of each of ``width`` bins, in eighths of a log scale; ``x`` for NaN and inf."""
    edges = bins(len(values), width)
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    known = values[np.isfinite(values) & (values > 0.0)]
    if not known.size:
        return "x" * len(parts)
    low, high = np.log(known.min()), np.log(known.max())
    line = ""
    for part in parts:
        finite = part[np.isfinite(part)]
        if len(finite) < len(part):
            line += "x"
            continue
        place = (np.log(max(finite.max(), known.min())) - low) / (high - low) if high > low else 0.0
        line += BLOCKS[min(int(place * len(BLOCKS)), len(BLOCKS) - 1)]
    return line
