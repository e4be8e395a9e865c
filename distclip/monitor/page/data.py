"""The numbers of a page, few enough to load fast whatever the length of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distclip.common.rollups import grouped
from distclip.monitor.runs import Counted, Floats, ParameterSeries, Run, median
from distclip.monitor.states import STATES
from distclip.monitor.summary import Summary
from distclip.monitor.thinning import bins, running_mean, thinned

POINTS = 4000
"""Most points of a curve; longer runs are thinned."""

MARKED_STEPS = 1000
"""Steps that are marked one by one: skipped, not finite, changes of state."""

ROWS, CELLS = 60, 200
"""Most rows and columns of the heat map of parameters by step."""

CLIPPED_LISTED = 30
"""Parameters in the table of the most clipped ones."""

PAGE_PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def page_data(runs: Sequence[Run], summaries: Sequence[Summary]) -> dict[str, Any]:
    """What the page's script draws; plain JSON, with null for what is not finite."""
    pairs = zip(runs, summaries, strict=True)
    return {"states": list(STATES), "runs": [_run(run, summary) for run, summary in pairs]}


def _run(run: Run, summary: Summary) -> dict[str, Any]:
    share = 100.0 * running_mean(run.clipped_fraction, 100)
    columns = (run.total_norm, run.clipped_norm, run.threshold, share)
    steps, (before, after, threshold, share) = thinned(run.steps, columns, POINTS)
    noise = None
    if np.isfinite(run.noise_scale).any():
        noise = _numbers(thinned(run.steps, (run.noise_scale,), POINTS)[1][0])
    first = run.first_bad
    return {
        "name": run.name,
        "steps": _numbers(steps, 9),
        "before": _numbers(before),
        "after": _numbers(after),
        "threshold": _numbers(threshold) if run.threshold_is_norm else None,
        "share": _numbers(share),
        "noise_scale": noise,
        "thinned": len(steps) < len(run.steps),
        "skipped": _numbers(_some(run.steps[run.skipped]), 9),
        "nonfinite": _numbers(_some(run.steps[run.nonfinite]), 9),
        "states": _spans(run),
        "histogram": _histogram(run),
        "candidates": candidates(run.total_norm),
        "first_bad": None if first is None else {"step": first[0], "names": list(first[1])},
        "parameters": None if run.parameters is None else _parameters(run.parameters),
        "exponents": [_exponents(each) for each in run.exponents.values()],
        "summary": _summary(summary),
    }


def _exponents(counted: Counted) -> dict[str, Any]:
    last = counted.last
    steps, shares = thinned(
        np.array(counted.steps), (np.array(counted.zero), np.array(counted.underflow)), POINTS
    )
    return {
        "dtype": last.dtype,
        "said": counted.shares(),
        "exponents": list(range(last.lowest, last.lowest + len(last.counts))),
        "counts": last.counts.tolist(),
        "steps": _numbers(steps, 9),
        "zero": _numbers(100.0 * shares[0]),
        "underflow": _numbers(100.0 * shares[1]),
    }


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "steps": summary.steps,
        "percentiles": [_number(summary.percentiles[p]) for p in sorted(summary.percentiles)],
        "largest": _number(summary.largest),
        "threshold": _number(summary.threshold),
        "clipped": _number(100.0 * summary.clipped),
        "share": _number(100.0 * summary.share),
        "skipped": summary.skipped,
        "nonfinite": summary.nonfinite,
        "spike_score": _number(summary.spike_score),
        "states": summary.states,
        "advice": summary.advice(),
    }


def candidates(norms: Floats) -> list[dict[str, float]]:
    """For some percentiles of the norms: the threshold, and the share of steps above it."""
    finite = norms[np.isfinite(norms)]
    if not finite.size:
        return []
    return [
        {
            "percentile": p,
            "threshold": float(f"{level:.4g}"),
            "share": float((finite > level).mean()),
        }
        for p, level in zip(
            PAGE_PERCENTILES, np.percentile(finite, PAGE_PERCENTILES).tolist(), strict=True
        )
    ]


def _histogram(run: Run) -> dict[str, Any] | None:
    """Counts of the norms in bins of equal width of the logarithm."""
    norms = run.total_norm[np.isfinite(run.total_norm) & (run.total_norm > 0.0)]
    if not norms.size:
        return None
    logs = np.log10(norms)
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-6:
        low, high = low - 0.05, high + 0.05
    counts, edges = np.histogram(logs, 60, (low, high))
    return {"centres": _numbers((edges[:-1] + edges[1:]) / 2), "counts": counts.tolist()}


def _spans(run: Run) -> list[list[float]]:
    """``[first step, last step, state]`` of all that is not normal; of many, the longest."""
    codes = run.states
    if not len(codes):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(codes.astype(int))) + 1))
    ends = np.concatenate((starts[1:], [len(codes)])) - 1
    odd = codes[starts] != 0
    starts, ends = starts[odd], ends[odd]
    if len(starts) > MARKED_STEPS:
        longest = np.sort(np.argsort(starts - ends, kind="stable")[:MARKED_STEPS])
        starts, ends = starts[longest], ends[longest]
    return [
        [float(run.steps[a]), float(run.steps[b]), int(codes[a])]
        for a, b in zip(starts, ends, strict=True)
    ]


def _parameters(parameters: ParameterSeries) -> dict[str, Any]:
    clipped = parameters.coefficients < 1.0
    known = ~np.isnan(parameters.coefficients)
    share = clipped.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    lowest = _largest(-parameters.coefficients)
    largest = _largest(parameters.norms)
    ratios = np.full_like(known, np.nan, float) if parameters.ratios is None else parameters.ratios
    order = np.lexsort((lowest, -share))[:CLIPPED_LISTED]
    return {
        "lines": len(parameters.steps),
        "count": len(parameters.names),
        "has_ratios": parameters.ratios is not None,
        "most_clipped": [
            {
                "name": parameters.names[place],
                "share": _number(100.0 * share[place]),
                "coefficient": _number(-lowest[place]),
                "median": _number(median(parameters.norms[:, place])),
                "largest": _number(largest[place]),
                "ratio": _number(median(ratios[:, place])),
            }
            for place in order
        ],
        "heat": _heat(parameters),
    }


def _heat(parameters: ParameterSeries) -> dict[str, Any]:
    """Norms by module and step: the joint norm of a module's parameters, the largest in a cell."""
    groups = _modules(parameters.names)
    edges = bins(len(parameters.steps), CELLS)
    norms = parameters.rolled_up(groups).norms
    cells = np.maximum.reduceat(np.where(np.isnan(norms), -np.inf, norms), edges[:-1])
    rows = [_numbers(row, 3) for row in cells.T.tolist()]
    return {
        "names": list(groups),
        "steps": _numbers(parameters.steps[edges[:-1]], 9),
        "rows": rows,
        "rolled_up": len(groups) < len(parameters.names),
    }


def _modules(names: Sequence[str]) -> dict[str, list[int]]:
    """Places of the parameters by the longest module path that leaves few enough groups."""
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        groups = grouped(names, depth)
        if len(groups) <= ROWS:
            return groups
    edges = bins(len(names), ROWS)  # no structure in the names: runs of neighbours
    return {
        f"{names[a]} to {names[b - 1]}": list(range(a, b))
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    }


def _largest(table: npt.NDArray[np.float32]) -> Floats:
    """The largest of each column, NaN where it has none."""
    known = np.where(np.isnan(table), -np.inf, table).max(axis=0).astype(np.float64)
    return np.where(np.isfinite(known), known, np.nan)


def _some(steps: Floats) -> Floats:
    return steps if len(steps) <= MARKED_STEPS else steps[bins(len(steps), MARKED_STEPS)[:-1]]


def _numbers(values: Iterable[float], digits: int = 5) -> list[float | None]:
    return [_number(value, digits) for value in values]


def _number(value: float, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
