"""Histograms of binary exponents, on the host; a log is read with them, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distclip.common.rollups import Floats

RANGES = {
    "float16": (-14, 15),
    "bfloat16": (-126, 127),
    "float32": (-126, 127),
    "float64": (-1022, 1023),
}
"""Exponents of the smallest normal and of the largest numbers of a dtype."""

LOWEST, HIGHEST = RANGES["float32"]
"""Exponents that are told apart; float64 numbers beyond count with the last of them."""

ZERO, SUBNORMAL, NONFINITE = range(len(RANGES), len(RANGES) + 3)
FIRST = NONFINITE + 1
COLUMNS = FIRST + HIGHEST - LOWEST + 1
"""Of a row of counts: elements of each dtype, those without an exponent, those of each exponent."""


@dataclass(frozen=True, eq=False)
class Exponents:
    """How many elements of gradients have which binary exponent.

    Attributes:
        dtype: of the gradients: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``.
        zero: how many elements are 0.
        subnormal: how many are not 0 and below the smallest normal number of the dtype.
        nonfinite: how many are NaN or inf.
        lowest: exponent of ``counts[0]``.
        counts: int64; ``counts[i]`` elements have an absolute value of at least
            ``2 ** (lowest + i)`` and less than twice that. float64 numbers outside of float32's
            range count with its first or last exponent.
    """

    dtype: str
    zero: int
    subnormal: int
    nonfinite: int
    lowest: int
    counts: npt.NDArray[np.int64]

    @property
    def elements(self) -> int:
        """How many there are in all."""
        return self.zero + self.subnormal + self.nonfinite + int(self.counts.sum())

    def near_underflow(self, binades: int = 4, dtype: str | None = None) -> float:
        """Share of the elements that a division by ``2 ** binades`` would make subnormal, or 0.

        Those that are subnormal already count, and those that are 0 do not.

        Args:
            binades: 0 for those that are subnormal now.
            dtype: in which; None for the gradients' own. Tells what float16 would lose of a
                gradient that is float32.
        """
        first, _ = RANGES[dtype or self.dtype]
        smallest, _ = RANGES[self.dtype]
        small = int(self.counts[: max(first + binades - self.lowest, 0)].sum())
        if smallest <= first + binades:
            small += self.subnormal
        return small / max(self.elements, 1)

    def near_overflow(self, binades: int = 4, dtype: str | None = None) -> float:
        """Share of the elements that a multiplication by ``2 ** binades`` would make infinite.

        Those that are NaN or inf already do not count. Arguments as for :meth:`near_underflow`.
        """
        _, last = RANGES[dtype or self.dtype]
        large = int(self.counts[max(last - binades + 1 - self.lowest, 0) :].sum())
        return large / max(self.elements, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a log; exponents at both ends that no element has are left out."""
        known = np.flatnonzero(self.counts)
        start, stop = (known[0], known[-1] + 1) if known.size else (0, 0)
        return {
            "zero": self.zero,
            "subnormal": self.subnormal,
            "nonfinite": self.nonfinite,
            "lowest": self.lowest + int(start),
            "counts": self.counts[start:stop].tolist(),
        }


def of_row(dtype: str, row: Floats) -> Exponents:
    """From one row of counts, or the sum of several."""
    whole = np.rint(row).astype(np.int64)
    zero, subnormal, nonfinite = (int(whole[column]) for column in (ZERO, SUBNORMAL, NONFINITE))
    return Exponents(dtype, zero, subnormal, nonfinite, LOWEST, whole[FIRST:])


def row_dtypes(table: Floats) -> list[str | None]:
    """The dtype of each row; None where it counts nothing."""
    names = (*RANGES,)
    elements = table[:, : len(names)]
    return [names[row.argmax()] if row.any() else None for row in elements]


def by_dtype(names: Sequence[str], table: Floats) -> dict[str, tuple[Exponents, dict[str, float]]]:
    """All rows of each dtype together, and the rows nearest to underflow.

    Args:
        names: of the rows.
        table: ``(rows, COLUMNS)``.

    Returns:
        Per dtype: the sum; and of the three rows that have the largest share near underflow, the
        name and the share, where it is not 0.
    """
    rows: dict[str, list[int]] = {}
    for number, dtype in enumerate(row_dtypes(table)):
        if dtype is not None:
            rows.setdefault(dtype, []).append(number)
    found = {}
    for dtype, numbers in rows.items():
        shares = {names[n]: of_row(dtype, table[n]).near_underflow() for n in numbers}
        worst = sorted(shares.items(), key=lambda each: -each[1])[:3]
        found[dtype] = of_row(dtype, table[numbers].sum(axis=0)), {n: s for n, s in worst if s}
    return found


def from_log(dtype: object, record: object) -> Exponents | None:
    """What ``to_dict`` gave, from a file that may hold anything; None where it is not that."""
    if dtype not in RANGES or not isinstance(record, Mapping):
        return None
    try:
        zero, subnormal, nonfinite, lowest = (
            int(record[key]) for key in ("zero", "subnormal", "nonfinite", "lowest")
        )
        counts = np.asarray(record["counts"], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    numbers = (zero, subnormal, nonfinite, *counts.tolist())
    if counts.ndim != 1 or not all(0 <= n < 2**53 for n in numbers):
        return None
    if not LOWEST <= lowest <= HIGHEST + 1 - len(counts) and len(counts):
        return None
    return Exponents(str(dtype), zero, subnormal, nonfinite, lowest, counts)
