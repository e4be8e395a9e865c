"""Norms of parameters rolled up by their names, on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distclip.errors import ConfigurationError

Floats = npt.NDArray[np.float64]


def check_depth(depth: int) -> None:
    """Refuse a number of parts of names that makes no modules.

    Raises:
        ConfigurationError: ``depth < 1``.
    """
    if isinstance(depth, bool) or not depth >= 1:
        raise ConfigurationError(f"a depth of modules must be an integer >= 1, got {depth!r}")


def grouped(names: Sequence[str], depth: int) -> dict[str, list[int]]:
    """Places of the names that have the first ``depth`` parts between dots in common.

    Args:
        names: of parameters, such as ``layers.0.attn.weight``.
        depth: at least 1. A name with fewer parts stands for itself.

    Returns:
        The common beginning, such as ``layers.0`` for a depth of 2 -> the places; in the order in
        which they begin.

    Raises:
        ConfigurationError: ``depth < 1``.
    """
    check_depth(depth)
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(place)
    return groups


def joint(norms: Floats, order: float) -> Floats:
    """The p-norm of wholes from the p-norms of their parts, along the last axis.

    Args:
        norms: not negative; NaN and inf pass through.
        order: p > 0, or inf.

    Returns:
        float64, one dim less; 0 for no parts. Nothing overflows or underflows on the way.
    """
    largest: Floats = norms.max(axis=-1, initial=0.0)
    if math.isinf(order):
        return largest
    with np.errstate(all="ignore"):
        scaled = norms / np.where(largest > 0.0, largest, 1.0)[..., None]
        total: Floats = largest * (scaled**order).sum(axis=-1) ** (1.0 / order)
    return np.where(np.isinf(largest), largest, total)
